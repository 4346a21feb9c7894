"""Encoders of four stages: GSPN and GSPN-2."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from mmseg.registry import MODELS
from torch import Tensor, nn

from cgspn_seg.errors import require_positive_int
from cgspn_seg.models.arch import (
    GSPN2_ARCHITECTURES,
    GSPN_ARCHITECTURES,
    HierarchicalArchitecture,
    resolve_architecture,
)
from cgspn_seg.models.backbones.base import Encoder, drop_path_rates, refuse_unknown
from cgspn_seg.models.backbones.block import Block
from cgspn_seg.models.mixers import build_mixer

GLOBAL_BLOCKS = 7
"""In a global stage, so many blocks at its start and every so-many-th are global (GSPN)."""

NORM_EPS = 1e-5
"""Of all norms on the residual stream, as in GSPN's code."""


class Downsampling(nn.Module):
    """3x3 convolution of stride 2 and LayerNorm, from (B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, C').

    Args:
        in_dims: C.
        dims: C'.
    """

    def __init__(self, in_dims: int, dims: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dims, dims, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dims, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        # The permuted view is what PyTorch calls channels_last: no copy on the way in or out.
        y = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        # Under autocast the convolution is half precision; the residual stream, which begins with
        # the norm, keeps the dtype of the parameters.
        return self.norm(y.to(self.norm.weight.dtype))


class HierarchicalEncoder(Encoder):
    """Four stages at strides of 4, 8, 16 and 32, between which 3x3 convolutions halve the image.

    The stem is two 3x3 convolutions of stride 2, each with a norm, and a GELU between them; images
    of any size go in. In the arch's global stages, the first seven blocks and every seventh scan
    the whole image, whatever its size; all others are local: their states restart every
    ``segment_length`` lines. Subclasses name a mixer and its sizes.

    Args:
        arch: "tiny", "small", "base", or a dict with the fields of
            :class:`cgspn_seg.models.HierarchicalArchitecture`.
        in_channels: channels of the image.
        segment_length: lines after which the states of local blocks restart.
        mixer_options: options of the mixer, for all blocks.
        out_indices: stages whose outputs are returned, counted from 0; negative ones count from the
            end.
        out_norm: whether each output passes through a LayerNorm of its own, as in Swin and
            ConvNeXt.
        drop_path_rate: probability of dropping a branch in the last block; it grows linearly from 0
            in the first.
        gelu: the MLPs' GELU: "none", the exact one, or "tanh", its approximation, which GPUs have
            in the epilogue of a product.
        with_cp: recompute blocks in the backward pass instead of keeping their activations.
        frozen_stages: -1 trains everything, 0 freezes the stem, k also the first k stages.
        init_cfg: MMEngine's initialization, for example ``dict(type='Pretrained',
            checkpoint=...)``.

    Raises:
        ValueError: an argument is out of range or unknown.
        TypeError: an argument or mixer option does not exist.
    """

    architectures: Mapping[str, HierarchicalArchitecture]
    mixer: str
    mixer_key = "mixer_options"

    def __init__(
        self,
        arch: str | Mapping[str, object] | HierarchicalArchitecture = "tiny",
        in_channels: int = 3,
        segment_length: int = 2,
        mixer_options: Mapping[str, Any] | None = None,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        out_norm: bool = True,
        drop_path_rate: float = 0.0,
        gelu: str = "none",
        with_cp: bool = False,
        frozen_stages: int = -1,
        init_cfg: Mapping | Sequence[Mapping] | None = None,
        **unknown: Any,
    ) -> None:
        refuse_unknown(type(self), unknown)
        super().__init__(
            4,
            "stages",
            out_indices=out_indices,
            drop_path_rate=drop_path_rate,
            gelu=gelu,
            with_cp=with_cp,
            frozen_stages=frozen_stages,
            init_cfg=init_cfg,
        )
        require_positive_int("segment_length", segment_length)
        options = dict(mixer_options or {})
        if "segment_length" in options:
            raise ValueError(
                "mixer_options must leave segment_length to the encoder's own argument of that "
                "name, and to the arch's global_stages"
            )
        if "type" in options:
            raise ValueError(
                f"mixer_options must not have a type: {type(self).__name__}'s mixer is "
                f"{self.mixer!r}; got {options['type']!r}"
            )
        self.arch = resolve_architecture(arch, self.architectures)
        stages = [self.arch.stage(i) for i in range(4)]
        dims = [stage.embed_dims for stage in stages]
        stem = nn.Sequential(
            OrderedDict(
                first=Downsampling(in_channels, dims[0] // 2),
                act=nn.GELU(),
                second=Downsampling(dims[0] // 2, dims[0]),
            )
        )
        self.downsamplings = nn.ModuleList(
            [stem, *(Downsampling(dims[i - 1], dims[i]) for i in range(1, 4))]
        )
        rates = iter(drop_path_rates(drop_path_rate, sum(self.arch.depths)))
        self.stages = nn.ModuleList()
        for i, stage in enumerate(stages):
            blocks = nn.ModuleList()
            for k in range(stage.num_layers):
                local = i not in self.arch.global_stages or not _is_global(k)
                mixer = build_mixer(
                    dict(
                        options, type=self.mixer, segment_length=segment_length if local else None
                    ),
                    stage,
                )
                blocks.append(
                    Block(stage, mixer, mixer.local_perception, next(rates), gelu, NORM_EPS)
                )
            self.stages.append(blocks)
        self.out_norms = nn.ModuleList(
            nn.LayerNorm(dims[i], eps=NORM_EPS) if out_norm else nn.Identity()
            for i in self.out_indices
        )
        for blocks in self.stages:
            for block in blocks:
                for layer in (block.mlp.fc1, block.mlp.fc2):
                    nn.init.zeros_(layer.bias)  # as in GSPN's code
        self._finish()

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels of each output."""
        return tuple(self.arch.stage(i).embed_dims for i in self.out_indices)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Features of (B, in_channels, H, W) images of any size.

        Returns:
            For each out index i, a (B, C 2^i, ⌈H / 2^(i+2)⌉, ⌈W / 2^(i+2)⌉) tensor in
            channels_last layout.
        """
        x = image.permute(0, 2, 3, 1)
        outputs = {}
        for i, (downsampling, blocks) in enumerate(
            zip(self.downsamplings, self.stages, strict=True)
        ):
            x = downsampling(x)
            for block in blocks:
                x = self._run(block, x, frozen=i < self.frozen_stages)
            if i in self.out_indices:
                norm = self.out_norms[self.out_indices.index(i)]
                outputs[i] = norm(x).permute(0, 3, 1, 2)
        return tuple(outputs[i] for i in self.out_indices)

    def function_options(self) -> dict[str, dict[str, Any]]:
        """As every encoder's; `segment_length` is the encoder's own, of its local blocks, and which
        blocks those are depends on the architecture's `global_stages`."""
        options = super().function_options()
        lengths = options.pop(f"{self.mixer_key}['segment_length']", {})
        options["segment_length"] = {k: v for k, v in lengths.items() if v is not None}
        options["arch['global_stages']"] = dict.fromkeys(
            lengths, tuple(sorted(self.arch.global_stages))
        )
        return options

    def _blocks(self) -> Sequence[nn.ModuleList]:
        return list(self.stages)

    def _layer_of(self, name: str) -> int | None:
        part, stage, *rest = name.split(".")
        if part not in ("downsamplings", "stages"):
            return None
        before = sum(self.arch.depths[: int(stage)])
        if part == "stages":
            return before + int(rest[0]) + 1
        # What leads to a stage is as deep as its first block; the stem is the embedding.
        return before + 1 if int(stage) else 0

    def _frozen_parts(self) -> Sequence[nn.Module]:
        count = self.frozen_stages
        return [*self.downsamplings[: max(count, 1)], *self.stages[:count]]


def _is_global(block: int) -> bool:
    return block < GLOBAL_BLOCKS or (block + 1) % GLOBAL_BLOCKS == 0


@MODELS.register_module()
class GSPN(HierarchicalEncoder):
    """GSPN (its section on the architecture): the mixer "gspn" in four stages; the arguments
    are those of :class:`HierarchicalEncoder`."""

    architectures = GSPN_ARCHITECTURES
    mixer = "gspn"


@MODELS.register_module()
class GSPN2(HierarchicalEncoder):
    """GSPN-2 (its section on the model): the mixer "gspn2" in four stages; the arguments are
    those of :class:`HierarchicalEncoder`."""

    architectures = GSPN2_ARCHITECTURES
    mixer = "gspn2"
