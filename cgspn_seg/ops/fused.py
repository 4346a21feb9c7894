"""The passes over memory between the matrix products of a block, each of them in one piece.

Every function here is a few lines of PyTorch, and on a GPU with Triton a kernel that computes the
same, with its derivative: it reads each input once, writes each output once, and keeps less for the
backward pass, which computes cheap things again. The environment variable
CGSPN_FUSED_KERNELS=0, or :func:`fused_kernels`, switches the kernels off.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

_enabled = os.environ.get("CGSPN_FUSED_KERNELS", "1") != "0"


@contextmanager
def fused_kernels(enabled: bool) -> Iterator[None]:
    """Within, the functions of this module use their kernels where they can, or never."""
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


@cache
def has_triton() -> bool:
    """Whether the kernels' compiler is installed, as with every build of PyTorch for CUDA."""
    return find_spec("triton") is not None


def uses_kernels(x: Tensor) -> bool:
    """Whether the functions of this module take their kernels for a tensor.

    Under torch.compile they do not: it fuses by itself what it sees.
    """
    if torch.compiler.is_compiling():
        return False
    return _enabled and x.is_cuda and x.numel() > 0 and has_triton()


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products take x in: autocast's where it is on."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def add_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A residual and the LayerNorm of the next branch: (x + scale y, LayerNorm(x + scale y)).

    Args:
        x: (B, H, W, C), the residual stream.
        y: (B, H, W, C), what a branch adds, of x's dtype or autocast's; None for nothing.
        weight: (C,), the norm's.
        bias: (C,), the norm's.
        eps: added to the variance.
        scale: (B,), a factor for each image, as stochastic depth has it; None for 1.

    Returns:
        The sum, in the dtype of x, and its norm, in that of matrix products.
    """
    if uses_kernels(x):
        from cgspn_seg.ops.triton.norm import AddNorm

        y = None if y is None else y.contiguous()
        return AddNorm.apply(x.contiguous(), y, scale, weight, bias, eps, product_dtype(x))
    if y is not None:
        x = x + (y if scale is None else y * scale.view(-1, 1, 1, 1))
    return x, F.layer_norm(x, weight.shape, weight, bias, eps)


def perceive_norm(
    x: Tensor, conv_weight: Tensor, conv_bias: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """A local perception unit (GSPN-2) and the LayerNorm after it.

    Args:
        x: (B, H, W, C), the residual stream.
        conv_weight: (C, 1, 3, 3), depthwise.
        conv_bias: (C,).
        weight: (C,), the norm's.
        bias: (C,), the norm's.
        eps: added to the variance.

    Returns:
        x + conv(x) in the dtype of x, and its norm, in that of matrix products.
    """
    if uses_kernels(x):
        from cgspn_seg.ops.triton.local_perception import PerceiveNorm

        return PerceiveNorm.apply(
            x.contiguous(), conv_weight, conv_bias, weight, bias, eps, product_dtype(x)
        )
    # The permuted view is what PyTorch calls channels_last: no copy on the way in or out.
    y = F.conv2d(x.permute(0, 3, 1, 2), conv_weight, conv_bias, padding=1, groups=x.shape[-1])
    x = x + y.permute(0, 2, 3, 1)
    return x, F.layer_norm(x, weight.shape, weight, bias, eps)


def merge_directions(
    h: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> Tensor:
    """Σ_d gate_d ⊙ LayerNorm(h_d), the output gate and merge of C-GSPN's scans.

    Args:
        h: (B, H, W, D, C), states of D directions.
        gate: (B, H, W, D, C), u; may be a slice of a joint projection.
        weight: (C,), the norm's; None for no norm.
        bias: (C,), likewise.
        eps: added to the variance.

    Returns:
        (B, H, W, C).
    """
    if uses_kernels(h):
        from cgspn_seg.ops.triton.merge import MergeDirections

        return MergeDirections.apply(h.contiguous(), _with_dense_tokens(gate), weight, bias, eps)
    if weight is not None:
        h = F.layer_norm(h, weight.shape, weight, bias, eps)
    return (gate * h).sum(dim=3)


def gated_projection(
    x: Tensor, gate: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:
    """P2 (P1 x ⊙ SiLU(gate)) of (B, H, W, C_c) and (B, H, W, C), with biases.

    Args:
        x: (B, H, W, C_c).
        gate: (B, H, W, C); may be a slice of a joint projection.
        weight1: (C, C_c).
        bias1: (C,).
        weight2: (C, C).
        bias2: (C,).

    Returns:
        (B, H, W, C).
    """
    if uses_kernels(x):
        from cgspn_seg.ops.triton.activation import GatedProjection

        rows = _with_dense_tokens(gate).flatten(0, -2)
        y = GatedProjection.apply(
            x.flatten(0, -2), rows, weight1, bias1, weight2, bias2, product_dtype(x)
        )
        return y.view(gate.shape)
    return F.linear(F.linear(x, weight1, bias1) * F.silu(gate), weight2, bias2)


def mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, approximate: str
) -> Tensor:
    """P2 GELU(P1 x), with biases.

    Args:
        x: (B, H, W, C).
        weight1: (hidden, C).
        bias1: (hidden,).
        weight2: (C, hidden).
        bias2: (C,).
        approximate: "none" or "tanh", as PyTorch's GELU has it.

    Returns:
        (B, H, W, C).
    """
    if uses_kernels(x):
        from cgspn_seg.ops.triton.activation import MLP

        options = approximate == "tanh", product_dtype(x)
        return MLP.apply(x.flatten(0, -2), weight1, bias1, weight2, bias2, *options).view(x.shape)
    hidden = F.gelu(F.linear(x, weight1, bias1), approximate=approximate)
    return F.linear(hidden, weight2, bias2)


def add_norm_mlp(
    x: Tensor,
    y: Tensor,
    norm: tuple[Tensor, Tensor, float],
    products: tuple[Tensor, Tensor, Tensor, Tensor],
    approximate: str,
) -> Tensor:
    """The second half of a block in inference: z + MLP(LayerNorm(z)) with z = x + y.

    The last product adds to z where it lies, instead of a pass that would add its result; its bias
    is in z already. Only where :func:`uses_kernels` says so, and without gradients.

    Args:
        x: (B, H, W, C), of the dtype of matrix products.
        y: likewise.
        norm: the norm's weight, bias and eps.
        products: weight and bias of the two products, as :func:`mlp` takes them.
        approximate: likewise.

    Returns:
        (B, H, W, C).
    """
    from cgspn_seg.ops.triton.activation import gelu_projection
    from cgspn_seg.ops.triton.norm import add_norm_forward

    weight1, bias1, weight2, bias2 = products
    z, normed = add_norm_forward(x.contiguous(), y.contiguous(), None, *norm, x.dtype, offset=bias2)
    hidden = gelu_projection(normed.flatten(0, -2), weight1, bias1, approximate == "tanh")
    z.flatten(0, -2).addmm_(hidden, weight2.t())
    return z


def _with_dense_tokens(x: Tensor) -> Tensor:
    """x itself if a token's numbers are dense and tokens equally far apart, else a copy."""
    dense = x[0, 0, 0].is_contiguous()
    column, row, image = x.stride(2), x.stride(1), x.stride(0)
    evenly = row == column * x.shape[2] and image == row * x.shape[1]
    return x if dense and evenly else x.contiguous()
