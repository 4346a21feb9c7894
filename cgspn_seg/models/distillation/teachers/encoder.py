"""Our own encoder as a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmseg.registry import MODELS
from torch import Tensor

from cgspn_seg.checkpoints.fit import load_weights, require_complete, state_dict_of
from cgspn_seg.checkpoints.loading import CheckpointError, load_checkpoint
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
        encoder: the config of a CGSPN.
        checkpoint: its weights: a backbone file, or a checkpoint with a prefix; None for random
            ones.
        prefix: what stands before the encoder's names in the checkpoint, such as "backbone.".
        mean: of the images, in 0..255 units.
        std: likewise.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        CheckpointError: it is unreadable, or does not fit the encoder.
        ValueError: the config is not of a CGSPN.
    """

    def __init__(
        self,
        encoder: Mapping[str, Any],
        checkpoint: str | Path | None = None,
        prefix: str = "",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        config = {key: value for key, value in encoder.items() if key != "init_cfg"}
        if config.get("type") not in ("CGSPN", "mmseg.CGSPN"):
            raise ValueError(
                f"EncoderTeacher: encoder: expected dict(type='CGSPN', ...), got {dict(encoder)}"
            )
        model = MODELS.build(config)
        if checkpoint is not None:
            _fill(model, str(checkpoint), prefix)
        positions = model.pos_embed
        super().__init__(
            model,
            _ENCODER,
            mean,
            std,
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


def _fill(model: Any, checkpoint: str, prefix: str) -> None:
    if "://" not in checkpoint and not Path(checkpoint).expanduser().is_file():
        raise FileNotFoundError(
            f"EncoderTeacher: checkpoint: {checkpoint} does not exist; expected a teacher's "
            "encoder, which tools/export_backbone.py takes out of a training's checkpoint "
            "(docs/distillation.md). Say where it is: --cfg-options model.teacher.checkpoint=FILE"
        )
    weights = state_dict_of(load_checkpoint(checkpoint))
    start = f"{prefix.rstrip('.')}." if prefix else ""
    chosen = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
    if not chosen:
        raise CheckpointError(
            f"{checkpoint}: no key begins with {start!r}; it begins with "
            f"{', '.join(list(weights)[:3])}. Set prefix"
        )
    require_complete(load_weights(model, chosen), checkpoint, for_prediction=False)
