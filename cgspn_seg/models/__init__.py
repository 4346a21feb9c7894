"""Encoders, token mixers and distillation; importing this registers them with MMSegmentation."""

from cgspn_seg import compat  # noqa: F401  (must run before mmseg.models is imported)

# isort: split
from cgspn_seg.models import (
    accuracy,  # noqa: F401  (replaces the heads' own)
    distillation,  # noqa: F401  (registers teachers and distillers)
)
from cgspn_seg.models.arch import (
    ARCHITECTURES,
    GSPN2_ARCHITECTURES,
    GSPN_ARCHITECTURES,
    Architecture,
    HierarchicalArchitecture,
)
from cgspn_seg.models.backbones import CGSPN, GSPN, GSPN2
from cgspn_seg.models.mixers import MIXERS

__all__ = [
    "ARCHITECTURES",
    "CGSPN",
    "GSPN",
    "GSPN2",
    "GSPN2_ARCHITECTURES",
    "GSPN_ARCHITECTURES",
    "MIXERS",
    "Architecture",
    "HierarchicalArchitecture",
]
