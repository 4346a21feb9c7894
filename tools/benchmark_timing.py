"""How the benchmarks measure: by the host's clock, or by the GPU's, without Python's share."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.utils.benchmark import Timer

Call = Callable[[], object]

WARM_UP_S = 0.1
"""How long a call is repeated, in seconds, before it is measured: the GPU's clocks rise slowly."""

COPY_BYTES = 2**31
"""Size of the tensor whose copy says what the memory can do, in bytes; far above any L2 cache."""

MAX_ROTATION = 64
"""Sets of tensors to rotate among at most: without a bound, tiny ones would need thousands."""


def host_ms(call: Call, threads: int, seconds: float) -> float:
    """Median milliseconds of a call on the host's clock.

    Args:
        call: what is timed.
        threads: number of threads PyTorch may use.
        seconds: how long it is measured.
    """
    timer = Timer("call()", globals={"call": call}, num_threads=threads)
    # The first second finds the memory that later calls get without waiting.
    timer.blocked_autorange(min_run_time=min(1.0, seconds))
    return timer.blocked_autorange(min_run_time=seconds).median * 1e3


def event_ms(call: Call, runs: int, prepare: Call = lambda: None) -> float:
    """Median milliseconds between two CUDA events around a call on the current stream.

    Runs are queued without waiting for one another, so that the GPU has work while the host is at
    the next; where the host is the slower of the two, its gaps are part of the time.

    Args:
        call: what is timed.
        runs: how often.
        prepare: called before each run, outside its time.
    """
    warm = time.perf_counter() + WARM_UP_S
    while True:
        prepare()
        call()
        torch.cuda.synchronize()
        if time.perf_counter() >= warm:
            break
    events = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        prepare()
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def graph_ms(calls: Sequence[Call], runs: int) -> float:
    """Median milliseconds of one call on the GPU, without the gaps between Python's launches.

    The calls differ in their tensors alone: :func:`rotation` says how many it takes for none to
    find its inputs in the L2 cache. They are captured back to back into one CUDA graph after a
    warm-up on a side stream; a run is a replay of the graph between two events, and its time is
    divided by the number of calls. All results are kept until the graph is complete, so that each
    call has its own memory to write to as well.

    Args:
        calls: what is timed; each has to be capturable.
        runs: how many replays are measured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = [call() for call in calls]
    del results
    return event_ms(graph.replay, runs) / len(calls)


def rotation(num_bytes: int, l2_bytes: int) -> int:
    """Number of sets of input tensors, of `num_bytes` each, that exceed four times the L2 cache."""
    return min(MAX_ROTATION, max(1, math.ceil(4 * l2_bytes / max(num_bytes, 1))))


def copy_bandwidth(runs: int) -> float:
    """Bytes per second that a copy within the current GPU's memory reads and writes, the median."""
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (event_ms(partial(target.copy_, source), runs) * 1e-3)
