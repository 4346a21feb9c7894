"""The pre-norm block of the plain encoder."""

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from cgspn_seg.models.arch import Architecture
from cgspn_seg.ops.fused import add_norm, add_norm_mlp, mlp, perceive_norm, residual


@dataclass(frozen=True)
class BlockTaps:
    """What distillation compares in a block; all (B, H, W, C), patch tokens alone.

    Attributes:
        input: the residual stream that enters the block.
        mixer: what its first half adds to the stream: the token mixer's output, layer scale and
            all, and that of a local perception unit before it.
        output: the stream that leaves the block.
    """

    input: Tensor
    mixer: Tensor
    output: Tensor


class LocalPerceptionUnit(nn.Module):
    """Depthwise 3x3 convolution plus identity (LPU; GSPN-2, section on the block).

    It is computed together with the norm after it, by :func:`cgspn_seg.ops.fused.perceive_norm`.

    Args:
        dims: channels.
    """

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dims, dims, 3, padding=1, groups=dims)


class Block(nn.Module):
    """``x += mixer(norm(x)); x += mlp(norm(x))``, each after a local perception unit where one is
    wanted.

    Args:
        arch: gives C and the MLP's hidden channels.
        mixer: the token mixer.
        local_perception: where the local perception units stand, out of "mixer" and "mlp".
        drop_path: probability that a branch is dropped for an image, in training.
        gelu: the MLP's GELU, "tanh" for its approximation by that function, or "none".
        norm_eps: what both norms add to the variance.
    """

    def __init__(
        self,
        arch: Architecture,
        mixer: nn.Module,
        local_perception: Collection[str] = (),
        drop_path: float = 0.0,
        gelu: str = "tanh",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        dims, hidden = arch.embed_dims, arch.feedforward_channels
        self.mixer_lpu = LocalPerceptionUnit(dims) if "mixer" in local_perception else None
        self.norm1 = nn.LayerNorm(dims, eps=norm_eps)
        self.mixer = mixer
        self.mlp_lpu = LocalPerceptionUnit(dims) if "mlp" in local_perception else None
        self.norm2 = nn.LayerNorm(dims, eps=norm_eps)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dims, hidden), act=nn.GELU(gelu), fc2=nn.Linear(hidden, dims))
        )
        self.drop_path = drop_path

    def forward(
        self, x: Tensor, taps: Literal["mixer", "both"] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Computes the block.

        Args:
            x: (B, H, W, C), the residual stream.
            taps: what to return for distillation. "mixer" ends after the first half.

        Returns:
            The stream after the block, (B, H, W, C). With taps="mixer" what the first half adds to
            the stream: the mixer's output, and the local perception unit's. With taps="both" the
            two, the first half's first.
        """
        if self.mixer_lpu is None:
            z, normed = add_norm(x, None, self.norm1)
        else:
            z, normed = perceive_norm(x, self.mixer_lpu.conv, self.norm1)
        y = self.mixer(normed)
        if taps is None:
            return self._feed_forward(z, y)
        added = y if self.mixer_lpu is None else z - x + y
        return added if taps == "mixer" else (added, self._feed_forward(z, y))

    def _feed_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The second half of the block, of a stream to which y is yet to be added."""
        scales = self._scale(x), self._scale(x)
        if self.mlp_lpu is None:
            return add_norm_mlp(x, y, self.norm2, tuple(self.mlp), scales)
        x, normed = perceive_norm(residual(x, y, scales[0]), self.mlp_lpu.conv, self.norm2)
        return residual(x, mlp(normed, *self.mlp), scales[1])

    def _scale(self, x: Tensor) -> Tensor | None:
        """Stochastic depth: a factor for each image that leaves the mean as it is; None for 1."""
        if not self.training or self.drop_path == 0:
            return None
        keep = 1 - self.drop_path
        return x.new_empty(len(x)).bernoulli_(keep).div_(keep)
