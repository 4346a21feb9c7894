"""Encoders."""

from cgspn_seg.models.backbones.plain import CGSPN

__all__ = ["CGSPN"]
