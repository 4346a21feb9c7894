"""The pre-norm block of the plain encoder."""

from collections import OrderedDict
from collections.abc import Collection

from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn

from cgspn_seg.models.arch import Architecture


class LocalPerceptionUnit(nn.Module):
    """Depthwise 3x3 convolution plus identity (LPU; GSPN-2, section on the block).

    Args:
        dims: channels.
    """

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dims, dims, 3, padding=1, groups=dims)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        # The permuted view is what PyTorch calls channels_last: no copy on the way in or out.
        return x + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Block(nn.Module):
    """``x += mixer(norm(x)); x += mlp(norm(x))``, each after a local perception unit where one is
    wanted.

    Args:
        arch: gives C and the MLP's hidden channels.
        mixer: the token mixer.
        local_perception: where the local perception units stand, out of "mixer" and "mlp".
        drop_path: probability that a branch is dropped for a sample.
    """

    def __init__(
        self,
        arch: Architecture,
        mixer: nn.Module,
        local_perception: Collection[str] = (),
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        dims, hidden = arch.embed_dims, arch.feedforward_channels
        self.mixer_lpu = LocalPerceptionUnit(dims) if "mixer" in local_perception else nn.Identity()
        self.norm1 = nn.LayerNorm(dims, eps=1e-6)
        self.mixer = mixer
        self.mlp_lpu = LocalPerceptionUnit(dims) if "mlp" in local_perception else nn.Identity()
        self.norm2 = nn.LayerNorm(dims, eps=1e-6)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dims, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, dims))
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        x = self.mixer_lpu(x)
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        x = self.mlp_lpu(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))
