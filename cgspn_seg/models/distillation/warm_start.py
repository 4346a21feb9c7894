"""A student's start from its teacher: patch embedding, norms and MLPs; its mixers start fresh.

What the two have alike is copied, so that with the teacher's attention for mixers the student would
compute the teacher's features. The teacher's layer scale of the MLP, which students lack, becomes
part of the second product; that of attention is part of what the mixers learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cgspn_seg.checkpoints.loading import CheckpointError
from cgspn_seg.models.backbones.block import LocalPerceptionUnit
from cgspn_seg.models.backbones.plain import CGSPN
from cgspn_seg.models.distillation.patch_kernel import fold_normalization, resize_patch_kernel
from cgspn_seg.models.distillation.teacher_parts import (
    has_part,
    mlp_of,
    require_gelu,
    why_not_plain,
)
from cgspn_seg.models.distillation.teachers.base import IMAGENET_MEAN, IMAGENET_STD, Teacher
from cgspn_seg.models.distillation.warm_start_report import WarmStart
from cgspn_seg.models.mixers import AttentionMixer

__all__ = ["MIN_MATCH", "student_config", "warm_start"]

# Of the tensors that a warm start is expected to fill.
MIN_MATCH = 0.9


@dataclass
class _Offer:
    """What a teacher has for a student, by the student's names."""

    values: dict[str, Tensor] = field(default_factory=dict)
    resized: dict[str, str] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def add(self, key: str, value: Tensor, *sources: Tensor | None) -> None:
        self.values[key] = value.detach()
        self.used.update(id(source) for source in sources)


def warm_start(
    student: CGSPN,
    teacher: Teacher,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    min_match: float = MIN_MATCH,
) -> WarmStart:
    """Copies what a teacher and a student have alike into the student.

    Mixers that attend get the teacher's attention, where it is plain softmax attention over as many
    heads, and the positional embedding the teacher's, for the student's grid. Of an
    :class:`EncoderTeacher`, mixers of the student's own class are copied, and local perception
    units; those that a teacher has none for are set to 0, and add nothing at first. The teacher is
    left as it is, and the student too if it is refused.

    Args:
        student: the encoder; its tensors are changed in place.
        teacher: any teacher of as many channels and blocks.
        mean: of the student's images, in 0..255 units. The teacher's own mean and std are folded
            into the patch embedding, exactly but for padding, which is 0 after normalization.
        std: likewise.
        min_match: share of the tensors to be filled below which the teacher is refused.

    Returns:
        What came from where.

    Raises:
        ValueError: the two cannot compute the same function: widths, depths, GELUs differ, MLPs are
            gated, or parts are in the teacher that students do not have.
        CheckpointError: less than `min_match` of the tensors fits.
    """
    _require_alike(student, teacher)
    offer = _Offer()
    _offer_patches(offer, student, teacher, mean, std)
    for index, block in enumerate(student.blocks):
        _offer_norms_and_mlp(offer, teacher, index)
        _offer_mixer(offer, teacher, index, block)
    own_eps, eps = student.blocks[0].norm1.eps, teacher.find(teacher.family.norm1, 0).eps
    if own_eps != eps:
        offer.notes.append(f"norms: the teacher's eps is {eps:g}, the student's {own_eps:g}")
    zeroed = _parameters_of_fresh_units(student, offer)
    own = student.state_dict()
    # Mixers of one class may differ in their parts, by their options.
    offer.values = {key: value for key, value in offer.values.items() if key in own}
    mismatched = {
        key: (tuple(own[key].shape), tuple(value.shape))
        for key, value in offer.values.items()
        if own[key].shape != value.shape
    }
    expected = [key for key in own if _is_expected(student, key) or key in offer.values]
    filled = [key for key in offer.values if key not in mismatched]
    sources = teacher.model.state_dict(keep_vars=True)
    report = WarmStart(
        matched=tuple(key for key in filled if key not in offer.resized),
        resized={key: how for key, how in offer.resized.items() if key not in mismatched},
        mismatched=mismatched,
        missing={
            key: "0: adds nothing at first" if key in zeroed else "as initialized"
            for key in own
            if key not in offer.values
        },
        unused=tuple(key for key, value in sources.items() if id(value) not in offer.used),
        expected=len(expected),
        notes=tuple(offer.notes),
    )
    if report.fraction < min_match:
        raise CheckpointError(
            f"{teacher.name}: a warm start would fill {report.num_filled} of the {len(expected)} "
            f"tensors it should ({report.fraction:.0%}, at least {min_match:.0%} wanted)"
            ". Give the student the teacher's sizes, such as arch.feedforward_channels="
            f"{mlp_of(teacher, 0)[0].out_features}; or start the rest fresh, with a lower "
            "--min-match of tools/convert_checkpoint.py; or all of it, with init='random' of a "
            f"distiller.\n{report.describe()}"
        )
    with torch.no_grad():
        for key in zeroed:
            own[key].zero_()
        for key in filled:
            own[key].copy_(offer.values[key])  # shares memory with the student's parameter
    return report


