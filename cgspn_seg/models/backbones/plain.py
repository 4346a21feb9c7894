"""The plain encoder: patch embedding and N blocks, with any token mixer per layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmseg.models.utils import PatchEmbed
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from cgspn_seg.errors import require_positive_int
from cgspn_seg.models.arch import Architecture, resolve_architecture
from cgspn_seg.models.backbones.base import Encoder, drop_path_rates, refuse_unknown
from cgspn_seg.models.backbones.block import Block
from cgspn_seg.models.mixers import build_mixer, mixer_configs
from cgspn_seg.models.mixers.registry import MixerConfig

LOCAL_PERCEPTION_PLACES = ("mixer", "mlp")


@MODELS.register_module()
class CGSPN(Encoder):
    """ViT-shaped encoder whose mixers propagate instead of attending (C-GSPN).

    With ``mixer='attention'`` it is the isomorphic ViT, with a list of mixers a hybrid. There is no
    class token. A positional embedding, interpolated to the size of the input, is there only if a
    mixer needs one, as attention does.

    Args:
        arch: "tiny", "small", "base", "large", "so400m", or a dict with the fields of
            :class:`cgspn_seg.models.Architecture`.
        patch_size: side of a patch and stride of the features, pixels.
        in_channels: channels of the image.
        img_size: (height, width), or the side of a square, in pixels, of the images that the
            positional embedding's grid is made for.
        mixer: "cgspn", "cgspn-lean", "gspn", "gspn2", "attention", a dict of one of them with
            options, or a list with one per layer.
        local_perception: where blocks have a local perception unit, a subset of ("mixer", "mlp");
            None leaves it to each layer's mixer.
        out_indices: blocks whose outputs are returned, counted from 0; negative ones count from the
            end.
        out_norm: whether each output passes through a LayerNorm of its own.
        drop_path_rate: probability of dropping a branch in the last block; it grows linearly from 0
            in the first.
        gelu: the MLPs' GELU: "tanh", SigLIP's approximation, which GPUs have in the epilogue of a
            product; or "none", the exact one of ViT and DINO.
        norm_eps: what the blocks' norms add to the variance; a student takes its teacher's.
        with_cp: recompute blocks in the backward pass instead of keeping their activations.
        frozen_stages: -1 trains everything, 0 freezes the embedding, k also the first k blocks.
        init_cfg: MMEngine's initialization, for example ``dict(type='Pretrained',
            checkpoint=...)``.

    Raises:
        ValueError: an argument is out of range or unknown.
        TypeError: an argument or mixer option does not exist.
    """

    def __init__(
        self,
        arch: str | Mapping[str, int] | Architecture = "small",
        patch_size: int = 16,
        in_channels: int = 3,
        img_size: int | Sequence[int] = 512,
        mixer: MixerConfig | Sequence[MixerConfig] = "cgspn",
        local_perception: Sequence[str] | None = None,
        out_indices: Sequence[int] = (-1,),
        out_norm: bool = False,
        drop_path_rate: float = 0.0,
        gelu: str = "tanh",
        norm_eps: float = 1e-6,
        with_cp: bool = False,
        frozen_stages: int = -1,
        init_cfg: Mapping | Sequence[Mapping] | None = None,
        **unknown: Any,
    ) -> None:
        refuse_unknown(CGSPN, unknown)
        arch = resolve_architecture(arch)
        dims, depth = arch.embed_dims, arch.num_layers
        require_positive_int("patch_size", patch_size)
        super().__init__(
            depth,
            "layers",
            out_indices=out_indices,
            drop_path_rate=drop_path_rate,
            gelu=gelu,
            with_cp=with_cp,
            frozen_stages=frozen_stages,
            init_cfg=init_cfg,
        )
        self.arch = arch
        self.patch_size = patch_size
        places = () if local_perception is None else local_perception
        if isinstance(places, str) or not set(places) <= set(LOCAL_PERCEPTION_PLACES):
            raise ValueError(
                f"local_perception must be a subset of {LOCAL_PERCEPTION_PLACES}; got {places!r}"
            )

        self.patch_embed = PatchEmbed(in_channels, dims, kernel_size=patch_size, stride=patch_size)
        mixers = [build_mixer(config, self.arch) for config in mixer_configs(mixer, depth)]
        self.blocks = nn.ModuleList(
            Block(
                self.arch,
                m,
                m.local_perception if local_perception is None else local_perception,
                drop_path,
                gelu,
                norm_eps,
            )
            for m, drop_path in zip(mixers, drop_path_rates(drop_path_rate, depth), strict=True)
        )
        sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        grid = [max(side // patch_size, 1) for side in sides]
        needs_pos_embed = any(m.needs_pos_embed for m in mixers)
        self.pos_embed = nn.Parameter(torch.zeros(1, *grid, dims)) if needs_pos_embed else None
        self.out_norms = nn.ModuleList(
            nn.LayerNorm(dims, eps=1e-6) if out_norm else nn.Identity() for _ in self.out_indices
        )
        self._finish()
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels of each output."""
        return (self.arch.embed_dims,) * len(self.out_indices)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Features of (B, in_channels, H, W) images.

        H and W are at least one patch; sizes that are no multiple of it are padded with zeros at
        the bottom and right.

        Returns:
            One (B, C, ceil(H / patch_size), ceil(W / patch_size)) tensor per out index, in
            channels_last layout.
        """
        x = self.embed(image)
        outputs = {}
        for i in range(len(self.blocks)):
            x = self.run_block(i, x)
            if i in self.out_indices:
                norm = self.out_norms[self.out_indices.index(i)]
                outputs[i] = norm(x).permute(0, 3, 1, 2)
        return tuple(outputs[i] for i in self.out_indices)

    def embed(self, image: Tensor) -> Tensor:
        """The residual stream that enters the first block, (B, H, W, C), of an image as for
        :meth:`forward`."""
        if min(image.shape[-2:]) < self.patch_size:
            raise ValueError(
                f"images must be at least one patch, {self.patch_size} x {self.patch_size}; got "
                f"{image.shape[-2]} x {image.shape[-1]}. Resize them, or take a smaller patch_size"
            )
        tokens, (height, width) = self.patch_embed(image)
        # Under autocast the projection is half precision; the residual stream keeps the dtype of
        # the parameters.
        x = (
            tokens.to(self.patch_embed.projection.weight.dtype)
            .unflatten(1, (height, width))
            .contiguous()
        )
        if self.pos_embed is not None:
            x = x + resize_pos_embed(self.pos_embed, (height, width))
        return x

    def run_block(self, index: int, x: Tensor, **options: Any) -> Any:
        """Calls a block, with activation checkpointing where that is asked for and not frozen.

        Args:
            index: which one.
            x: (B, H, W, C).
            **options: see :meth:`cgspn_seg.models.backbones.block.Block.forward`.
        """
        return self._run(self.blocks[index], x, frozen=index < self.frozen_stages, **options)

    def _blocks(self) -> Sequence[nn.ModuleList]:
        return [self.blocks]

    def _layer_of(self, name: str) -> int | None:
        if name.startswith(("patch_embed.", "pos_embed")):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else None

    def _frozen_parts(self) -> Sequence[nn.Module | nn.Parameter]:
        embedding = [self.patch_embed] + [self.pos_embed] * (self.pos_embed is not None)
        return [*embedding, *self.blocks[: self.frozen_stages]]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        key = prefix + "pos_embed"
        if self.pos_embed is not None and key in state_dict and state_dict[key].ndim == 4:
            state_dict[key] = resize_pos_embed(state_dict[key], self.pos_embed.shape[1:3])
        super()._load_from_state_dict(state_dict, prefix, *args)


def resize_pos_embed(pos_embed: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolates a (1, h, w, C) positional embedding bicubically to ``size``, (1, H, W, C)."""
    if tuple(pos_embed.shape[1:3]) == tuple(size):
        return pos_embed
    grid = F.interpolate(
        pos_embed.permute(0, 3, 1, 2), size=tuple(size), mode="bicubic", align_corners=False
    )
    return grid.permute(0, 2, 3, 1)
