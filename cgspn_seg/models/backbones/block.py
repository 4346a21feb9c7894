"""The pre-norm block of the plain encoder."""

from collections import OrderedDict
from collections.abc import Collection

from torch import Tensor, nn

from cgspn_seg.models.arch import Architecture
from cgspn_seg.ops.fused import add_norm, add_norm_mlp, mlp, perceive_norm, residual


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
    """

    def __init__(
        self,
        arch: Architecture,
        mixer: nn.Module,
        local_perception: Collection[str] = (),
        drop_path: float = 0.0,
        gelu: str = "tanh",
    ) -> None:
        super().__init__()
        dims, hidden = arch.embed_dims, arch.feedforward_channels
        self.mixer_lpu = LocalPerceptionUnit(dims) if "mixer" in local_perception else None
        self.norm1 = nn.LayerNorm(dims, eps=1e-6)
        self.mixer = mixer
        self.mlp_lpu = LocalPerceptionUnit(dims) if "mlp" in local_perception else None
        self.norm2 = nn.LayerNorm(dims, eps=1e-6)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dims, hidden), act=nn.GELU(gelu), fc2=nn.Linear(hidden, dims))
        )
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        if self.mixer_lpu is None:
            x, normed = add_norm(x, None, self.norm1)
        else:
            x, normed = perceive_norm(x, self.mixer_lpu.conv, self.norm1)
        y, scales = self.mixer(normed), (self._scale(x), self._scale(x))
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
