"""`benchmark.py block` and `model`: mixers side by side, by resolution and batch."""

import gc
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from benchmark_contenders import ATTENTION, HYBRID, Contender, build_contender
from benchmark_timing import Call, event_ms, graph_ms, host_ms, rotation
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from cgspn_seg.models import Architecture
from cgspn_seg.ops.flops import count_flops
from cgspn_seg.ops.fused import fused_kernels

MIN_RUNS = 3
LONG_MS = 1000
"""Calls that take longer, in milliseconds, are timed as they come: launches do not count there."""

OUT_OF_MEMORY, NOT_AVAILABLE = "out of memory", "not available"


@dataclass(frozen=True)
class Setting:
    """What all rows of a run have in common.

    Attributes:
        part: "block" or "model".
        arch: sizes of the encoder.
        patch_size: side of a patch, pixels.
        dtype: of everything in the forward mode, of autocast in the training mode.
        device: where.
        runs: how many are measured at most on a GPU.
        seconds: how long a row is measured, on a GPU at least `MIN_RUNS` times.
        threads: of the CPU.
    """

    part: str
    arch: Architecture
    patch_size: int
    dtype: torch.dtype
    device: torch.device
    runs: int
    seconds: float
    threads: int

    def build(self, contender: Contender, mode: str, size: int) -> nn.Module:
        """The module as a mode needs it: in the dtype, or in float32 for autocast."""
        module = build_contender(self.part, contender, self.arch, self.patch_size, size)
        return module.train() if mode == "train" else module.eval().to(self.dtype)

    def make_input(self, mode: str, size: int, batch: int) -> Tensor:
        """Random tokens for a block, which has a gradient to hand on, or images for a model."""
        side, block = size // self.patch_size, self.part == "block"
        shape = (side, side, self.arch.embed_dims) if block else (3, size, size)
        dtype = torch.float32 if mode == "train" else self.dtype
        return torch.randn(batch, *shape, dtype=dtype, requires_grad=block and mode == "train")


def run_once(module: nn.Module, x: Tensor, mode: str, dtype: torch.dtype) -> object:
    """What is timed: forward, or that and the gradients of the parameters and a block's input."""
    if mode == "forward":
        with torch.inference_mode():
            return module(x)
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
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
            if setting.part == "block":
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
    """Calls of further blocks, so that none finds its parameters in the L2 cache.

    In an encoder, the other layers' parameters come in between; the tokens are still there. A whole
    encoder needs no such thing: it finds as much in the cache as it would in use.
    """
    num_bytes = sum(p.nbytes for p in module.parameters())
    sets = rotation(num_bytes, torch.cuda.get_device_properties(setting.device).L2_cache_size)
    with setting.device:
        others = [setting.build(contender, mode, size) for _ in range(sets - 1)]
    return [partial(run_once, other, x, mode, setting.dtype) for other in others]


@cache
def count(setting: Setting, contender: Contender, mode: str, size: int) -> dict:
    """Parameters, and FLOPs of one image."""
    with torch.device("meta"):
        module = build_contender(setting.part, contender, setting.arch, setting.patch_size, size)
        x = setting.make_input(mode, size, batch=1).float().detach()
    x.requires_grad_(setting.part == "block")
    return dict(
        parameters=sum(p.numel() for p in module.parameters()),
        flops_per_image=count_flops(module, x, train=mode == "train"),
    )


def reason(error: RuntimeError) -> str:
    """Why a row could not be measured; an error after which nothing on the GPU works is raised."""
    said = str(error)
    lacking = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    if isinstance(error, torch.OutOfMemoryError) or any(text in said for text in lacking):
        return OUT_OF_MEMORY
    if isinstance(error, torch.AcceleratorError):
        raise error
    if "No available kernel" in said or "No viable backend" in said:
        return NOT_AVAILABLE
    return "failed: " + said.partition("\n")[0]


