"""Hooks and optimizer constructors; importing this registers them with MMSegmentation."""

from cgspn_seg import compat  # noqa: F401  (before mmseg)

# isort: split
from cgspn_seg.engine.hooks import CheckDataHook, PeakMemoryHook, SaveSubsetHook
from cgspn_seg.engine.optimizers import LayerDecayOptimWrapperConstructor

__all__ = [
    "CheckDataHook",
    "LayerDecayOptimWrapperConstructor",
    "PeakMemoryHook",
    "SaveSubsetHook",
]
