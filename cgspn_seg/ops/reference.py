"""The line scan in plain PyTorch: for reading, for testing, and for second derivatives."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cgspn_seg.ops.line_scan import DIRECTIONS, direction_indices

MIN_SUM = 1e-7
"""Lower bound of the sum of sigmoids that the coefficients are divided by."""


def line_scan_reference(
    x: Tensor,
    weight: Tensor,
    input_gate: Tensor,
    *,
    directions: Sequence[str] = DIRECTIONS,
    segment_length: int | None = None,
) -> Tensor:
    """:func:`line_scan` with one PyTorch expression per line; same arguments and result.

    The state is kept in float32 for half-precision inputs, as in the operator. Arguments are not
    checked.
    """
    direction_indices(directions)
    dtype = torch.promote_types(x.dtype, torch.float32)
    states = []
    for d, direction in enumerate(directions):
        # Every direction becomes "down": lines are axis 1, visited from the first to the last.
        transposed = direction in ("right", "left")
        reversed_ = direction in ("up", "left")

        def as_down(
            t: Tensor, transposed: bool = transposed, reversed_: bool = reversed_
        ) -> Tensor:
            t = t.transpose(1, 2) if transposed else t
            return t.flip(1) if reversed_ else t

        def to_image(
            t: Tensor, transposed: bool = transposed, reversed_: bool = reversed_
        ) -> Tensor:
            t = t.flip(1) if reversed_ else t
            return t.transpose(1, 2) if transposed else t

        driven = as_down(input_gate[..., d, :].to(dtype) * x.to(dtype))
        coefficients = normalize(as_down(weight[..., d, :, :].to(dtype)))
        state = scan_lines(driven, coefficients, segment_length)
        states.append(to_image(state))
    return torch.stack(states, dim=3).to(x.dtype)


def normalize(logits: Tensor) -> Tensor:
    """Stability-Context normalization of logits (B, lines, positions, 3, G)."""
    sigma = logits.sigmoid()
    inside = torch.ones(logits.shape[2], 3, 1, dtype=logits.dtype, device=logits.device)
    inside[:1, 0] = 0
    inside[-1:, 2] = 0
    sigma = sigma * inside
    return sigma / sigma.sum(dim=3, keepdim=True).clamp(min=MIN_SUM)


def scan_lines(driven: Tensor, coefficients: Tensor, segment_length: int | None) -> Tensor:
    """Scans λx (B, lines, positions, C) downwards with coefficients (B, lines, positions, 3, G)."""
    group_size = driven.shape[-1] // coefficients.shape[-1]
    lines = driven.unbind(1)
    if not lines:
        return driven
    segment_length = segment_length or len(lines)
    states = []
    for i, (line, w) in enumerate(zip(lines, coefficients.unbind(1), strict=True)):
        if i % segment_length == 0:
            state = line
        else:
            w_prev, w_mid, w_next = w.repeat_interleave(group_size, dim=-1).unbind(2)
            padded = F.pad(state, (0, 0, 1, 1))
            state = w_prev * padded[:, :-2] + w_mid * state + w_next * padded[:, 2:] + line
        states.append(state)
    return torch.stack(states, dim=1)
