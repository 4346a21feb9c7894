"""How benchmarks of modules fill a row: time and memory, or why there is neither."""

import gc
import statistics
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from benchmark_timing import Call, event_ms, graph_ms, host_ms, rotation
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cgspn_seg.ops.fused import fused_kernels

ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""PyTorch's backends of scaled_dot_product_attention by the names that `--attention` takes."""

MIN_RUNS = 3
LONG_MS = 1000
"""Calls that take longer, in milliseconds, are timed as they come: launches do not count there."""

OUT_OF_MEMORY, NOT_AVAILABLE = "out of memory", "not available"


class Contender(Protocol):
    """What is compared; settings know how to build it."""

    @property
    def label(self) -> str:
        """Its name in tables."""


class NotAvailable(RuntimeError):
    """What is to be measured needs something that is not installed; the message says what."""


@dataclass(frozen=True)
class Setting(ABC):
    """What all rows of a run have in common; subclasses know how to build what is measured.

    Attributes:
        dtype: what is computed in; where the input has another, by autocast.
        device: where.
        runs: how many are measured at most on a GPU.
        seconds: how long a row is measured, on a GPU at least `MIN_RUNS` times.
        threads: of the CPU.
    """

    dtype: torch.dtype
    device: torch.device
    runs: int
    seconds: float
    threads: int

    @property
    def rotated(self) -> bool:
        """Whether further modules are built so that none finds its parameters in the L2 cache; a
        whole encoder finds as much there as it would in use."""
        return False

    @abstractmethod
    def build(self, contender: Contender, mode: str, size: int) -> nn.Module:
        """The module as a mode needs it, on PyTorch's current default device."""

    @abstractmethod
    def make_input(self, mode: str, size: int, batch: int) -> Tensor:
        """A random input of the module, on PyTorch's current default device."""


def cases_in_order(
    modes: Sequence[str], sizes: Sequence[int], batches: Sequence[int]
) -> list[dict]:
    """The mode, size and batch of each group of rows."""
    return [
        dict(mode=mode, size=size, batch=batch)
        for mode in modes
        for size in sorted(sizes)
        for batch in sorted(batches)
    ]


def announced(cases: Sequence[dict], contenders: Sequence[Contender]) -> Iterator[tuple]:
    """Every case with every contender; each is said on stderr when its turn comes."""
    done, total = 0, len(cases) * len(contenders)
    for case in cases:
        for contender in contenders:
            done += 1
            where = "{mode}, {size} px, batch {batch}".format(**case)
            progress = f"[{done}/{total}] {where}: {contender.label}"
            print(progress, file=sys.stderr, flush=True)
            yield case, contender


def run_once(module: nn.Module, x: Tensor, mode: str, dtype: torch.dtype) -> object:
    """What is timed: forward, or that and the gradients of the parameters and of the input where it
    requires one; under autocast unless the input has the dtype."""
    autocast = torch.autocast(x.device.type, dtype, enabled=x.dtype != dtype)
    if mode == "forward":
        with torch.inference_mode(), autocast:
            return module(x)
    with autocast:
        out = module(x)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    leaves = [t for t in (*module.parameters(), x) if t.requires_grad]
    # As good a gradient as any, which takes neither time nor memory to make.
    return torch.autograd.grad(outputs, leaves, [o.detach() for o in outputs])