def student_config(
    teacher: Teacher, mixer: Any = "cgspn", patch_size: int | None = None
) -> dict[str, Any]:
    """The config of a CGSPN that fits a teacher.

    Args:
        teacher: gives widths, depth, GELU and the norms' epsilon.
        mixer: the student's mixers.
        patch_size: side of the student's patches, pixels; None for the teacher's.

    Raises:
        ValueError: the teacher's MLPs are gated, or its GELU is another function.
    """
    side = teacher.patch_size if patch_size is None else patch_size
    fc1, _ = mlp_of(teacher, 0)
    if isinstance(teacher.model, CGSPN):
        arch = asdict(teacher.model.arch)
    else:
        arch = dict(
            embed_dims=teacher.embed_dims,
            num_layers=teacher.num_layers,
            num_heads=teacher.find(teacher.family.heads, 0),
            feedforward_channels=fc1.out_features,
            # C-GSPN found C / 18 best; kernels like multiples of 16.
            latent_dims=max(32, round(teacher.embed_dims / 18 / 16) * 16),
        )
    config = dict(
        type="CGSPN",
        arch=arch,
        patch_size=side,
        in_channels=teacher.in_channels,
        mixer=mixer,
        gelu=require_gelu(teacher),
        norm_eps=teacher.find(teacher.family.norm1, 0).eps,
    )
    if teacher.image_size is not None:
        config["img_size"] = [n // teacher.patch_size * side for n in teacher.image_size]
    return config


def _require_alike(student: CGSPN, teacher: Teacher) -> None:
    """Refuses what cannot be copied block by block."""
    arch = student.arch
    in_channels = student.patch_embed.projection.in_channels
    for what, own, theirs in (
        ("channels (arch.embed_dims)", arch.embed_dims, teacher.embed_dims),
        ("blocks (arch.num_layers)", arch.num_layers, teacher.num_layers),
        ("channels of an image (in_channels)", in_channels, teacher.in_channels),
    ):
        if own != theirs:
            raise ValueError(
                f"{teacher.name}: the student has {own} {what}, the teacher {theirs}; a warm start "
                "copies block by block, so they must be equal"
            )
    for index in range(teacher.num_layers):
        mlp_of(teacher, index)
    if other := has_part(teacher, teacher.family.other_model_parts):
        raise ValueError(
            f"{teacher.name}: it has a norm before its first block ({other}), which students have "
            "not, so its weights do not fit a student"
        )
    kind, own = require_gelu(teacher), student.blocks[0].mlp.act.approximate
    if kind != own:
        raise ValueError(
            f"{teacher.name}: its GELU is gelu={kind!r}, the student's gelu={own!r}; set "
            f"gelu={kind!r} in the student's config"
        )


def _offer_patches(
    offer: _Offer, student: CGSPN, teacher: Teacher, mean: Sequence[float], std: Sequence[float]
) -> None:
    weight, bias = teacher.patch_kernel()
    source = teacher.find(teacher.family.patch_projection)
    folded = fold_normalization(
        weight.double(),
        weight.new_zeros(len(weight), dtype=torch.float64) if bias is None else bias.double(),
        (teacher.mean, teacher.std),
        (mean, std),
    )
    side = student.patch_size
    key = "patch_embed.projection.weight"
    offer.add(key, resize_patch_kernel(folded[0], side), source.weight)
    offer.add("patch_embed.projection.bias", folded[1], bias)
    if side != teacher.patch_size:
        offer.resized[key] = f"{teacher.patch_size} to {side} pixels a side (pseudo-inverse)"
    if not np.allclose([mean, std], [teacher.mean, teacher.std]):
        offer.notes.append(
            "normalization of images: the teacher's is folded into the patch embedding, for images "
            f"normalized with mean={list(mean)}, std={list(std)}"
        )
    if student.pos_embed is None:
        return
    grid = tuple(student.pos_embed.shape[1:3])
    positions = teacher.find(teacher.family.positions)
    if positions is None:
        offer.notes.append("positions: the teacher has no positional embedding to copy")
        return
    offer.add("pos_embed", teacher.position_grid(grid), positions)
    native = tuple(n // teacher.patch_size for n in teacher.image_size or ())
    if native != grid:
        offer.resized["pos_embed"] = f"{native} to {grid} patches, as the teacher does it"


def _offer_norms_and_mlp(offer: _Offer, teacher: Teacher, index: int) -> None:
    family, start = teacher.family, f"blocks.{index}"
    for name, part in (("norm1", family.norm1), ("norm2", family.norm2)):
        norm = teacher.find(part, index)
        if not isinstance(norm, nn.LayerNorm):
            raise ValueError(
                f"{teacher.name}: {part} of block {index} is {type(norm).__name__}, students have "
                "LayerNorm, so they cannot start from it"
            )
        ones = torch.ones(norm.normalized_shape)
        weight = ones if norm.weight is None else norm.weight
        offer.add(f"{start}.{name}.weight", weight, norm.weight)
        offer.add(f"{start}.{name}.bias", _or_zeros(norm.bias, ones), norm.bias)
    fc1, fc2 = mlp_of(teacher, index)
    _offer_linear(offer, f"{start}.mlp.fc1", [fc1])
    _offer_linear(offer, f"{start}.mlp.fc2", [fc2], teacher.find(family.mlp_scale, index))


def _offer_mixer(offer: _Offer, teacher: Teacher, index: int, block: nn.Module) -> None:
    family, start = teacher.family, f"blocks.{index}"
    if isinstance(teacher.model, CGSPN):
        for name in ("mixer", "mixer_lpu", "mlp_lpu"):
            part, own = teacher.find(name, index), getattr(block, name)
            # Attention is looked at below, whatever model it is of.
            if type(part) is type(own) and not isinstance(own, AttentionMixer | None):
                for key, value in part.state_dict(keep_vars=True).items():
                    offer.add(f"{start}.{name}.{key}", value, value)
    if not isinstance(block.mixer, AttentionMixer):
        return
    if reason := why_not_plain(teacher, index, block.mixer):
        note = f"attention is not copied: {reason}"
        if note not in offer.notes:
            offer.notes.append(note)
        return
    _offer_linear(offer, f"{start}.mixer.qkv", [teacher.find(part, index) for part in family.qkv])
    scale = teacher.find(family.attention_scale, index)
    _offer_linear(offer, f"{start}.mixer.proj", [teacher.find(family.proj, index)], scale)


def _offer_linear(
    offer: _Offer, name: str, layers: Sequence[nn.Linear], scale: Tensor | None = None
) -> None:
    """One product out of those of several layers; `scale`, per output channel, is folded in."""
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([_or_zeros(layer.bias, layer.weight[:, 0]) for layer in layers])
    if scale is not None:
        # In float64, so that it is rounded once.
        weight, bias = weight.double() * scale.double()[:, None], bias.double() * scale.double()
    offer.add(f"{name}.weight", weight, scale, *(layer.weight for layer in layers))
    offer.add(f"{name}.bias", bias, *(layer.bias for layer in layers))


def _parameters_of_fresh_units(student: CGSPN, offer: _Offer) -> set[str]:
    """What the local perception units consist of that nothing is copied into."""
    return {
        f"{name}.{key}"
        for name, unit in student.named_modules()
        if isinstance(unit, LocalPerceptionUnit) and f"{name}.conv.weight" not in offer.values
        for key in unit.state_dict()
    }


def _or_zeros(bias: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if bias is None else bias


def _is_expected(student: CGSPN, key: str) -> bool:
    """Whether a warm start from a ViT should fill a tensor."""
    if key.startswith(("patch_embed.", "pos_embed")):
        return True
    _, _, rest = key.partition("blocks.")
    index, _, name = rest.partition(".")
    if name.startswith("mixer."):
        return isinstance(student.blocks[int(index)].mixer, AttentionMixer)
    return name.startswith(("norm1.", "norm2.", "mlp."))
