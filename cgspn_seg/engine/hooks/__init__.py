"""Hooks; importing this registers them with MMSegmentation."""

from cgspn_seg.engine.hooks.check_data import CheckDataHook
from cgspn_seg.engine.hooks.peak_memory import PeakMemoryHook

__all__ = ["CheckDataHook", "PeakMemoryHook"]
