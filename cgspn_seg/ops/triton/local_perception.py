"""Depthwise 3x3 convolution plus identity, and the LayerNorm after it."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from cgspn_seg.ops.triton.common import (
    compute_type,
    multiprocessors,
    on_device_of,
    partial_sums,
)
from cgspn_seg.ops.triton.norm import add_norm_backward, add_norm_forward

BLOCK = 128
MAX_ROWS = 16
"""A program walks down so many rows at most; two more are read at the ends."""


@triton.jit
def _load_row(x, row, column, channel, height, width, channels):
    """The pixels at `column` of a row, those left of them and those right of them."""
    line = row + tl.zeros_like(column)
    at = (line * width + column).to(tl.int64) * channels + channel
    inside = (line >= 0) & (line < height) & (channel < channels)
    left = tl.load(x + at - channels, inside & (column > 0) & (column <= width), other=0)
    here = tl.load(x + at, inside & (column < width), other=0)
    right = tl.load(x + at + channels, inside & (column + 1 < width), other=0)
    return left, here, right


@triton.jit
def _convolve(above, here, below, taps, offset, COMPUTE: tl.constexpr):
    """A row of the result, from three rows of pixels with their neighbours."""
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = taps
    value = offset + above[0].to(COMPUTE) * w0
    value += above[1].to(COMPUTE) * w1 + above[2].to(COMPUTE) * w2
    value += here[0].to(COMPUTE) * w3 + here[1].to(COMPUTE) * w4 + here[2].to(COMPUTE) * w5
    value += below[0].to(COMPUTE) * w6 + below[1].to(COMPUTE) * w7 + below[2].to(COMPUTE) * w8
    return value


@triton.jit
def _perceive_kernel(
    x, weight, bias, y, height, width, channels, rows,
    FLIPPED: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Some rows of y = x + conv(x) + bias; FLIPPED: of the gradient of x from that of y."""
    strips, blocks = tl.cdiv(width, COLUMNS), tl.cdiv(channels, BLOCK)
    heights = tl.cdiv(height, rows)
    program = tl.program_id(0)
    column = program % strips * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    channel = program // strips % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    first = program // (strips * blocks) % heights * rows
    image = (program // (strips * blocks * heights)).to(tl.int64) * height * width * channels
    x += image
    y += image
    known = channel < channels
    taps = weight + channel * 9 + (8 if FLIPPED else 0)
    STEP: tl.constexpr = -1 if FLIPPED else 1
    w = (
        tl.load(taps, known, other=0).to(COMPUTE),
        tl.load(taps + STEP, known, other=0).to(COMPUTE),
        tl.load(taps + 2 * STEP, known, other=0).to(COMPUTE),
        tl.load(taps + 3 * STEP, known, other=0).to(COMPUTE),
        tl.load(taps + 4 * STEP, known, other=0).to(COMPUTE) + 1,  # the identity
        tl.load(taps + 5 * STEP, known, other=0).to(COMPUTE),
        tl.load(taps + 6 * STEP, known, other=0).to(COMPUTE),
        tl.load(taps + 7 * STEP, known, other=0).to(COMPUTE),
        tl.load(taps + 8 * STEP, known, other=0).to(COMPUTE),
    )
    offset = tl.zeros((1, BLOCK), COMPUTE)
    if not FLIPPED:
        offset += tl.load(bias + channel, known, other=0).to(COMPUTE)
    inside = (column < width) & known
    a0, a1, a2 = _load_row(x, first - 1, column, channel, height, width, channels)
    b0, b1, b2 = _load_row(x, first, column, channel, height, width, channels)
    c0, c1, c2 = _load_row(x, first + 1, column, channel, height, width, channels)
    d0, d1, d2 = _load_row(x, first + 2, column, channel, height, width, channels)
    for row in range(first, min(first + rows, height), 2):
        # The next pair of rows is under way while this one is computed.
        e0, e1, e2 = _load_row(x, row + 3, column, channel, height, width, channels)
        f0, f1, f2 = _load_row(x, row + 4, column, channel, height, width, channels)
        upper = _convolve((a0, a1, a2), (b0, b1, b2), (c0, c1, c2), w, offset, COMPUTE)
        lower = _convolve((b0, b1, b2), (c0, c1, c2), (d0, d1, d2), w, offset, COMPUTE)
        at = (row * width + column).to(tl.int64) * channels + channel
        tl.store(y + at, upper, inside)
        below = row + 1 + tl.zeros_like(column)
        tl.store(y + at + width * channels, lower, inside & (below < height))
        a0, a1, a2, b0, b1, b2 = c0, c1, c2, d0, d1, d2
        c0, c1, c2, d0, d1, d2 = e0, e1, e2, f0, f1, f2


@triton.jit
def _weight_gradient_kernel(
    x, grad, partial, height, width, channels, rows,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Sums over a strip of rows, a program's 9 C of the weight and C of the bias."""
    lane = tl.arange(0, COLUMNS)[:, None]
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    strips = tl.cdiv(height, rows)
    image = tl.program_id(0) // strips
    first = tl.program_id(0) % strips * rows
    x += image.to(tl.int64) * height * width * channels
    grad += image.to(tl.int64) * height * width * channels
    known = channel < channels
    zeros = tl.zeros((COLUMNS, BLOCK), COMPUTE)
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9 = (
        zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros,
    )  # fmt: skip
    for begin in range(0, width, COLUMNS):
        column = begin + lane
        a0, a1, a2 = _load_row(x, first - 1, column, channel, height, width, channels)
        b0, b1, b2 = _load_row(x, first, column, channel, height, width, channels)
        for row in range(first, min(first + rows, height)):
            c0, c1, c2 = _load_row(x, row + 1, column, channel, height, width, channels)
            at = (row * width + column).to(tl.int64) * channels + channel
            g = tl.load(grad + at, (column < width) & known, other=0).to(COMPUTE)
            s0 += a0.to(COMPUTE) * g
            s1 += a1.to(COMPUTE) * g
            s2 += a2.to(COMPUTE) * g
            s3 += b0.to(COMPUTE) * g
            s4 += b1.to(COMPUTE) * g
            s5 += b2.to(COMPUTE) * g
            s6 += c0.to(COMPUTE) * g
            s7 += c1.to(COMPUTE) * g
            s8 += c2.to(COMPUTE) * g
            s9 += g
            a0, a1, a2, b0, b1, b2 = b0, b1, b2, c0, c1, c2
    to = partial + tl.program_id(0).to(tl.int64) * 10 * channels
    tl.store(to + 9 * channels + channel, tl.sum(s9, 0)[None, :], known)
    to += channel * 9
    tl.store(to, tl.sum(s0, 0)[None, :], known)
    tl.store(to + 1, tl.sum(s1, 0)[None, :], known)
    tl.store(to + 2, tl.sum(s2, 0)[None, :], known)
    tl.store(to + 3, tl.sum(s3, 0)[None, :], known)
    tl.store(to + 4, tl.sum(s4, 0)[None, :], known)
    tl.store(to + 5, tl.sum(s5, 0)[None, :], known)
    tl.store(to + 6, tl.sum(s6, 0)[None, :], known)
    tl.store(to + 7, tl.sum(s7, 0)[None, :], known)
    tl.store(to + 8, tl.sum(s8, 0)[None, :], known)


def _rows_per_program(others: int, height: int, device: torch.device) -> int:
    """As many rows as leave the GPU four programs a multiprocessor, an even number of them."""
    strips = triton.cdiv(4 * multiprocessors(device), others)
    return max(2, min(MAX_ROWS, height // strips) // 2 * 2)


def perceive(x: Tensor, weight: Tensor, bias: Tensor, flipped: bool = False) -> Tensor:
    """x + conv(x) + bias of dense (B, H, W, C); flipped, what its transpose makes of a gradient."""
    batch, height, width, channels = x.shape
    y = torch.empty_like(x)
    columns = 2 * x.element_size()  # measured: narrow types need more registers to convert
    tiles = batch * triton.cdiv(width, columns) * triton.cdiv(channels, BLOCK)
    rows = _rows_per_program(tiles, height, x.device)
    with on_device_of(x):
        _perceive_kernel[(tiles * triton.cdiv(height, rows),)](
            x, weight.contiguous(), bias, y, height, width, channels, rows,
            FLIPPED=flipped, COLUMNS=columns, BLOCK=BLOCK, COMPUTE=compute_type(x),
        )  # fmt: skip
    return y


def weight_gradients(x: Tensor, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias, for dense (B, H, W, C) and the gradient of x + conv(x)."""
    batch, height, width, channels = x.shape
    blocks = triton.cdiv(channels, BLOCK)
    rows = _rows_per_program(blocks * batch, height, x.device)
    strips = batch * triton.cdiv(height, rows)
    partial = partial_sums(x, strips, 10 * channels)
    with on_device_of(x):
        _weight_gradient_kernel[(strips, blocks)](
            x, grad, partial, height, width, channels, rows,
            COLUMNS=4, BLOCK=BLOCK, COMPUTE=compute_type(x),
        )  # fmt: skip
    taps, bias = partial.sum(0).to(weight.dtype).split((9 * channels, channels))
    return taps.view_as(weight), bias


class PerceiveNorm(torch.autograd.Function):
    """Saves x alone; what the norm takes is computed again."""

    @staticmethod
    def forward(ctx, x, conv_weight, conv_bias, weight, bias, eps, dtype):
        total, normed = add_norm_forward(
            perceive(x, conv_weight, conv_bias), None, None, weight, bias, eps, dtype
        )
        ctx.save_for_backward(x, conv_weight, conv_bias, weight)
        ctx.eps = eps
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, grad_normed):
        x, conv_weight, conv_bias, weight = ctx.saved_tensors
        grad, _, grad_weight, grad_bias = add_norm_backward(
            grad_normed.contiguous(),
            grad_total.contiguous(),
            perceive(x, conv_weight, conv_bias),
            None,
            weight,
            ctx.eps,
            None,
        )
        grad_x = perceive(grad, conv_weight, conv_bias, flipped=True)
        grad_conv = grad_conv_bias = None
        if ctx.needs_input_grad[1]:
            grad_conv, grad_conv_bias = weight_gradients(x, grad, conv_weight)
        return grad_x, grad_conv, grad_conv_bias, grad_weight, grad_bias, None, None