def make_row(setting: Setting, contender: Contender, mode: str, size: int, batch: int) -> dict:
    """A row of figures; where it could not be measured, `error` says why."""
    row = dict(mode=mode, size=size, batch=batch, contender=contender.label)
    row |= dict(mixer=contender.mixer, attention=contender.backend)
    row |= count(setting, replace(contender, backend=None), mode, size)
    on_gpu = setting.device.type == "cuda"
    backend = sdpa_kernel(ATTENTION[contender.backend]) if contender.backend else nullcontext()
    device = torch.cuda.device(setting.device) if on_gpu else nullcontext()
    try:
        with backend, device, fused_kernels(not contender.eager):
            row |= measure(setting, contender, mode, size, batch)
        row["images_per_s"] = batch / row["ms"] * 1e3
    except RuntimeError as error:
        row["error"] = reason(error)
    # Here, where the error and with it the frames that hold tensors are gone.
    gc.collect()
    if on_gpu:
        # Each capture has a stream and cuBLAS a workspace for each stream, which the next row's
        # memory would include.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
    return row


def fastest_attention(rows: Sequence[dict], like: dict) -> dict | None:
    """The row with the least time out of attention's at the same mode, size and batch."""
    same = [
        row
        for row in rows
        if row["mixer"] == "attention"
        and "ms" in row
        and all(row[key] == like[key] for key in ("mode", "size", "batch"))
    ]
    return min(same, key=lambda row: row["ms"], default=None)


def add_ratios(rows: list[dict]) -> None:
    """Gives the rows what the fastest attention takes as a multiple of theirs."""
    for row in rows:
        other = fastest_attention(rows, row)
        for key, ratio in (("ms", "vs_attention"), ("peak_gib", "memory_vs_attention")):
            if other and key in row:
                row[ratio] = other[key] / row[key]


def benchmark_model(
    setting: Setting,
    contenders: Sequence[Contender],
    *,
    modes: Sequence[str],
    sizes: Sequence[int],
    batches: Sequence[int],
) -> Iterator[list[dict]]:
    """Measures every contender in every mode, at every size and batch, and says so on stderr.

    A batch of images that are both more and larger than what a contender had no memory for is not
    tried.

    Args:
        setting: what the rows have in common.
        contenders: what is compared; a hybrid takes the attention that was fastest.
        modes: out of "forward" and "train".
        sizes: sides of the images, pixels.
        batches: images in a batch.

    Yields:
        The rows so far, after each. `ms` is the median time of a call, `peak_gib` the most memory
        that is in use during one.
    """
    # Hybrids come last, where the backends of attention have been measured.
    contenders = sorted(contenders, key=lambda c: c.mixer == HYBRID)
    cases = [(m, s, b) for m in modes for s in sorted(sizes) for b in sorted(batches)]
    rows: list[dict] = []
    for mode, size, batch in cases:
        for contender in contenders:
            where = f"{mode}, {size} px, batch {batch}: {contender.label}"
            progress = f"[{len(rows) + 1}/{len(cases) * len(contenders)}] {where}"
            print(progress, file=sys.stderr, flush=True)
            row = dict(mode=mode, size=size, batch=batch)
            if contender.mixer == HYBRID:
                best = fastest_attention(rows, row)
                default = "cudnn" if setting.device.type == "cuda" else "flash"
                contender = replace(contender, backend=best["attention"] if best else default)
            if any(
                (other["mode"], other["contender"]) == (mode, contender.label)
                and other.get("error") == OUT_OF_MEMORY
                and other["size"] < size
                and other["batch"] < batch
                for other in rows
            ):
                row |= dict(contender=contender.label, mixer=contender.mixer)
                row |= dict(attention=contender.backend, error=OUT_OF_MEMORY, tried=False)
                row |= count(setting, replace(contender, backend=None), mode, size)
            else:
                row = make_row(setting, contender, mode, size, batch)
            rows.append(row)
            add_ratios(rows)
            yield rows
