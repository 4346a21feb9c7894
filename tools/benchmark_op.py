"""`benchmark.py op`: line_scan against the memory, its PyTorch reference, and GSPN's own kernel."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from math import prod

import torch
from benchmark_original import ORIGINAL_MS, original_ms
from benchmark_timing import copy_bandwidth, event_ms, graph_ms, host_ms, rotation
from torch import Tensor

from cgspn_seg.ops import DIRECTIONS, direction_indices, line_scan, line_scan_reference

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.half}
REFERENCE_RUNS = 5


@dataclass(frozen=True)
class Case:
    """A problem to time: (B, H, W, C) of x, names of dtype and directions, channel groups G."""

    shape: tuple[int, int, int, int]
    dtype: str
    directions: tuple[str, ...]
    groups: int

    def lines(self) -> int:
        """Lines that the longest direction passes, one after the other."""
        _, height, width, _ = self.shape
        return max(height if name in ("down", "up") else width for name in self.directions)

    def min_bytes(self) -> dict[str, int]:
        """Bytes that have to move: each input read once, each output written once.

        Forward reads x, weight and input gate, and writes h; backward reads these four and the
        gradient of h, and writes the gradients of the three inputs.
        """
        *grid, channels = self.shape
        pixel = DTYPES[self.dtype].itemsize * prod(grid)
        h = pixel * len(self.directions) * channels
        inputs = pixel * channels + 3 * pixel * len(self.directions) * self.groups + h
        return dict(forward=inputs + h, backward=2 * inputs + 2 * h)

    def inputs(self, device: torch.device) -> list[Tensor]:
        """Random x, weight, input gate, and gradient of h."""
        *grid, channels = self.shape
        grid = (*grid, len(self.directions))
        shapes = (self.shape, (*grid, 3, self.groups), (*grid, channels), (*grid, channels))
        return [torch.randn(s, dtype=DTYPES[self.dtype], device=device) for s in shapes]


PRESETS = {
    "goals": [
        *(
            Case((16, 1024, 1024, 8), "fp32", (direction,), groups)
            for groups in (8, 1)
            for direction in ("down", "right")
        ),
        *(
            Case((32, side, side, 64), "bf16", DIRECTIONS, groups)
            for side in (147, 74)
            for groups in (64, 1)
        ),
        Case((1, 128, 128, 64), "bf16", DIRECTIONS, 64),
    ],
    "original": [Case(shape, dtype, ("right",), shape[-1]) for dtype, shape in ORIGINAL_MS],
}
"""Lists of cases with a name: those that goals are set for, and those of `ORIGINAL_MS`."""


def measure_on_cpu(case: Case, *, threads: int, seconds: float, reference: bool) -> dict:
    """Times of forward, and of forward with backward, on the host's clock."""
    passes = dict(forward={}, forward_backward={})
    *tensors, grad_h = case.inputs(torch.device("cpu"))
    scans = dict(ms=line_scan) | (dict(reference_ms=line_scan_reference) if reference else {})
    for key, scan in scans.items():
        scan = partial(scan, directions=case.directions)
        calls = dict(
            forward=partial(scan, *tensors),
            forward_backward=partial(forward_and_backward, scan, tensors, grad_h),
        )
        for name, call in calls.items():
            passes[name][key] = host_ms(call, threads, seconds)
    return passes


