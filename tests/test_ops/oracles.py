"""What the line scan's tests share: inputs, how close is close, and an independent oracle."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DIRECTIONS = ("down", "up", "right", "left")

# Relative to the norm, or absolute below a norm of 1. The half types are compared with float64 on
# equal inputs.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}


def relative_error(value: Tensor, expected: Tensor) -> float:
    """The norm of the difference, as `TOLERANCES` bounds it."""
    value, expected = value.detach().double().cpu(), expected.detach().double().cpu()
    return ((value - expected).norm() / expected.norm().clamp(min=1)).item()


def with_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_h: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    """The result of `function` and the gradients of its inputs."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    h = function(*inputs, **options)
    return h, *torch.autograd.grad(h, inputs, grad_h, materialize_grads=True)


def make_inputs(
    batch: int = 2,
    height: int = 4,
    width: int = 5,
    channels: int = 6,
    num_directions: int = 4,
    groups: int = 6,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random x, weight and input_gate that require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(device=device, dtype=dtype).requires_grad_()

    return (
        draw(batch, height, width, channels),
        draw(batch, height, width, num_directions, 3, groups),
        draw(batch, height, width, num_directions, channels),
    )


def dense_scan(
    x: Tensor,
    weight: Tensor,
    input_gate: Tensor,
    directions: Sequence[str] = DIRECTIONS,
    segment_length: int | None = None,
) -> Tensor:
    """The line scan by linear algebra: one N x N matrix per image, direction and channel.

    With M the matrix that takes the states of all N = H W pixels to what each reads from the line
    before it, h = M h + λx is solved as h = (I - M)^-1 λx. Differentiable; for tiny sizes.
    """
    batch, height, width, channels = x.shape
    group_size = channels // weight.shape[-1]
    step = {"down": (-1, 0), "up": (1, 0), "right": (0, -1), "left": (0, 1)}
    result = torch.zeros(batch, height, width, len(directions), channels, dtype=x.dtype)
    for d, name in enumerate(directions):
        d_row, d_col = step[name]
        for b in range(batch):
            for c in range(channels):
                entries: dict[tuple[int, int], Tensor] = {}
                for row in range(height):
                    for col in range(width):
                        line = {"down": row, "up": height - 1 - row}.get(
                            name, col if name == "right" else width - 1 - col
                        )
                        if line == 0 or (segment_length is not None and line % segment_length == 0):
                            continue
                        readable = []
                        for k, offset in enumerate((-1, 0, 1)):
                            source_row = row + d_row + (0 if d_row else offset)
                            source_col = col + d_col + (offset if d_row else 0)
                            if 0 <= source_row < height and 0 <= source_col < width:
                                sigma = torch.sigmoid(weight[b, row, col, d, k, c // group_size])
                                readable.append((source_row * width + source_col, sigma))
                        total = torch.stack([sigma for _, sigma in readable]).sum()
                        for source, sigma in readable:
                            entries[row * width + col, source] = sigma / total.clamp(min=1e-7)
                size = height * width
                matrix = torch.zeros(size, size, dtype=x.dtype)
                if entries:
                    rows, cols = zip(*entries, strict=True)
                    index = (torch.tensor(rows), torch.tensor(cols))
                    matrix = matrix.index_put(index, torch.stack(list(entries.values())))
                driven = (input_gate[b, :, :, d, c] * x[b, :, :, c]).reshape(size)
                identity = torch.eye(size, dtype=x.dtype)
                state = torch.linalg.solve(identity - matrix, driven).view(height, width)
                mask = torch.zeros_like(result)
                mask[b, :, :, d, c] = 1
                result = result + mask * state[None, :, :, None, None]
    return result
