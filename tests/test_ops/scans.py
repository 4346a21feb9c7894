"""Scans for the GPU's tests: their shapes, random tensors, and comparisons with the CPU op."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cgspn_seg.ops import DIRECTIONS, direction_indices, line_scan

from .oracles import TOLERANCES

RESULTS = ("h", "grad_x", "grad_weight", "grad_gate")
ROWS, COLUMNS = ("down", "up"), ("right", "left")

# What an element may be off by: as a share of itself, two roundings, and of the root mean square of
# all, for sums in another order. The norm alone would not see one wrong half number among many.
ELEMENTWISE = {
    torch.float64: (1e-11, 1e-11),
    torch.float32: (1e-5, 5e-5),
    torch.float16: (2**-10, 5e-5),
    torch.bfloat16: (2**-7, 5e-5),
}


class Scan(NamedTuple):
    """What to scan, and how."""

    size: tuple[int, int, int, int]
    groups: int
    directions: tuple[str, ...] = DIRECTIONS
    segment_length: int | None = None

    def __str__(self) -> str:
        directions = "".join(name[0] for name in self.directions)
        segment = f"-s{self.segment_length}" if self.segment_length else ""
        return f"{'x'.join(map(str, self.size))}-G{self.groups}-{directions}{segment}"

    @property
    def options(self) -> dict:
        """What `line_scan` takes beside tensors."""
        return dict(directions=self.directions, segment_length=self.segment_length)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of x, weight, input_gate and the gradient of h."""
        *grid, channels = self.size
        axes = (*grid, len(self.directions))
        return self.size, (*axes, 3, self.groups), (*axes, channels), (*axes, channels)

    def draw(
        self, dtype: torch.dtype, seed: int = 0, device: str | torch.device = "cuda"
    ) -> list[Tensor]:
        """Random tensors of these shapes, drawn on the GPU for speed."""
        generator = torch.Generator(device).manual_seed(seed)
        wide = torch.promote_types(dtype, torch.float32)
        return [
            torch.randn(shape, generator=generator, device=device, dtype=wide).to(dtype)
            for shape in self.shapes
        ]

    def run(self, tensors: Sequence[Tensor], h: Tensor | None = None) -> tuple[Tensor, ...]:
        """h and the gradients, these from `h` where it is given, as if the scan had rounded so."""
        *inputs, grad_h = tensors
        scanned = line_scan(*inputs, **self.options)
        gradients = torch.ops.cgspn_seg.line_scan_backward(
            grad_h,
            *inputs,
            scanned if h is None else h,
            direction_indices(self.directions),
            self.segment_length,
        )
        return scanned, *gradients

    def run_on_cpu(self, tensors: Sequence[Tensor], h: Tensor) -> tuple[Tensor, ...]:
        """What is expected of `run`: the CPU op's results in float64, of the same values."""
        return self.run([t.double().cpu() for t in tensors], h.double().cpu())


def assert_close(got: Sequence[Tensor], expected: Sequence[Tensor], scan: Scan) -> None:
    """Compares h and gradients with those in float64, as a whole and element by element."""
    lines = min(max(scan.size[1:3]), scan.segment_length or math.inf)
    for name, value, reference in zip(RESULTS, got, expected, strict=True):
        dtype = value.dtype
        # The roundings of float32 add up at random along a scan; those of the half types hide them.
        growth = max(1.0, math.sqrt(lines / 30))
        error = (value.double().cpu() - reference).abs()
        # At least 1, the size of the inputs: some gradients are differences that ought to be 0.
        scale = reference.square().mean().sqrt().clamp(min=1)
        tolerance = TOLERANCES[dtype] * (growth if dtype.itemsize > 2 else 1)
        assert error.square().mean().sqrt() < tolerance * scale, name
        relative, absolute = ELEMENTWISE[dtype]
        if name == "grad_x" and dtype.itemsize == 2 and len(scan.directions) > 1:
            # Each direction's share is rounded, up to four of up to six times the mean.
            absolute = 24 * relative / 2
        wrong = ~(error <= relative * reference.abs() + absolute * growth * scale)
        assert not wrong.any(), (
            f"{name} at {wrong.nonzero()[0].tolist()}, {int(wrong.sum())} of {wrong.numel()} wrong"
        )


def check(scan: Scan, dtype: torch.dtype) -> None:
    """Compares the GPU's results with the CPU's."""
    tensors = scan.draw(dtype)
    got = scan.run(tensors)
    for value, shape in zip(got, (scan.shapes[2], *scan.shapes[:3]), strict=True):
        assert value.shape == shape
        assert value.dtype == dtype
        assert value.is_cuda
        assert value.is_contiguous()
    assert_close(got, scan.run_on_cpu(tensors, got[0]), scan)


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Compares h and gradients bit for bit."""
    for name, value, other in zip(RESULTS, got, expected, strict=False):
        assert torch.equal(value, other), name
