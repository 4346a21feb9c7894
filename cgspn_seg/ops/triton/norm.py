"""A residual and the LayerNorm after it, in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from cgspn_seg.ops.triton.common import (
    compute_type,
    on_device_of,
    partial_sums,
    programs,
    standardize,
    standardize_backward,
    store_affine,
    tile,
)


@triton.jit
def _add_norm_kernel(
    x, y, scale, weight, bias, offset, total, normed, rows, tokens, channels, eps,
    HAS_Y: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_OFFSET: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    known = channel < channels
    inside = (row < rows) & known
    at = row * channels + channel
    value = tl.load(x + at, inside, other=0).to(COMPUTE)
    if HAS_Y:
        term = tl.load(y + at, inside, other=0).to(COMPUTE)
        if HAS_SCALE:
            term *= tl.load(scale + row // tokens, row < rows, other=0).to(COMPUTE)
        value += term
        stored = value
        if HAS_OFFSET:
            stored += tl.load(offset + channel, known, other=0).to(COMPUTE)
        stored = stored.to(total.dtype.element_ty)
        tl.store(total + at, stored, inside)
        if not HAS_OFFSET:
            value = stored.to(COMPUTE)  # backward has no other
    standardized, _ = standardize(value, inside, channels, eps)
    w = tl.load(weight + channel, known, other=0).to(COMPUTE)
    b = tl.load(bias + channel, known, other=0).to(COMPUTE)
    tl.store(normed + at, standardized * w + b, inside)


@triton.jit
def _add_norm_backward_kernel(
    grad_normed, grad_total, total, scale, weight, grad_x, grad_y, grad_affine,
    rows, tokens, channels, eps,
    HAS_Y: tl.constexpr, HAS_SCALE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, BLOCK)[None, :]
    known = channel < channels
    w = tl.load(weight + channel, known, other=0).to(COMPUTE)
    grad_w = tl.zeros((ROWS, BLOCK), COMPUTE)
    grad_b = tl.zeros((ROWS, BLOCK), COMPUTE)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for begin in range(first, rows, tl.num_programs(0) * ROWS):
        row = begin + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & known
        at = row * channels + channel
        value = tl.load(total + at, inside, other=0).to(COMPUTE)
        standardized, rstd = standardize(value, inside, channels, eps)
        grad = tl.load(grad_normed + at, inside, other=0).to(COMPUTE)
        grad_w += grad * standardized
        grad_b += grad
        result = standardize_backward(grad * w, standardized, rstd, channels)
        result += tl.load(grad_total + at, inside, other=0).to(COMPUTE)
        tl.store(grad_x + at, result, inside)
        if HAS_Y:
            if HAS_SCALE:
                result *= tl.load(scale + row // tokens, row < rows, other=0).to(COMPUTE)
            tl.store(grad_y + at, result, inside)
    store_affine(grad_affine, grad_w, grad_b, channels, channel, known)


def add_norm_forward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x + scale y (x itself without a y), and its LayerNorm in `dtype`; all (B, ..., C), dense.

    With a y, the sum can have an offset that the norm has not seen.
    """
    channels = x.shape[-1]
    rows = x.numel() // channels
    total = x if y is None else torch.empty_like(x)
    normed = torch.empty_like(x, dtype=dtype)
    cut = tile(channels)
    with on_device_of(x):
        _add_norm_kernel[(triton.cdiv(rows, cut["ROWS"]),)](
            x, y, scale, weight, bias, offset, total, normed,
            rows, rows // x.shape[0], channels, eps,
            HAS_Y=y is not None, HAS_SCALE=scale is not None, HAS_OFFSET=offset is not None,
            COMPUTE=compute_type(x), **cut,
        )  # fmt: skip
    return total, normed


def add_norm_backward(
    grad_normed: Tensor,
    grad_total: Tensor,
    total: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    eps: float,
    y_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of x, of y if it has a dtype, of weight and of bias."""
    channels = total.shape[-1]
    rows = total.numel() // channels
    grad_x = torch.empty_like(total)
    grad_y = None if y_dtype is None else torch.empty_like(total, dtype=y_dtype)
    if scale is None and y_dtype == total.dtype:
        grad_y = grad_x
    cut = tile(channels)
    count = programs(rows, cut["ROWS"], total.device)
    grad_affine = partial_sums(total, count, 2 * channels)
    with on_device_of(total):
        _add_norm_backward_kernel[(count,)](
            grad_normed, grad_total, total, scale, weight, grad_x, grad_y, grad_affine,
            rows, rows // total.shape[0], channels, eps,
            HAS_Y=grad_y is not None and grad_y is not grad_x, HAS_SCALE=scale is not None,
            COMPUTE=compute_type(total), **cut,
        )  # fmt: skip
    grad_weight, grad_bias = grad_affine.sum(0).to(weight.dtype).chunk(2)
    return grad_x, grad_y, grad_weight, grad_bias


class AddNorm(torch.autograd.Function):
    """Saves the sum alone; the norm is computed again."""

    @staticmethod
    def forward(ctx, x, y, scale, weight, bias, eps, dtype):
        total, normed = add_norm_forward(x, y, scale, weight, bias, eps, dtype)
        ctx.save_for_backward(total, scale, weight)
        ctx.eps, ctx.y_dtype = eps, None if y is None else y.dtype
        return (x.view_as(x) if y is None else total), normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, grad_normed):
        total, scale, weight = ctx.saved_tensors
        grad_x, grad_y, grad_weight, grad_bias = add_norm_backward(
            grad_normed.contiguous(),
            grad_total.contiguous(),
            total,
            scale,
            weight,
            ctx.eps,
            ctx.y_dtype,
        )
        return grad_x, grad_y, None, grad_weight, grad_bias, None, None
