"""Distillation from attention teachers: the teachers, a student's start from one, both stages."""

from cgspn_seg.models.distillation.distiller import (
    Distiller,
    EndToEndDistiller,
    ModulewiseDistiller,
)
from cgspn_seg.models.distillation.teachers import (
    BlockTaps,
    EncoderTeacher,
    Teacher,
    TimmTeacher,
    TransformersTeacher,
)
from cgspn_seg.models.distillation.warm_start import student_config, warm_start
from cgspn_seg.models.distillation.warm_start_report import WarmStart

__all__ = [
    "BlockTaps",
    "Distiller",
    "EncoderTeacher",
    "EndToEndDistiller",
    "ModulewiseDistiller",
    "Teacher",
    "TimmTeacher",
    "TransformersTeacher",
    "WarmStart",
    "student_config",
    "warm_start",
]
