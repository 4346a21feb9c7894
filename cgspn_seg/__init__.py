"""Compact generalized spatial propagation for dense prediction, on MMEngine and MMSegmentation.

Importing the package itself is light: the op lives in `cgspn_seg.ops`; `cgspn_seg.models`,
`cgspn_seg.datasets` and `cgspn_seg.engine` register their parts with MMSegmentation when imported.
"""

from cgspn_seg.version import __version__

__all__ = ["__version__"]
