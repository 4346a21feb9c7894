"""The peak memory that tools show."""

import logging
import re
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.device import get_max_cuda_memory
from mmengine.hooks import LoggerHook
from mmengine.runner.priority import get_priority

from cgspn_seg.engine import memory as module
from cgspn_seg.engine.hooks import PeakMemoryHook
from cgspn_seg.engine.memory import PeakMemory


def gib(text: object) -> float:
    return float(re.fullmatch(r"[Pp]eak memory of the \w+ ([\d.]+) GiB", str(text))[1])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for PyTorch's count of a GPU's memory: what is in use, and the peak."""
    count = SimpleNamespace(used=0, peak=0)

    def use(amount: int) -> None:
        count.used, count.peak = amount, max(count.peak, amount)

    def reset(_: object = None) -> None:
        count.peak = count.used

    count.use, count.reset = use, reset
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: count.peak)
    return count


def test_without_a_gpu_it_is_that_of_the_process() -> None:
    (now,) = re.findall(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    text = str(PeakMemory("cpu"))
    assert text.startswith("peak memory of the process ")
    assert int(now) / 2**20 - 0.01 <= gib(text) < 1024


@pytest.mark.parametrize(("unit", "counted"), [(1, 3 * 2**30), (2**10, 3 * 2**20)])
def test_the_unit_of_the_system_is_used(unit, counted, monkeypatch) -> None:
    monkeypatch.setattr(module, "_RSS_UNIT", unit)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=counted))
    assert gib(PeakMemory("cpu")) == 3.0


def test_on_a_gpu_it_starts_anew_and_outlasts_a_reset_by_others(gpu) -> None:
    gpu.use(9 * 2**30)
    gpu.use(2**30)
    peak = PeakMemory("cuda:1")
    assert str(peak) == "peak memory of the GPU 1.00 GiB"
    gpu.use(5 * 2**30)
    gpu.use(2 * 2**30)
    peak.update()
    gpu.reset()
    assert str(peak) == "peak memory of the GPU 5.00 GiB"


def test_a_test_logs_the_peak_of_all_its_images(gpu, caplog) -> None:
    hook, logger = PeakMemoryHook(), logging.getLogger("test_memory")
    model = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device="cuda:0")]))
    runner = SimpleNamespace(model=model, logger=logger)
    gpu.use(9 * 2**30)
    gpu.use(2**30)
    with caplog.at_level(logging.INFO, logger="test_memory"):
        hook.before_test(runner)
        for index, used in enumerate((3, 5, 2)):
            gpu.use(used * 2**30)
            gpu.use(2**30)
            hook.after_test_iter(runner, batch_idx=index, data_batch={}, outputs=[])
            gpu.reset()  # as LoggerHook does
        hook.after_test(runner)
    assert caplog.messages == ["Peak memory of the GPU 5.00 GiB"]
    assert get_priority(hook.priority) < get_priority(LoggerHook.priority)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_counts_tensors() -> None:
    # MMEngine's own count, which resets, is taken in between.
    before = torch.cuda.memory_allocated() / 2**30  # what other tests left
    peak = PeakMemory("cuda")
    torch.empty(2**30, dtype=torch.uint8, device="cuda")
    peak.update()
    get_max_cuda_memory()
    assert 0.99 < gib(peak) - before < 1.1
    assert gib(PeakMemory("cuda")) - before < 0.1
