"""The MLP: GELU after the first product's bias, and the two products."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from cgspn_seg.ops.triton.common import HALF, sigmoid, weight_gradient
from cgspn_seg.ops.triton.elementwise import launch_over, row_tile


@triton.jit
def _gelu(x, TANH: tl.constexpr):
    """GELU and its derivative."""
    if TANH:
        s = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 2 sqrt(2 / pi)
        slope = 1.5957691216057308 * (1 + 0.134145 * x * x)
        return x * s, s + x * s * (1 - s) * slope
    cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _bias_gelu_kernel(
    x, bias, y, rows, channels,
    TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    row, channel, inside = row_tile(rows, channels, ROWS, BLOCK)
    at = row * channels + channel
    value = tl.load(x + at, inside, other=0).to(COMPUTE)
    value += tl.load(bias + channel, channel < channels, other=0).to(COMPUTE)
    result, _ = _gelu(value, TANH)
    tl.store(y + at, result, inside)


@triton.jit
def _bias_gelu_backward_kernel(
    x, bias, grad, y, grad_x, rows, channels,
    TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """y too, once more, for the gradient of what multiplies it."""
    row, channel, inside = row_tile(rows, channels, ROWS, BLOCK)
    at = row * channels + channel
    value = tl.load(x + at, inside, other=0).to(COMPUTE)
    value += tl.load(bias + channel, channel < channels, other=0).to(COMPUTE)
    result, slope = _gelu(value, TANH)
    g = tl.load(grad + at, inside, other=0).to(COMPUTE)
    tl.store(y + at, result, inside)
    tl.store(grad_x + at, g * slope, inside)


def gelu_projection(x: Tensor, weight: Tensor, bias: Tensor, tanh: bool) -> Tensor:
    """GELU(x weight^T + bias), of which nothing but the result is wanted."""
    if tanh and x.is_cuda and x.dtype in HALF:
        # cuBLAS has this GELU in the product's epilogue.
        return torch._addmm_activation(bias.to(x.dtype), x, weight.t(), use_gelu=True)
    hidden = x @ weight.t()
    launch_over(_bias_gelu_kernel, hidden, bias, hidden, TANH=tanh)
    return hidden


class MLP(torch.autograd.Function):
    """Saves the input and what GELU takes, before its bias."""

    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, tanh, dtype):
        x, w1, w2 = x.to(dtype), weight1.to(dtype), weight2.to(dtype)
        hidden = x @ w1.t()
        ctx.save_for_backward(x, hidden, w1, bias1, w2)
        ctx.tanh, ctx.dtype = tanh, weight1.dtype
        activated = torch.empty_like(hidden)
        launch_over(_bias_gelu_kernel, hidden, bias1, activated, TANH=tanh)
        return torch.addmm(bias2.to(dtype), activated, w2.t())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, hidden, w1, bias1, w2 = ctx.saved_tensors
        grad, wanted = grad.contiguous(), ctx.needs_input_grad
        grad_hidden = grad @ w2
        activated = torch.empty_like(hidden)
        launch_over(
            _bias_gelu_backward_kernel, hidden, bias1, grad_hidden, activated, grad_hidden,
            TANH=ctx.tanh,
        )  # fmt: skip
        grad_weight2 = weight_gradient(grad, activated, ctx.dtype) if wanted[3] else None
        del activated
        return (
            grad_hidden @ w1 if wanted[0] else None,
            weight_gradient(grad_hidden, x, ctx.dtype) if wanted[1] else None,
            grad_hidden.sum(0, dtype=ctx.dtype) if wanted[2] else None,
            grad_weight2,
            grad.sum(0, dtype=ctx.dtype) if wanted[4] else None,
            None,
            None,
        )
