"""How kernels that treat every number alike go over a matrix."""

import triton
import triton.language as tl
from torch import Tensor

from cgspn_seg.ops.triton.common import compute_type, on_device_of

TILE = dict(ROWS=4, BLOCK=256)


@triton.jit
def row_tile(rows, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The rows and channels of this program, and which of them exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, channel, (row < rows) & (channel < channels)


def launch_over(
    kernel: triton.JITFunction, x: Tensor, *others: Tensor | int, **options: bool
) -> None:
    """Runs an elementwise kernel over x, dense (N, C)."""
    rows, channels = x.shape
    grid = (triton.cdiv(rows, TILE["ROWS"]), triton.cdiv(channels, TILE["BLOCK"]))
    with on_device_of(x):
        kernel[grid](x, *others, rows, channels, COMPUTE=compute_type(x), **TILE, **options)
