"""What the theory promises of the propagation, for random sizes and inputs."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cgspn_seg.ops import DIRECTIONS, line_scan

from .oracles import make_inputs

MIRRORED = {"down": "up", "up": "down", "right": "left", "left": "right"}

sizes = st.integers(1, 7)
seeds = st.integers(0, 2**16)


def inputs(height: int, width: int, seed: int, groups: int = 4) -> list[torch.Tensor]:
    return [t.detach() for t in make_inputs(1, height, width, 4, groups=groups, seed=seed)]


def first_line_only(gate: torch.Tensor) -> torch.Tensor:
    """A gate of 1 on the line where each direction starts, and 0 elsewhere."""
    gate = torch.zeros_like(gate)
    gate[:, 0, :, 0] = gate[:, -1, :, 1] = gate[:, :, 0, 2] = gate[:, :, -1, 3] = 1
    return gate


@settings(deadline=None, max_examples=40)
@given(sizes, sizes, seeds)
def test_a_constant_is_a_fixed_point_of_the_coefficients(height, width, seed):
    x, weight, gate = inputs(height, width, seed)
    h = line_scan(torch.full_like(x, 3.0), weight, first_line_only(gate))
    torch.testing.assert_close(h, torch.full_like(h, 3.0))


@settings(deadline=None, max_examples=40)
@given(sizes, sizes, seeds)
def test_mirrored_input_gives_mirrored_output(height, width, seed):
    x, weight, gate = inputs(height, width, seed)
    h = line_scan(x, weight, gate)
    for axis, across in ((1, ("down", "up")), (2, ("right", "left"))):
        # Directions across the mirror swap; for those along it the neighbours at -1 and +1 do.
        directions = tuple(MIRRORED[d] if d in across else d for d in DIRECTIONS)
        taps = torch.stack(
            [
                weight[:, :, :, i] if d in across else weight[:, :, :, i].flip(-2)
                for i, d in enumerate(DIRECTIONS)
            ],
            dim=3,
        )
        mirrored = line_scan(x.flip(axis), taps.flip(axis), gate.flip(axis), directions=directions)
        torch.testing.assert_close(mirrored, h.flip(axis))


@settings(deadline=None, max_examples=40)
@given(sizes, sizes, seeds)
def test_a_transposed_image_swaps_rows_and_columns(height, width, seed):
    x, weight, gate = inputs(height, width, seed, groups=2)
    h = line_scan(x, weight, gate, directions=("down", "up", "right", "left"))
    transposed = line_scan(
        x.transpose(1, 2),
        weight.transpose(1, 2),
        gate.transpose(1, 2),
        directions=("right", "left", "down", "up"),
    )
    torch.testing.assert_close(transposed, h.transpose(1, 2))


@settings(deadline=None, max_examples=40)
@given(sizes, sizes, seeds)
def test_the_state_is_bounded_by_the_lines_passed_times_the_largest_input(height, width, seed):
    x, weight, gate = inputs(height, width, seed)
    h = line_scan(x, weight, gate)
    for d, axis in enumerate((1, 1, 2, 2)):
        driven = (gate[:, :, :, d] * x).abs().amax()
        passed = torch.arange(1, x.shape[axis] + 1, dtype=x.dtype)
        passed = passed.flip(0) if d in (1, 3) else passed
        bound = driven * passed.view([-1 if i == axis else 1 for i in range(4)])
        assert (h[:, :, :, d].abs() <= bound * (1 + 1e-12)).all()


@settings(deadline=None, max_examples=40)
@given(sizes, sizes, seeds, st.integers(1, 8))
def test_a_segment_is_a_scan_of_its_own(height, width, seed, segment):
    x, weight, gate = inputs(height, width, seed)
    options = dict(directions=("down",), segment_length=segment)
    h = line_scan(x, weight[:, :, :, :1], gate[:, :, :, :1], **options)
    for start in range(0, height, segment):
        rows = slice(start, start + segment)
        alone = line_scan(
            x[:, rows], weight[:, rows, :, :1], gate[:, rows, :, :1], directions=("down",)
        )
        torch.testing.assert_close(h[:, rows], alone)


@settings(deadline=None, max_examples=40)
@given(sizes, sizes, seeds)
def test_the_scan_is_linear_in_what_is_propagated(height, width, seed):
    x, weight, gate = inputs(height, width, seed)
    other = torch.randn_like(x)
    together = line_scan(2 * x - 3 * other, weight, gate)
    torch.testing.assert_close(
        together, 2 * line_scan(x, weight, gate) - 3 * line_scan(other, weight, gate)
    )
