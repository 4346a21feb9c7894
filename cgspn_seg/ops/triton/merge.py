"""The merge of the directions: output gate, LayerNorm of the states, and sum, in one pass."""

import torch
import triton
import triton.language as tl
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

ELEMENTS = 1024
"""Of a tile; with the directions it is several times as many."""


@triton.jit
def _merge_kernel(
    h, gate, weight, bias, merged, rows, channels, gate_stride, eps,
    D: tl.constexpr, HAS_NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    known = channel < channels
    inside = (row < rows) & known
    if HAS_NORM:
        w = tl.load(weight + channel, known, other=0).to(COMPUTE)
        b = tl.load(bias + channel, known, other=0).to(COMPUTE)
    total = tl.zeros((ROWS, BLOCK), COMPUTE)
    for d in tl.static_range(D):
        state = tl.load(h + (row * D + d) * channels + channel, inside, other=0).to(COMPUTE)
        if HAS_NORM:
            standardized, _ = standardize(state, inside, channels, eps)
            state = standardized * w + b
        u = tl.load(gate + row * gate_stride + d * channels + channel, inside, other=0)
        total += u.to(COMPUTE) * state
    tl.store(merged + row * channels + channel, total, inside)


@triton.jit
def _merge_backward_kernel(
    grad, h, gate, weight, bias, grad_h, grad_gate, grad_affine,
    rows, channels, gate_stride, eps,
    D: tl.constexpr, HAS_NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, BLOCK)[None, :]
    known = channel < channels
    if HAS_NORM:
        w = tl.load(weight + channel, known, other=0).to(COMPUTE)
        b = tl.load(bias + channel, known, other=0).to(COMPUTE)
        grad_w = tl.zeros((ROWS, BLOCK), COMPUTE)
        grad_b = tl.zeros((ROWS, BLOCK), COMPUTE)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for begin in range(first, rows, tl.num_programs(0) * ROWS):
        row = begin + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & known
        g = tl.load(grad + row * channels + channel, inside, other=0).to(COMPUTE)
        for d in tl.static_range(D):
            at = (row * D + d) * channels + channel
            state = tl.load(h + at, inside, other=0).to(COMPUTE)
            u = tl.load(gate + row * gate_stride + d * channels + channel, inside, other=0)
            grad_state = g * u.to(COMPUTE)
            if HAS_NORM:
                standardized, rstd = standardize(state, inside, channels, eps)
                grad_w += grad_state * standardized
                grad_b += grad_state
                state = standardized * w + b
                grad_state = standardize_backward(grad_state * w, standardized, rstd, channels)
            tl.store(grad_gate + at, g * state, inside)
            tl.store(grad_h + at, grad_state, inside)
    if HAS_NORM:
        store_affine(grad_affine, grad_w, grad_b, channels, channel, known)


class MergeDirections(torch.autograd.Function):
    """Saves what it is given, (N, D, C) each; the norm is computed again."""

    @staticmethod
    def forward(ctx, h, gate, weight, bias, eps):
        rows, directions, channels = h.shape
        merged = h.new_empty(rows, channels)
        cut = tile(channels, ELEMENTS)
        with on_device_of(h):
            _merge_kernel[(triton.cdiv(rows, cut["ROWS"]),)](
                h, gate, weight, bias, merged, rows, channels, gate.stride(0), eps,
                D=directions, HAS_NORM=weight is not None, COMPUTE=compute_type(h), **cut,
            )  # fmt: skip
        ctx.save_for_backward(h, gate, weight, bias)
        ctx.eps = eps
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        h, gate, weight, bias = ctx.saved_tensors
        rows, directions, channels = h.shape
        grad_h, grad_gate = torch.empty_like(h), torch.empty_like(h)
        cut = tile(channels, ELEMENTS)
        count = programs(rows, cut["ROWS"], h.device)
        grad_affine = partial_sums(h, count, 2 * channels)
        with on_device_of(h):
            _merge_backward_kernel[(count,)](
                grad.contiguous(), h, gate, weight, bias, grad_h, grad_gate, grad_affine,
                rows, channels, gate.stride(0), ctx.eps,
                D=directions, HAS_NORM=weight is not None, COMPUTE=compute_type(h), **cut,
            )  # fmt: skip
        if weight is None:
            return grad_h, grad_gate, None, None, None
        return grad_h, grad_gate, *grad_affine.sum(0).to(weight.dtype).chunk(2), None
