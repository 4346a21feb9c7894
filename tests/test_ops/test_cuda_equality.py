"""The op on the GPU equals the CPU's on every path through the kernels.

What does not depend on the device is tested in test_line_scan.py, on both.
"""

import itertools
import math

import pytest
import torch

from cgspn_seg.ops import DIRECTIONS, line_scan

from .oracles import TOLERANCES, relative_error
from .scans import COLUMNS, RESULTS, ROWS, Scan, check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible"),
]

GROUPINGS = [
    (channels, groups)
    for channels in (1, 2, 3, 5, 6, 8, 16, 20, 24, 48, 64, 72, 384)
    for groups in sorted(
        {1, *(channels // s for s in (1, 2, 3, 4, 8, 16, 48) if channels % s == 0)}
    )
]
GRIDS = ((2, 5, 7), (1, 9, 4), (3, 1, 6), (1, 13, 33), (2, 8, 1), (1, 3, 35), (1, 18, 17))
ORDERS = (
    DIRECTIONS,
    ("down",),
    ("left", "up"),
    ("up", "right", "down"),
    ("right",),
    ("left", "right", "up", "down"),
    ("up",),
    ("left",),
)
# Of lengths that have no divisor in common, so that the combinations differ from case to case.
VARIANTS = zip(
    itertools.cycle(GRIDS), itertools.cycle(ORDERS), itertools.cycle((None, 3, None, 2, 1))
)
GROUPED = {
    (channels, groups): [
        Scan((*grid, channels), groups, order, segment)
        for grid, order, segment in itertools.islice(VARIANTS, 3)
    ]
    for channels, groups in GROUPINGS
}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("channels", "groups"), GROUPINGS)
def test_equals_the_cpu_for_every_vector_width_and_grouping(channels, groups, dtype):
    for scan in GROUPED[channels, groups]:
        check(scan, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [8, 2])
def test_equals_the_cpu_for_every_small_size(groups, dtype):
    for height, width in itertools.product((1, 2, 3, 4, 6, 17), (1, 2, 5, 31, 32, 33)):
        check(Scan((1, height, width, 8), groups), dtype)


@pytest.mark.parametrize("directions", [ROWS, COLUMNS], ids="-".join)
@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513, 1023, 1025])
def test_equals_the_cpu_where_lines_end_beside_a_block(length, directions):
    grid = (1, 6, length) if directions == ROWS else (1, length, 6)
    check(Scan((*grid, 8), 8, directions), torch.float32)
    check(Scan((*grid, 16), 16, directions), torch.bfloat16)
    check(Scan((*grid, 16), 1, directions), torch.float16)


@pytest.mark.parametrize("directions", [ROWS, COLUMNS], ids="-".join)
@pytest.mark.parametrize("segment_length", [None, 1, 2, 3, 4, 5, 7])
def test_equals_the_cpu_for_few_long_lines_and_every_segment(segment_length, directions):
    for lines in (1, 2, 3, 4, 5, 8, 9, 17):
        grid = (1, lines, 1500) if directions == ROWS else (1, 1500, lines)
        check(Scan((*grid, 8), 8, directions, segment_length), torch.float32)
        check(Scan((*grid, 8), 2, directions, segment_length), torch.bfloat16)


LONG = [
    Scan((1, 3, 1500, 4), 4),
    Scan((1, 1500, 3, 4), 2),
    Scan((1, 2100, 2, 2), 2),
    Scan((1, 2, 2100, 2), 1),
    Scan((1, 2, 5000, 1), 1),
    Scan((1, 5000, 2, 1), 1),
    Scan((1, 2, 5000, 6), 3),
    Scan((1, 2, 3000, 64), 64, COLUMNS),
    Scan((1, 3000, 2, 64), 64, ROWS),
]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("scan", LONG, ids=str)
def test_equals_the_cpu_for_lines_longer_than_a_block(scan, dtype):
    check(scan, dtype)


@pytest.mark.parametrize("directions", [ROWS, COLUMNS], ids="-".join)
def test_equals_the_cpu_for_the_longest_lines(directions):
    check(Scan((1, 2, 16000, 3), 3, directions, segment_length=50), torch.bfloat16)
    check(Scan((1, 16000, 2, 2), 1, directions, segment_length=50), torch.float32)


def test_lines_longer_than_the_shared_memory_are_refused():
    tensors = Scan((1, 2, 70001, 2), 2).draw(torch.float32)
    with pytest.raises(ValueError, match=r"lines of 70001 pixels.*coarser grid"):
        line_scan(*tensors[:3])


