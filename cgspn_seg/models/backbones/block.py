"""The pre-norm block of the plain encoder."""

from collections import OrderedDict
from collections.abc import Collection

import torch
from torch import Tensor, nn

from cgspn_seg.models.arch import Architecture
from cgspn_seg.ops.fused import add_norm, add_norm_mlp, mlp, perceive_norm, uses_kernels


class LocalPerceptionUnit(nn.Module):
    """Parameters of a depthwise 3x3 convolution plus identity (LPU; GSPN-2, section on the block).

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
        x, normed = self._norm(x, None, self.mixer_lpu, self.norm1)
        y, norm = self.mixer(normed), self.norm2
        fc1, act, fc2 = self.mlp
        products = fc1.weight, fc1.bias, fc2.weight, fc2.bias
        if self._adds_in_place(x, y):
            return add_norm_mlp(x, y, (norm.weight, norm.bias, norm.eps), products, act.approximate)
        x, normed = self._norm(x, y, self.mlp_lpu, norm)
        y, scale = mlp(normed, *products, act.approximate), self._scale(x)
        return x + (y if scale is None else y * scale.view(-1, 1, 1, 1))

    def _adds_in_place(self, x: Tensor, y: Tensor) -> bool:
        """Whether nothing needs the second residual but the sum that replaces it."""
        keeps_all = not self.training or self.drop_path == 0
        inference = not torch.is_grad_enabled() and keeps_all
        return inference and self.mlp_lpu is None and x.dtype == y.dtype and uses_kernels(x)

    def _norm(
        self, x: Tensor, y: Tensor | None, lpu: LocalPerceptionUnit | None, norm: nn.LayerNorm
    ) -> tuple[Tensor, Tensor]:
        """Adds what the branch before left, perceives, and gives the next branch its input."""
        scale = None if y is None else self._scale(x)
        if lpu is None:
            return add_norm(x, y, norm.weight, norm.bias, norm.eps, scale)
        if y is not None:
            x = x + (y if scale is None else y * scale.view(-1, 1, 1, 1))
        return perceive_norm(x, lpu.conv.weight, lpu.conv.bias, norm.weight, norm.bias, norm.eps)

    def _scale(self, x: Tensor) -> Tensor | None:
        """Stochastic depth: a factor for each image that leaves the mean as it is; None for 1."""
        if not self.training or self.drop_path == 0:
            return None
        keep = 1 - self.drop_path
        return x.new_empty(len(x)).bernoulli_(keep).div_(keep)
