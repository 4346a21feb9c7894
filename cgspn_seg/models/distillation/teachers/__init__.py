"""Teachers: frozen ViTs, run by the library that keeps them and read by adapters of few lines."""

from cgspn_seg.models.distillation.teachers.base import BlockTaps, Family, Teacher
from cgspn_seg.models.distillation.teachers.encoder import EncoderTeacher
from cgspn_seg.models.distillation.teachers.huggingface import TransformersTeacher
from cgspn_seg.models.distillation.teachers.timm_vit import TimmTeacher

__all__ = [
    "BlockTaps",
    "EncoderTeacher",
    "Family",
    "Teacher",
    "TimmTeacher",
    "TransformersTeacher",
]
