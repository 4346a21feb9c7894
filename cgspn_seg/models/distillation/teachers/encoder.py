"""Our own encoder as a teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmseg.registry import MODELS
from torch import Tensor

from cgspn_seg.checkpoints.export import read_facts
from cgspn_seg.checkpoints.fit import (
    find_prefix,
    load_weights,
    require_complete,
    state_dict_of,
)
from cgspn_seg.checkpoints.loading import CheckpointError, load_checkpoint
from cgspn_seg.checkpoints.stored_config import require_same_function, stored_config
from cgspn_seg.models.backbones.block import BlockTaps
from cgspn_seg.models.distillation.teachers.base import IMAGENET_MEAN, IMAGENET_STD, Family, Teacher

__all__ = ["EncoderTeacher"]

_ENCODER = Family(
    patch_projection="patch_embed.projection",
    blocks="blocks",
    branch="mixer",
    norm1="norm1",
    norm2="norm2",
    fc1="mlp.fc1",
    activation="mlp.act",
    fc2="mlp.fc2",
    qkv=("mixer.qkv",),
    proj="mixer.proj",
    heads="mixer.num_heads",
    positions="pos_embed",
)


@MODELS.register_module()
class EncoderTeacher(Teacher):
    """A CGSPN encoder with any mixers: attention, or the student of an earlier step.

    Args:
        encoder: the config of a CGSPN; None for the one inside the checkpoint, which must be a
            backbone file then.
        checkpoint: its weights: a backbone file, or a checkpoint with a prefix; None for random
            ones.
        prefix: what stands before the encoder's names in the checkpoint, such as "backbone.".
        mean: of the images, in 0..255 units; None for what a backbone file says, else ImageNet's.
        std: likewise.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        CheckpointError: it is unreadable, does not fit the encoder, or has no config inside where
            that is needed.
        ValueError: the config is not of a CGSPN, or the one inside the checkpoint is of an encoder
            that computes something else.
    """

    def __init__(
        self,
        encoder: Mapping[str, Any] | None = None,
        checkpoint: str | Path | None = None,
        prefix: str = "",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        content, stored, facts = {}, None, None
        if checkpoint is not None:
            content = _read(str(checkpoint))
            stored = stored_config(str(checkpoint), content)
            facts = read_facts(checkpoint, content)
        if encoder is None:
            encoder = _require_stored(stored, checkpoint)
            origin = f"the config inside {checkpoint}"
        else:
            origin = "encoder"
        config = {key: value for key, value in encoder.items() if key != "init_cfg"}
        if config.get("type") not in ("CGSPN", "mmseg.CGSPN"):
            raise ValueError(
                f"EncoderTeacher: {origin}: expected dict(type='CGSPN', ...), got {dict(encoder)}"
            )
        model = MODELS.build(config)
        if checkpoint is not None:
            _fill(model, state_dict_of(content), str(checkpoint), prefix)
            require_same_function(model, stored, str(checkpoint), "EncoderTeacher's encoder")
        positions = model.pos_embed
        super().__init__(
            model,
            _ENCODER,
            mean or _stated(facts, "image_mean", IMAGENET_MEAN),
            std or _stated(facts, "image_std", IMAGENET_STD),
            name="CGSPN" if checkpoint is None else str(checkpoint),
            library="cgspn_seg",
            image_size=None
            if positions is None
            else tuple(n * model.patch_size for n in positions.shape[1:3]),
        )

    @torch.no_grad()
    def forward(self, image: Tensor, indices: Sequence[int] | None = None) -> list[BlockTaps]:
        """As every teacher's; the encoder gives its taps by itself."""
        self._grid(image)
        kept = self._resolve(indices)
        x, taps = self.model.embed(image.to(self.patch_kernel()[0].dtype)), {}
        for i in range(max(kept) + 1):
            added, output = self.model.run_block(i, x, taps="both")
            if i in kept:
                taps[i] = BlockTaps(x, added, output)
            x = output
        return [taps[i] for i in kept]


def _read(checkpoint: str) -> dict[str, Any]:
    if "://" not in checkpoint and not Path(checkpoint).expanduser().is_file():
        raise FileNotFoundError(
            f"EncoderTeacher: checkpoint: {checkpoint} does not exist; expected a teacher's "
            "encoder, which tools/export_backbone.py takes out of a training's checkpoint "
            "(docs/distillation.md). Say where it is: --cfg-options model.teacher.checkpoint=FILE"
        )
    return load_checkpoint(checkpoint)


def _stated(facts: Any, key: str, default: Sequence[float]) -> Sequence[float]:
    return json.loads(facts[key]) if isinstance(facts, Mapping) and key in facts else default


def _require_stored(
    stored: Mapping[str, Any] | None, checkpoint: str | Path | None
) -> Mapping[str, Any]:
    if stored is not None:
        return stored
    if checkpoint is None:
        raise ValueError(
            "EncoderTeacher: pass encoder, the config of a CGSPN, or checkpoint, a backbone file "
            "with a config inside, or both; got neither"
        )
    raise CheckpointError(
        f"EncoderTeacher: {checkpoint} has no encoder's config inside; expected a backbone file, "
        "which python tools/export_backbone.py CONFIG CHECKPOINT OUT makes out of a training's "
        "checkpoint. Make one, or pass the config: encoder=dict(type='CGSPN', ...)"
    )


def _fill(model: Any, weights: Mapping[str, Tensor], checkpoint: str, prefix: str) -> None:
    start = f"{prefix.rstrip('.')}." if prefix else ""
    chosen = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
    own = model.state_dict()
    found, number = find_prefix(own, weights)
    if number and not own.keys() & chosen.keys():
        raise CheckpointError(
            f"EncoderTeacher: no tensor of {checkpoint} is the encoder's "
            f"{f'under the prefix {start!r}' if start else 'without a prefix'}; {number} of "
            f"{len(own)} are under {found!r}. Set it: --cfg-options model.teacher.prefix={found}"
        )
    if not chosen:
        raise CheckpointError(
            f"{checkpoint}: no key begins with {start!r}; it begins with "
            f"{', '.join(list(weights)[:3])}. Set prefix"
        )
    require_complete(load_weights(model, chosen), checkpoint, for_prediction=False)
