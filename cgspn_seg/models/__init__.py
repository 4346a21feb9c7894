"""Encoders, token mixers and teachers; importing this registers them with MMSegmentation."""

from cgspn_seg import compat  # noqa: F401  (must run before mmseg.models is imported)

# isort: split
from cgspn_seg.models import accuracy  # noqa: F401  (replaces the heads' own)
from cgspn_seg.models.arch import ARCHITECTURES, Architecture
from cgspn_seg.models.backbones import CGSPN
from cgspn_seg.models.distillation import EncoderTeacher, TimmTeacher, TransformersTeacher
from cgspn_seg.models.mixers import MIXERS

__all__ = [
    "ARCHITECTURES",
    "CGSPN",
    "MIXERS",
    "Architecture",
    "EncoderTeacher",
    "TimmTeacher",
    "TransformersTeacher",
]
