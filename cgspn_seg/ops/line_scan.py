"""``line_scan``, its registration for fake tensors, and its derivative."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    from cgspn_seg import _C  # noqa: F401  (importing it registers the operators)
except ImportError as error:
    raise ImportError(
        "cgspn_seg's compiled operator could not be loaded "
        f"({error}). Build it for the installed PyTorch {torch.__version__}: `make build`, or "
        "`pip install -e . --no-build-isolation`."
    ) from error

DIRECTIONS = ("down", "up", "right", "left")
"""Names of the scan directions; a direction's index is what the operator's schema takes."""

# What a thread and a block of the CUDA kernels take of a pixel's channels (csrc/cuda/plan.cpp).
_ACCESS_BYTES, _SLICE_BYTES = 16, 128


def line_scan(
    x: Tensor,
    weight: Tensor,
    input_gate: Tensor,
    *,
    directions: Sequence[str] = DIRECTIONS,
    segment_length: int | None = None,
) -> Tensor:
    """Propagates ``x`` over the image, line by line, in several directions at once.

    For line i of a direction, position j along it, and a channel of group g (GSPN, section 3)::

        h[i, j] = w[i, j, 0] h[i-1, j-1] + w[i, j, 1] h[i-1, j] + w[i, j, 2] h[i-1, j+1]
                  + λ[i, j] x[i, j]

    ``w`` are the sigmoids of the three logits at the destination pixel, divided by their sum over
    the neighbours that lie in the image (at least 1e-7): the Stability-Context Condition, applied
    inside the scan. The first line of a scan or segment has h = λ x.

    Differentiable once with respect to the three tensors. The state is kept in float32 for
    half-precision inputs. Works under ``torch.compile(fullgraph=True)`` and ``torch.export``. Only
    the last axis of the inputs has to be dense; others may have any strides, so slices of a joint
    projection are taken without a copy.

    Args:
        x: (B, H, W, C), what is propagated, shared by the directions. float32, float64, float16 or
            bfloat16.
        weight: (B, H, W, D, 3, G), coefficient logits for the neighbours at -1, 0, +1 along the
            previous line (the column to the left, the same, to the right for "down" and "up"; the
            row above, the same, below for "right" and "left"). G divides C; channel c uses group
            ``c // (C // G)``. Dtype and device of ``x``.
        input_gate: (B, H, W, D, C), λ. Dtype and device of ``x``.
        directions: D different names out of "down" (state runs from the top row to the bottom one),
            "up", "right" (from the left column to the right one) and "left", in the order of the D
            axes.
        segment_length: lines after which the state restarts, counted from the line where the scan
            starts; None never restarts it.

    Returns:
        (B, H, W, D, C), the hidden state in image coordinates, contiguous, with the dtype of ``x``.

    Raises:
        ValueError: a direction, shape, device or segment length is not as described, or lines are
            longer than the GPU's shared memory holds (thousands of pixels; docs/kernel.md).
        TypeError: a dtype is not as described.
        RuntimeError: ``x`` is on a device for which the operator was not built.
    """
    return torch.ops.cgspn_seg.line_scan(
        x, weight, input_gate, direction_indices(directions), segment_length
    )


def channels_to_add(x: Tensor) -> int:
    """How many channels of zeros beside those of ``x`` make :func:`line_scan` faster.

    Where a pixel's channels are no multiple of 16 bytes, as 162 in half precision, a GPU's threads
    cannot take 16 bytes at once, and scanning whole slices of 128 bytes costs less
    (docs/models.md). A projection can make the channels of the coefficients at no cost; the op
    would have to copy them.

    Args:
        x: as for :func:`line_scan`.

    Returns:
        The number; 0 on the CPU, and where accesses are whole.
    """
    size, channels = x.element_size(), x.shape[-1]
    if not x.is_cuda or channels * size % _ACCESS_BYTES == 0:
        return 0
    return -channels % (_SLICE_BYTES // size)


def direction_indices(directions: Sequence[str]) -> list[int]:
    """Indices of direction names in ``DIRECTIONS``.

    Raises:
        ValueError: a name is unknown or repeated, or there is none.
    """
    if isinstance(directions, str):
        raise ValueError(
            f"line_scan: directions must be a sequence of names; got the string {directions!r}, "
            f"did you mean ({directions!r},)?"
        )
    unknown = [name for name in directions if name not in DIRECTIONS]
    if unknown:
        raise ValueError(
            f"line_scan: directions must be out of {DIRECTIONS}; "
            f"got {unknown[0]!r} in {tuple(directions)}"
        )
    repeated = [name for i, name in enumerate(directions) if name in directions[:i]]
    if repeated:
        raise ValueError(f"line_scan: directions must not repeat; got {repeated[0]!r} twice")
    if not directions:
        raise ValueError(f"line_scan: directions must name 1 to 4 out of {DIRECTIONS}; got none")
    return [DIRECTIONS.index(name) for name in directions]


@torch.library.register_fake("cgspn_seg::line_scan")
def _fake_line_scan(
    x: Tensor,
    weight: Tensor,
    input_gate: Tensor,
    directions: Sequence[int],
    segment_length: int | None = None,
) -> Tensor:
    # The kernels check everything; a model that is only traced should learn of wrong shapes too.
    grid = (*x.shape[:3], len(directions))
    for name, tensor, expected in (
        ("weight", weight, (*grid, 3, weight.shape[-1])),
        ("input_gate", input_gate, (*grid, x.shape[-1])),
    ):
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"line_scan: {name} must have shape {expected}; got {tuple(tensor.shape)}"
            )
    return x.new_empty(input_gate.shape)


@torch.library.register_fake("cgspn_seg::line_scan_backward")
def _fake_line_scan_backward(
    grad_h: Tensor,
    x: Tensor,
    weight: Tensor,
    input_gate: Tensor,
    h: Tensor,
    directions: Sequence[int],
    segment_length: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        input_gate.new_empty(input_gate.shape),
    )


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, input_gate, ctx.directions, ctx.segment_length = inputs
    ctx.save_for_backward(x, weight, input_gate, output)


def _backward(ctx: Any, grad_h: Tensor) -> tuple:
    x, weight, input_gate, h = ctx.saved_tensors
    gradients = torch.ops.cgspn_seg.line_scan_backward(
        grad_h, x, weight, input_gate, h, ctx.directions, ctx.segment_length
    )
    return *gradients, None, None


def _refuse_double_backward(ctx: Any, *gradients: Tensor) -> tuple:
    raise NotImplementedError(
        "line_scan is differentiable once; for second derivatives use "
        "cgspn_seg.ops.line_scan_reference."
    )


torch.library.register_autograd("cgspn_seg::line_scan", _backward, setup_context=_save_for_backward)
torch.library.register_autograd("cgspn_seg::line_scan_backward", _refuse_double_backward)
