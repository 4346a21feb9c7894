"""What of a teacher's function a student of ours can take over, and what not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from cgspn_seg.models.distillation.teachers.base import Teacher
from cgspn_seg.models.mixers import AttentionMixer

__all__ = ["gelu_kind", "has_part", "mlp_of", "require_gelu", "why_not_plain"]


def gelu_kind(activation: nn.Module) -> str | None:
    """The `gelu` of a CGSPN that computes the same as a module; None if none does."""
    x = torch.linspace(-6, 6, 241, dtype=torch.float64)
    with torch.no_grad():
        y = activation(x.clone())
    # The two kinds differ by 5e-4.
    kinds = ("none", "tanh")
    return next((k for k in kinds if (F.gelu(x, approximate=k) - y).abs().max() < 1e-5), None)


def has_part(teacher: Teacher, parts: Sequence[str], block: int | None = None) -> str | None:
    """The first of these parts that is there and does something."""
    for name in parts:
        part = teacher.find(name, block)
        if part is not None and not isinstance(part, nn.Identity):
            return name
    return None


def mlp_of(teacher: Teacher, index: int) -> tuple[nn.Linear, nn.Linear]:
    family = teacher.family
    fc1, fc2 = teacher.find(family.fc1, index), teacher.find(family.fc2, index)
    other = has_part(teacher, family.other_mlp_parts, index)
    if fc1 is None or fc2 is None or other or fc1.out_features != fc2.in_features:
        raise ValueError(
            f"{teacher.name}: the MLP of block {index} is gated (SwiGLU) or has a norm inside, "
            "which students have not; expected two products with a GELU between. It can be a "
            "teacher (of taps), but gives no warm start: start the student from scratch, or take "
            "another teacher"
        )
    return fc1, fc2


def require_gelu(teacher: Teacher) -> str:
    activation = teacher.find(teacher.family.activation, 0)
    kind = gelu_kind(activation)
    if kind is None:
        raise ValueError(
            f"{teacher.name}: its MLPs have {type(activation).__name__}, which is neither the "
            "exact GELU nor its tanh approximation, so a student cannot start from them"
        )
    return kind


def why_not_plain(teacher: Teacher, index: int, mixer: AttentionMixer) -> str | None:
    """Why attention of ours cannot be what a teacher's is; None if it can."""
    family, heads = teacher.family, teacher.find(teacher.family.heads, index)
    if teacher.find(family.proj, index) is None:
        return "the teacher has none"
    if family.rotary:
        return "the teacher's rotates queries and keys by their positions, ours does not"
    if other := has_part(teacher, family.other_attention_parts, index):
        return f"the teacher's has more than softmax attention has ({other})"
    if heads != mixer.num_heads:
        return f"the teacher's has {heads} heads, the student's {mixer.num_heads}"
    if mixer.qkv.bias is None and any(
        teacher.find(part, index).bias is not None for part in family.qkv
    ):
        return "the teacher's has biases, the student's qkv_bias=False"
    return None
