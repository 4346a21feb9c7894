"""P2 (P1 x ⊙ SiLU(gate)): the gate and the products around it."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from cgspn_seg.ops.triton.common import HALF, on_device_of, sigmoid, weight_gradient
from cgspn_seg.ops.triton.elementwise import launch_over, row_tile

MAX_INNER = 128
"""Channels of a product that is one step of the tensor cores; with more, cuBLAS is better."""


@triton.jit
def _gate_kernel(
    x, gate, gate_stride, y, rows, channels,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    row, channel, inside = row_tile(rows, channels, ROWS, BLOCK)
    at = row * channels + channel
    g = tl.load(gate + row * gate_stride + channel, inside, other=0).to(COMPUTE)
    value = tl.load(x + at, inside, other=0).to(COMPUTE)
    tl.store(y + at, value * g * sigmoid(g), inside)


@triton.jit
def _project_and_gate_kernel(
    x, weight, bias, gate, gate_stride, y, rows, inner, channels,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """y = (x weight^T + bias) SiLU(gate), where x is so narrow that the product is one step."""
    blocks = tl.cdiv(channels, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    k = tl.arange(0, INNER)
    inside = (row < rows) & (channel < channels)
    g = tl.load(gate + row * gate_stride + channel, inside, other=0).to(tl.float32)
    a = tl.load(x + row * inner + k[None, :], (row < rows) & (k < inner)[None, :], other=0)
    b = tl.load(
        weight + channel * inner + k[:, None], (channel < channels) & (k < inner)[:, None], other=0
    )
    value = tl.dot(a, b) + tl.load(bias + channel, channel < channels, other=0).to(tl.float32)
    tl.store(y + row * channels + channel, value * g * sigmoid(g), inside)


@triton.jit
def _gate_backward_kernel(
    x, gate, gate_stride, grad, y, grad_x, grad_gate, rows, channels,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    row, channel, inside = row_tile(rows, channels, ROWS, BLOCK)
    at = row * channels + channel
    g = tl.load(gate + row * gate_stride + channel, inside, other=0).to(COMPUTE)
    value = tl.load(x + at, inside, other=0).to(COMPUTE)
    d = tl.load(grad + at, inside, other=0).to(COMPUTE)
    s = sigmoid(g)
    tl.store(y + at, value * g * s, inside)
    tl.store(grad_x + at, d * g * s, inside)
    tl.store(grad_gate + at, d * value * s * (1 + g * (1 - s)), inside)


def project_and_gate(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    """(x weight^T + bias) SiLU(gate), of dense (N, C_c) and of (N, C) with rows at any distance."""
    rows, inner = x.shape
    channels = weight.shape[0]
    if x.dtype not in HALF or inner > MAX_INNER:
        wide = torch.addmm(bias, x, weight.t())
        # Not in place: who caches results of products, as selective checkpointing does, would not
        # see the change.
        y = torch.empty_like(wide)
        launch_over(_gate_kernel, wide, gate, gate.stride(0), y)
        return y
    y = x.new_empty(rows, channels)
    cut = dict(ROWS=64, BLOCK=64, INNER=max(16, triton.next_power_of_2(inner)))
    grid = (triton.cdiv(rows, cut["ROWS"]) * triton.cdiv(channels, cut["BLOCK"]),)
    with on_device_of(x):
        _project_and_gate_kernel[grid](
            x, weight.contiguous(), bias, gate, gate.stride(0), y, rows, inner, channels, **cut
        )
    return y


class GatedProjection(torch.autograd.Function):
    """Saves the narrow input and the gate; the product of the two is computed again."""

    @staticmethod
    def forward(ctx, x, gate, weight1, bias1, weight2, bias2, dtype):
        x, gate = x.to(dtype), gate.to(dtype)
        w1, b1, w2 = weight1.to(dtype), bias1.to(dtype), weight2.to(dtype)
        ctx.save_for_backward(x, gate, w1, b1, w2)
        ctx.dtype = weight1.dtype
        return torch.addmm(bias2.to(dtype), project_and_gate(x, w1, b1, gate), w2.t())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, gate, w1, b1, w2 = ctx.saved_tensors
        grad, wanted = grad.contiguous(), ctx.needs_input_grad
        grad_wide, wide = grad @ w2, torch.addmm(b1, x, w1.t())
        grad_gate, gated = torch.empty_like(grad_wide), torch.empty_like(wide)
        launch_over(
            _gate_backward_kernel, wide, gate, gate.stride(0), grad_wide, gated, grad_wide,
            grad_gate,
        )  # fmt: skip
        return (
            grad_wide @ w1 if wanted[0] else None,
            grad_gate,
            weight_gradient(grad_wide, x, ctx.dtype) if wanted[2] else None,
            grad_wide.sum(0, dtype=ctx.dtype) if wanted[3] else None,
            weight_gradient(grad, gated, ctx.dtype) if wanted[4] else None,
            grad.sum(0, dtype=ctx.dtype) if wanted[5] else None,
            None,
        )