def once_ms(call: Call) -> float:
    """Milliseconds of a single call on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(setting: Setting, contender: Contender, mode: str, size: int, batch: int) -> dict:
    """Time of a call, how it was taken, and on a GPU the peak of its memory, all included."""
    with setting.device:
        x = setting.make_input(mode, size, batch)
        module = setting.build(contender, mode, size)
    call = partial(run_once, module, x, mode, setting.dtype)
    call()
    if setting.device.type == "cpu":
        return dict(ms=host_ms(call, setting.threads, setting.seconds), timing="host")

    torch.cuda.reset_peak_memory_stats()
    first_ms = once_ms(call)
    peak = dict(peak_gib=torch.cuda.max_memory_allocated() / 2**30)
    if first_ms > LONG_MS:
        more = [once_ms(call) for _ in range(MIN_RUNS - 1)]
        return dict(ms=statistics.median([first_ms, *more]), timing="events", **peak)
    fitting = int(setting.seconds * 1e3 / first_ms)
    try:
        # A capture that fails can leave its own stream behind as the current one.
        with torch.cuda.stream(torch.cuda.current_stream()):
            calls = [call]
            if setting.rotated:
                calls += beside(setting, contender, mode, size, module, x)
            runs = min(setting.runs, max(MIN_RUNS, fitting // len(calls)))
            return dict(ms=graph_ms(calls, runs), timing="graph", **peak)
    except RuntimeError:  # it cannot be captured, or there is no memory for the graph
        calls = None
    gc.collect()
    torch.cuda.empty_cache()
    runs = min(setting.runs, max(MIN_RUNS, fitting))
    return dict(ms=event_ms(call, runs), timing="events", **peak)


def beside(
    setting: Setting, contender: Contender, mode: str, size: int, module: nn.Module, x: Tensor
) -> list[Call]:
    """Calls of further modules with other parameters, for :attr:`Setting.rotated`."""
    num_bytes = sum(p.nbytes for p in module.parameters())
    sets = rotation(num_bytes, torch.cuda.get_device_properties(setting.device).L2_cache_size)
    with setting.device:
        others = [setting.build(contender, mode, size) for _ in range(sets - 1)]
    return [partial(run_once, other, x, mode, setting.dtype) for other in others]


def reason(error: RuntimeError) -> str:
    """Why a row could not be measured; an error after which nothing on the GPU works is raised."""
    said = str(error)
    if isinstance(error, NotAvailable):
        return f"{NOT_AVAILABLE}: {said}"
    lacking = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    if isinstance(error, torch.OutOfMemoryError) or any(text in said for text in lacking):
        return OUT_OF_MEMORY
    if isinstance(error, torch.AcceleratorError):
        raise error
    if "No available kernel" in said or "No viable backend" in said:
        return NOT_AVAILABLE
    return "failed: " + said.partition("\n")[0]


def measured(
    setting: Setting, contender: Contender, case: dict, attention: str | None, fused: bool = True
) -> dict:
    """What is measured of a row; where that could not be done, `error` says why.

    Args:
        setting: how and where.
        contender: what `setting` builds.
        case: the row's mode, size and batch.
        attention: a key of `ATTENTION`, or None to leave the choice to PyTorch.
        fused: whether our encoders use fused kernels.

    Returns:
        What :func:`measure` does, with `images_per_s`; or `error`.
    """
    on_gpu = setting.device.type == "cuda"
    backend = sdpa_kernel(ATTENTION[attention]) if attention else nullcontext()
    device = torch.cuda.device(setting.device) if on_gpu else nullcontext()
    try:
        with backend, device, fused_kernels(fused):
            figures = measure(setting, contender, case["mode"], case["size"], case["batch"])
        figures["images_per_s"] = case["batch"] / figures["ms"] * 1e3
    except RuntimeError as error:
        figures = dict(error=reason(error))
    # Here, where the error and with it the frames that hold tensors are gone.
    gc.collect()
    if on_gpu:
        # Each capture has a stream and cuBLAS a workspace for each stream, which the next row's
        # memory would include.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
    return figures


def lacks_memory(rows: Sequence[dict], row: dict) -> bool:
    """Whether fewer and smaller images were already too much for the row's contender.

    Args:
        rows: those measured so far.
        row: the mode, size, batch and contender that would be next.
    """
    return any(
        (other["mode"], other["contender"]) == (row["mode"], row["contender"])
        and other.get("error") == OUT_OF_MEMORY
        and other["size"] < row["size"]
        and other["batch"] < row["batch"]
        for other in rows
    )
