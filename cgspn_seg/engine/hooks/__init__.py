"""Hooks; importing this registers them with MMSegmentation."""

from cgspn_seg.engine.hooks.check_data import CheckDataHook
from cgspn_seg.engine.hooks.check_schedule import CheckScheduleHook, RunComplete
from cgspn_seg.engine.hooks.cuda_graph import CUDAGraphHook
from cgspn_seg.engine.hooks.fsdp import FSDPHook, check_strategy
from cgspn_seg.engine.hooks.peak_memory import PeakMemoryHook
from cgspn_seg.engine.hooks.save_subset import SaveSubsetHook

__all__ = [
    "CUDAGraphHook",
    "CheckDataHook",
    "CheckScheduleHook",
    "FSDPHook",
    "PeakMemoryHook",
    "RunComplete",
    "SaveSubsetHook",
    "check_strategy",
]
