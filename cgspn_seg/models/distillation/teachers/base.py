"""What a distillation asks of a teacher, whatever library runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cgspn_seg.models.backbones.block import BlockTaps

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "BlockTaps", "Family", "Teacher", "find"]

# In 0..255 units, as in configs/_base_/models.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Family:
    """Where the parts of a pre-norm ViT are: dotted names, of the model or of each of its blocks.

    Attributes:
        patch_projection: the model's first product, a Conv2d as large as its stride.
        blocks: the model's list of blocks.
        prefix_tokens: parameters (1, n, C) of the model that stand before the patch tokens: class,
            distillation and register tokens. One that is None or not there counts as no token.
        branch: of a block, the module whose output is what attention adds to the stream.
        norm1: of a block, the norm before attention.
        norm2: of a block, the norm before the MLP.
        fc1: of a block, the MLP's first product.
        activation: of a block, the module between the MLP's products.
        fc2: of a block, the MLP's second product.
        qkv: of a block, query, key and value: one joint product, or three.
        proj: of a block, attention's output product.
        heads: of a block, the number of heads.
        attention_scale: of a block, the parameter (C,) of attention's layer scale, if it has one.
        mlp_scale: of a block, the parameter (C,) of the MLP's layer scale, if it has one.
        positions: the model's parameter of positional embeddings, if it has one.
        rotary: whether attention rotates queries and keys by their positions.
        other_model_parts: of the model, what it may have that a student's function has not.
        other_attention_parts: of a block, the same of its attention.
        other_mlp_parts: of a block, the same of its MLP.
    """

    patch_projection: str
    blocks: str
    branch: str
    norm1: str
    norm2: str
    fc1: str
    activation: str
    fc2: str
    qkv: tuple[str, ...]
    proj: str
    heads: str
    prefix_tokens: tuple[str, ...] = ()
    attention_scale: str | None = None
    mlp_scale: str | None = None
    positions: str | None = None
    rotary: bool = False
    other_model_parts: tuple[str, ...] = ()
    other_attention_parts: tuple[str, ...] = ()
    other_mlp_parts: tuple[str, ...] = ()


class Teacher(nn.Module):
    """A frozen ViT, of which a distillation reads every block.

    It never trains: it has no gradients, and `train()` leaves it in evaluation mode. Its own
    library computes; forward hooks read the taps.

    Args:
        model: the library's model.
        family: where its parts are.
        mean: of its images, per channel, in 0..255 units as MMSegmentation's data_preprocessor.
        std: likewise.
        name: of the model, for messages.
        library: what runs the model, with its version, for messages.
        image_size: (height, width), pixels, that its positional embeddings are made for; None where
            there is no such size.

    Attributes:
        embed_dims: C.
        num_layers: number of blocks.
        patch_size: side of a patch, pixels.
        in_channels: channels of an image.

    Raises:
        ValueError: the model is not built as the family says, or mean and std do not fit it.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        name: str,
        library: str,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.family = model, family
        self.name, self.library, self.image_size = name, library, image_size
        blocks = self.find(family.blocks)
        named = (family.blocks, family.patch_projection)
        missing = [part for part in named if self.find(part) is None]
        if not missing:
            named = (family.branch, family.norm1, family.norm2)
            missing = [part for part in named if find(blocks[0], part) is None]
        if missing:
            raise ValueError(
                f"{name}: {type(model).__name__} of {library} has no {missing[0]!r} where a "
                "pre-norm ViT of its family has it; use one of the models and versions in "
                "docs/teachers.md"
            )
        kernel, _ = self.patch_kernel()
        self.embed_dims, self.in_channels, height, width = kernel.shape
        if height != width:
            raise ValueError(f"{name}: expected square patches, got {height} x {width} pixels")
        self.patch_size, self.num_layers = height, len(blocks)
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        for option, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.in_channels:
                raise ValueError(
                    f"{name}: {option}: expected a value for each of {self.in_channels} channels, "
                    f"got {list(values)}"
                )
        tokens = [self.find(part) for part in family.prefix_tokens]
        self.num_prefix_tokens = sum(0 if t is None else t.shape[1] for t in tokens)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode, whatever is asked for."""
        return super().train(False)

    def find(self, part: str | None, block: int | None = None) -> Any:
        """The part of that name, of the model or of one of its blocks; None if it is not there."""
        root = self.model if block is None else self.find(self.family.blocks)[block]
        return find(root, part)

    def patch_kernel(self) -> tuple[Tensor, Tensor | None]:
        """The patch embedding's weight, (C, in_channels, patch_size, patch_size), and bias, (C,).

        Raises:
            ValueError: patches overlap, or have gaps.
        """
        conv = self.find(self.family.patch_projection)
        if tuple(conv.stride) != tuple(conv.kernel_size):
            raise ValueError(
                f"{self.name}: expected patches side by side, got patches of {conv.kernel_size} "
                f"pixels every {conv.stride}"
            )
        return conv.weight, conv.bias

    @torch.no_grad()
    def forward(self, image: Tensor, indices: Sequence[int] | None = None) -> list[BlockTaps]:
        """Runs the teacher and reads its blocks.

        Args:
            image: (B, in_channels, H, W), normalized with the teacher's own mean and std; H and W
                are multiples of the patch size. It is converted to the dtype of the weights.
            indices: the blocks to read, counted from 0, or from the end where negative; None for
                all. What comes after the last of them is not computed.

        Returns:
            The taps of these blocks, in this order.

        Raises:
            ValueError: the image's shape or an index does not fit.
        """
        grid, kept = self._grid(image), self._resolve(indices)
        recorded: dict[int, dict[str, Tensor]] = {i: {} for i in kept}
        blocks = self.find(self.family.blocks)
        with ExitStack() as stack:
            for i, taps in recorded.items():
                for hook in _hooks(blocks[i], find(blocks[i], self.family.branch), taps):
                    stack.callback(hook.remove)
            stack.enter_context(self._only_first_blocks(max(kept) + 1))
            self._run(image.to(self.patch_kernel()[0].dtype))
        return [BlockTaps(**self._patch_tokens(i, recorded[i], grid)) for i in kept]

    @torch.no_grad()
    def position_grid(self, grid: tuple[int, int]) -> Tensor:
        """What the teacher adds to the embeddings of a grid of patches for their positions.

        This is its own interpolation, read as the embedding of an image of zeros without the
        projection's bias; zeros if it has no such embedding.

        Args:
            grid: number of rows and columns of patches.

        Returns:
            (1, *grid, C).
        """
        weight, bias = self.patch_kernel()
        image = weight.new_zeros(1, self.in_channels, *(n * self.patch_size for n in grid))
        embedded = self(image, [0])[0].input
        return embedded if bias is None else embedded - bias

    def _run(self, image: Tensor) -> None:
        """Computes the model up to its last block."""
        self.model(image)

    def _patch_tokens(
        self, index: int, recorded: dict[str, Tensor], grid: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Taps (B, tokens, C) without the prefix tokens, as (B, H, W, C)."""
        tokens, expected = recorded["input"].shape[1], self.num_prefix_tokens + grid[0] * grid[1]
        if tokens != expected:
            raise ValueError(
                f"{self.name}: expected {expected} tokens ({self.num_prefix_tokens} before "
                f"{grid[0]} x {grid[1]} patches) in block {index}, got {tokens}"
            )
        return {
            tap: value[:, self.num_prefix_tokens :].unflatten(1, grid)
            for tap, value in recorded.items()
        }

    def _grid(self, image: Tensor) -> tuple[int, int]:
        side = self.patch_size
        if image.ndim != 4 or image.shape[1] != self.in_channels:
            raise ValueError(
                f"image: expected (B, {self.in_channels}, H, W) for {self.name}, got "
                f"{tuple(image.shape)}"
            )
        height, width = image.shape[-2:]
        if height % side or width % side or not height or not width:
            near = [max(round(n / side), 1) * side for n in (height, width)]
            raise ValueError(
                f"image: {self.name} takes heights and widths that are multiples of its patch "
                f"size, {side}; got {height} x {width}. Resize or crop to {near[0]} x {near[1]}"
            )
        return height // side, width // side

    def _resolve(self, indices: Sequence[int] | None) -> list[int]:
        count = self.num_layers
        if indices is None:
            return list(range(count))
        if not indices or not all(-count <= i < count for i in indices):
            raise ValueError(
                f"indices: expected blocks between {-count} and {count - 1} for the {count} blocks "
                f"of {self.name}, got {list(indices)}"
            )
        return [i % count for i in indices]

    @contextmanager
    def _only_first_blocks(self, number: int) -> Iterator[None]:
        owner, _, attribute = self.family.blocks.rpartition(".")
        owner = self.model.get_submodule(owner)
        blocks = getattr(owner, attribute)
        setattr(owner, attribute, blocks[:number])
        try:
            yield
        finally:
            setattr(owner, attribute, blocks)


def find(root: Any, part: str | None) -> Any:
    """The attribute of a dotted name, or None if it is not there, or no name is given."""
    for name in part.split(".") if part else ():
        root = getattr(root, name, None)
    return root if part else None


def _hooks(block: nn.Module, branch: nn.Module, taps: dict[str, Tensor]) -> list[Any]:
    """Hooks that put what a block takes, adds and gives into `taps`."""

    def enters(_: nn.Module, args: tuple, kwargs: dict) -> None:
        taps["input"] = args[0] if args else kwargs["hidden_states"]

    def leaves(tap: str) -> Any:
        def record(_: nn.Module, __: tuple, output: Any) -> None:
            # Attention modules of transformers give their weights too.
            taps[tap] = output[0] if isinstance(output, tuple) else output

        return record

    return [
        block.register_forward_pre_hook(enters, with_kwargs=True),
        branch.register_forward_hook(leaves("mixer")),
        block.register_forward_hook(leaves("output")),
    ]
