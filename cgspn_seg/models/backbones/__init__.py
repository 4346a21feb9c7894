"""Encoders."""

from cgspn_seg.models.backbones.hierarchical import GSPN, GSPN2
from cgspn_seg.models.backbones.plain import CGSPN

__all__ = ["CGSPN", "GSPN", "GSPN2"]