@pytest.mark.parametrize(
    "scan",
    [
        Scan((70001, 2, 3, 2), 2),
        Scan((70001, 1, 1, 1), 1),
        Scan((1, 2, 2, 70001), 70001),
        Scan((1, 1, 2, 140002), 70001, ("left",)),
    ],
    ids=str,
)
def test_equals_the_cpu_for_more_images_or_channels_than_a_grid_axis_holds(scan):
    check(scan, torch.float32)


LARGE = [
    (Scan((16, 64, 1024, 8), 8, ("down",)), torch.float32),
    (Scan((16, 64, 1024, 8), 1, ("left",)), torch.float32),
    (Scan((3, 1024, 64, 8), 8), torch.float32),
    (Scan((2, 147, 147, 64), 64), torch.bfloat16),
    (Scan((2, 147, 147, 64), 4), torch.float16),
    (Scan((2, 74, 74, 64), 64), torch.bfloat16),
    (Scan((1, 128, 128, 64), 64), torch.bfloat16),
    (Scan((1, 128, 128, 64), 1), torch.bfloat16),
    (Scan((1, 128, 128, 64), 64), torch.float32),
    (Scan((2, 37, 1024, 8), 1), torch.float32),
    (Scan((2, 37, 1024, 8), 1), torch.bfloat16),
    (Scan((2, 37, 1024, 8), 8, segment_length=16), torch.float16),
    (Scan((1, 256, 200, 24), 3, ("up", "left", "right")), torch.bfloat16),
    (Scan((1, 67, 129, 32), 32), torch.float64),
    (Scan((1, 31, 45, 384), 8), torch.bfloat16),
]


@pytest.mark.parametrize(
    ("scan", "dtype"), LARGE, ids=[f"{scan}-{str(dtype)[6:]}" for scan, dtype in LARGE]
)
def test_equals_the_cpu_where_lines_are_cut_among_blocks(scan, dtype):
    check(scan, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_half_types_are_rounded_once(groups, dtype):
    scan = Scan((1, 300, 280, 8), groups)
    tensors = scan.draw(dtype)
    got = scan.run(tensors)
    expected = scan.run_on_cpu(tensors, got[0])
    for name, value, exact in zip(RESULTS, got, expected, strict=True):
        once = relative_error(exact.to(dtype), exact)
        # grad_x is the sum of the directions' shares, rounded before and after.
        times = math.sqrt(2) if name == "grad_x" else 1
        assert relative_error(value, exact) < 1.1 * times * once, name


# Small enough for compute-sanitizer, which slows kernels down a hundredfold, and all paths: 16-byte
# vectors, narrower ones, single elements; a group per channel, several channels, one in all; lines
# cut among blocks; segments. CONTRIBUTING.md has the command.
SANITIZED = [
    (Scan((1, 1, 1, 1), 1), torch.bfloat16),
    (Scan((2, 5, 9, 64), 64), torch.bfloat16),
    (Scan((1, 5, 7, 64), 1, segment_length=3), torch.bfloat16),
    (Scan((1, 5, 33, 24), 8), torch.float16),
    (Scan((1, 4, 6, 72), 9), torch.bfloat16),
    (Scan((1, 4, 6, 20), 20, segment_length=2), torch.bfloat16),
    (Scan((1, 5, 3, 6), 6), torch.bfloat16),
    (Scan((1, 5, 3, 6), 1), torch.float16),
    (Scan((1, 3, 5, 5), 5), torch.bfloat16),
    (Scan((1, 3, 5, 5), 1), torch.bfloat16),
    (Scan((1, 6, 5, 8), 4, ("left", "up", "right")), torch.float32),
    (Scan((1, 4, 5, 6), 6), torch.float32),
    (Scan((1, 3, 4, 3), 1), torch.float32),
    (Scan((1, 4, 3, 4), 2), torch.float64),
    (Scan((1, 6, 1100, 8), 8, ("down", "right")), torch.float32),
    (Scan((1, 9, 600, 16), 1, ROWS, 4), torch.bfloat16),
    (Scan((1, 300, 7, 64), 64, COLUMNS), torch.bfloat16),
    (Scan((1, 700, 5, 5), 1, COLUMNS), torch.float16),
    (Scan((1, 2, 1500, 1), 1, ("up", "left"), 25), torch.float32),
    (Scan((1, 40, 48, 64), 64), torch.bfloat16),
    (Scan((30, 3, 5, 64), 64), torch.bfloat16),
    (Scan((30, 3, 90, 64), 64, ROWS), torch.bfloat16),
    (Scan((30, 3, 170, 64), 1, ROWS, 2), torch.bfloat16),
]


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("scan", "dtype"), SANITIZED, ids=[f"{scan}-{str(dtype)[6:]}" for scan, dtype in SANITIZED]
)
def test_equals_the_cpu_on_every_path(scan, dtype):
    check(scan, dtype)
