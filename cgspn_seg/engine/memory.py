"""The peak memory of a run, in the words that the tools show it in."""

from __future__ import annotations

import resource
import sys

import torch

__all__ = ["PeakMemory"]

_GIB = 2**30
# In what getrusage counts: KiB on Linux, bytes on macOS.
_RSS_UNIT = 1 if sys.platform == "darwin" else 2**10


class PeakMemory:
    """The most memory in use since this was made, as `str`.

    On a GPU that is what tensors of this process occupied. Elsewhere it is the resident memory of
    the process, which counts from its start.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._peak = 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def update(self) -> None:
        """Take note of the peak so far; needed before others reset PyTorch's count of it."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
        self._peak = max(self._peak, peak)

    def __str__(self) -> str:
        self.update()
        of = "GPU" if self._device.type == "cuda" else "process"
        return f"peak memory of the {of} {self._peak / _GIB:.2f} GiB"
