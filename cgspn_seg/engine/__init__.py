"""Hooks, metrics and optimizer constructors; importing this registers them with MMSegmentation."""

from cgspn_seg import compat  # noqa: F401  (before mmseg)

# isort: split
from cgspn_seg.engine.hooks import CheckDataHook, CUDAGraphHook, PeakMemoryHook, SaveSubsetHook
from cgspn_seg.engine.metrics import DistillationMetric
from cgspn_seg.engine.optimizers import LayerDecayOptimWrapperConstructor

__all__ = [
    "CUDAGraphHook",
    "CheckDataHook",
    "DistillationMetric",
    "LayerDecayOptimWrapperConstructor",
    "PeakMemoryHook",
    "SaveSubsetHook",
]
