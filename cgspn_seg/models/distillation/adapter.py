"""The light MLP between a student's tap and what it is compared with."""

from torch import Tensor, nn
from torch.nn import functional as F


class Adapter(nn.Module):
    """``x + W_2 GELU(W_1 x)`` with a narrow hidden layer; the identity at first.

    C-GSPN, distillation: adapters before the taps always help; they are dropped at export.

    Args:
        dims: C.
        hidden_dims: channels of the hidden layer.
    """

    def __init__(self, dims: int, hidden_dims: int) -> None:
        super().__init__()
        self.down = nn.Linear(dims, hidden_dims)
        self.up = nn.Linear(hidden_dims, dims)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        return x + self.up(F.gelu(self.down(x)))