def forward_and_backward(
    scan: Callable[..., Tensor], tensors: list[Tensor], grad_h: Tensor
) -> None:
    """Gradients of all three inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    torch.autograd.grad(scan(*leaves), leaves, grad_h)


def measure_on_gpu(
    case: Case, device: torch.device, *, bandwidth: float, runs: int, reference: bool
) -> dict:
    """Times of forward and of backward alone, and what they mean, on the current GPU.

    Args:
        case: what is timed.
        device: the current GPU.
        bandwidth: bytes a second that a copy reads and writes, to compare with.
        runs: how many runs are measured.
        reference: whether to time the reference as well.
    """
    inputs = case.inputs(device)
    passes = op_ms(case, inputs, runs)
    for name, num_bytes in case.min_bytes().items():
        achieved = num_bytes / (passes[name]["ms"] * 1e-3)
        passes[name] |= dict(min_bytes=num_bytes, gb_per_s=achieved * 1e-9)
        passes[name] |= dict(copy_share=achieved / bandwidth)
    passes["forward"]["us_per_line"] = passes["forward"]["ms"] * 1e3 / case.lines()

    others = {}
    if reference:
        others["reference"] = partial(reference_ms, case, inputs)
    if len(case.directions) == 1:
        others["original"] = partial(original_ms, case.dtype, *case.directions, inputs, runs)
    for other, measure in others.items():
        try:
            times = measure()
        except torch.OutOfMemoryError:
            continue  # the table has a dash
        for name, figures in times.items():
            passes[name] |= {f"{other}_{key}": value for key, value in figures.items()}
    return passes


def op_ms(case: Case, inputs: list[Tensor], runs: int) -> dict:
    """Times of the operator on the GPU: forward, and the operator that autograd calls backward."""
    device, size = inputs[0].device, sum(tensor.nbytes for tensor in inputs[:3])
    sets = rotation(size, torch.cuda.get_device_properties(device).L2_cache_size)
    rotated = [inputs, *(case.inputs(device) for _ in range(sets - 1))]
    directions = direction_indices(case.directions)
    scan, scan_backward = torch.ops.cgspn_seg.line_scan, torch.ops.cgspn_seg.line_scan_backward
    forward, backward = [], []
    for *tensors, grad_h in rotated:
        forward.append(partial(scan, *tensors, directions))
        h = scan(*tensors, directions)
        backward.append(partial(scan_backward, grad_h, *tensors, h, directions))
    return {
        name: dict(ms=graph_ms(calls, runs))
        for name, calls in dict(forward=forward, backward=backward).items()
    }


def reference_ms(case: Case, inputs: list[Tensor]) -> dict:
    """Times of the reference on the GPU, called from Python: each line is a handful of launches."""
    *tensors, grad_h = inputs
    scan = partial(line_scan_reference, directions=case.directions)
    forward = event_ms(partial(scan, *tensors), REFERENCE_RUNS)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    call = partial(torch.autograd.grad, scan(*leaves), leaves, grad_h, retain_graph=True)
    return dict(forward=dict(ms=forward), backward=dict(ms=event_ms(call, REFERENCE_RUNS)))


def benchmark_op(
    cases: list[Case],
    device: torch.device,
    *,
    threads: int,
    seconds: float,
    runs: int,
    reference: bool,
) -> dict:
    """Times every case.

    Args:
        cases: what is timed.
        device: where; on the CPU it is forward and forward with backward, against the reference.
        threads: number of threads on the CPU.
        seconds: how long each call is measured on the CPU.
        runs: how many runs are measured on a GPU.
        reference: whether to time the reference too.

    Returns:
        Where and how it was measured, and `rows`: for each case its fields, and under `passes` the
        figures of forward and of backward (forward with backward on the CPU). Times are in
        milliseconds (`us_per_line` in microseconds), bandwidths in GB/s, sizes in bytes.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            bandwidth = copy_bandwidth(runs)
            facts = dict(device=torch.cuda.get_device_name(device), runs=runs)
            facts |= dict(copy_gb_per_s=bandwidth * 1e-9)
            options = dict(bandwidth=bandwidth, runs=runs, reference=reference)
            measured = [measure_on_gpu(case, device, **options) for case in cases]
    else:
        facts = dict(device="CPU", threads=threads)
        options = dict(threads=threads, seconds=seconds, reference=reference)
        measured = [measure_on_cpu(case, **options) for case in cases]
    rows = [dict(asdict(case), passes=p) for case, p in zip(cases, measured, strict=True)]
    for figures in (figures for row in rows for figures in row["passes"].values()):
        for other in ("reference", "original"):
            if f"{other}_ms" in figures:
                figures[f"{other}_ratio"] = figures[f"{other}_ms"] / figures["ms"]
    return dict(facts, torch=torch.__version__, rows=rows)
