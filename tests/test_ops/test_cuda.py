"""The op on the GPU: equal to the CPU's on every path through the kernels, and at home in PyTorch.

What does not depend on the device is tested in test_line_scan.py, on both.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cgspn_seg.ops import DIRECTIONS, direction_indices, line_scan, line_scan_reference

from .oracles import TOLERANCES, relative_error, with_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible"),
]

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


# Equality with the CPU

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
    (Scan((1, 2, 5000, 1), 1, ("up", "left"), 25), torch.float32),
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


# Memory: strides, alignment, what is written, what is kept, what does not fit 32 bits


def laid_out(tensor: Tensor, offset: int, padding: int) -> Tensor:
    """A copy that starts `offset` elements into its storage, pixels `padding` elements apart."""
    *grid, inner = tensor.flatten(3).shape
    pitch = inner + padding
    buffer = torch.full((offset + math.prod(grid) * pitch,), torch.nan).to(tensor)
    view = buffer[offset:].view(*grid, pitch)[..., :inner].unflatten(-1, tensor.shape[3:])
    return view.copy_(tensor)


@pytest.mark.sanitize
@pytest.mark.parametrize("offset_and_padding", [(1, 0), (0, 1), (1, 1), (4, 4), (2, 6)])
@pytest.mark.parametrize("groups", [16, 2, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_storage_that_is_not_aligned_gives_the_same(dtype, groups, offset_and_padding):
    scan = Scan((2, 5, 7, 16), groups)
    tensors = scan.draw(dtype)
    h = scan.run(tensors)[0]
    expected = scan.run_on_cpu(tensors, h)
    for moved in [(0,), (1,), (2,), (3,), (0, 1, 2, 3)]:
        arguments = [
            laid_out(t, *offset_and_padding) if i in moved else t for i, t in enumerate(tensors)
        ]
        assert_close(scan.run(arguments, h), expected, scan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_slices_of_a_joint_projection_of_odd_width_are_taken(dtype):
    for channels, groups in ((16, 16), (8, 1), (64, 64), (24, 3)):
        scan = Scan((2, 6, 9, channels), groups)
        widths = [math.prod(shape[3:]) for shape in scan.shapes[:3]]
        # In the order weight, one spare element, x, gate: none of the three is aligned.
        joint = torch.randn(2, 6, 9, sum(widths) + 1, device="cuda").to(dtype)
        weight, _, x, gate = joint.split([widths[1], 1, widths[0], widths[2]], dim=-1)
        inputs = [
            t.unflatten(-1, shape[3:])
            for t, shape in zip((x, weight, gate), scan.shapes, strict=False)
        ]
        tensors = [*inputs, torch.randn(scan.shapes[3], device="cuda").to(dtype)]
        got = scan.run(tensors)
        assert_close(got, scan.run_on_cpu(tensors, got[0]), scan)


def strided(scan: Scan, tensors: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """The same scan with tensors that share or skip elements."""
    x, weight, gate, grad_h = tensors
    return {
        "one image for the batch": [x[:1].expand_as(x), weight, gate, grad_h],
        "one gate for all pixels": [x, weight, gate[:, :1, :1].expand_as(gate), grad_h],
        "one weight for all directions": [
            x,
            weight[:, :, :, :1].expand_as(weight),
            gate,
            grad_h,
        ],
        "the gradient of a sum of directions": [
            x,
            weight,
            gate,
            grad_h[:, :, :, :1].expand_as(grad_h),
        ],
        "the gradient of a sum of everything": [x, weight, gate, grad_h[:1, :1, :1, :1, :1]],
        "channels first": [
            x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
            weight.permute(0, 3, 4, 5, 1, 2).contiguous().permute(0, 4, 5, 1, 2, 3),
            gate.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2),
            grad_h.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2),
        ],
        "columns first": [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors],
        "every other row": [t.repeat_interleave(2, dim=1)[:, ::2] for t in tensors],
        "directions in between": [
            x,
            weight.repeat_interleave(2, dim=3)[:, :, :, 1::2],
            gate.repeat_interleave(3, dim=3)[:, :, :, 2::3],
            grad_h.repeat_interleave(2, dim=3)[:, :, :, ::2],
        ],
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("groups", [8, 1])
def test_any_strides_are_taken(groups, dtype):
    scan = Scan((2, 5, 7, 8), groups)
    tensors = scan.draw(dtype)
    for name, arguments in strided(scan, tensors).items():
        arguments[3] = arguments[3].expand_as(tensors[3])
        got = scan.run(arguments)
        expected = scan.run_on_cpu(arguments, got[0])
        try:
            assert_close(got, expected, scan)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Has PyTorch fill with NaN all memory that it hands out as uninitialized, workspaces too."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "scan",
    [
        Scan((1, 1, 1, 1), 1),
        Scan((2, 5, 7, 3), 3),
        Scan((1, 5, 7, 3), 1, segment_length=2),
        Scan((3, 33, 47, 64), 64),
        Scan((2, 33, 47, 64), 4, segment_length=5),
        Scan((2, 37, 1024, 8), 1),
        Scan((1, 1025, 9, 20), 20),
        Scan((4, 147, 147, 64), 64),
    ],
    ids=str,
)
def test_every_element_is_written_and_no_memory_is_read_before(scan, dtype, poisoned):
    assert torch.empty(3, device="cuda").isnan().all()
    torch.use_deterministic_algorithms(False)
    tensors = scan.draw(dtype)
    expected = scan.run(tensors)
    torch.use_deterministic_algorithms(True)
    got = scan.run(tensors)
    for name, value in zip(RESULTS, got, strict=True):
        assert not value.isnan().any(), name
    assert_same(got, expected)


def requested_bytes() -> int:
    """GPU memory that tensors hold, without what the allocator rounds up."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


def test_inference_keeps_nothing_but_the_result():
    scan = Scan((2, 64, 64, 64), 64)
    x, weight, gate, _ = (t.requires_grad_() for t in scan.draw(torch.bfloat16))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            line_scan(x, weight, gate)
            before = requested_bytes()
            h = line_scan(x, weight, gate)
            assert requested_bytes() - before == h.nbytes
            del h


def test_training_keeps_the_inputs_and_h_alone():
    scan = Scan((2, 64, 64, 64), 64)
    *inputs, grad_h = scan.draw(torch.bfloat16)
    with_gradients(line_scan, inputs, grad_h)
    inputs = [t.requires_grad_() for t in inputs]
    before = requested_bytes()
    h = line_scan(*inputs)
    assert requested_bytes() - before == h.nbytes
    assert {t.data_ptr() for t in h.grad_fn.saved_tensors} == {t.data_ptr() for t in (*inputs, h)}
    gradients = torch.autograd.grad(h, inputs, grad_h)
    # The backward pass's workspace is gone.
    assert requested_bytes() - before == h.nbytes + sum(g.nbytes for g in gradients)


@pytest.fixture
def room() -> Iterator[Callable[[Scan, torch.dtype], None]]:
    """Skips a test whose tensors the GPU has no room for; frees the memory afterwards."""

    def ask_for(scan: Scan, dtype: torch.dtype) -> None:
        x, weight, gate, h = (math.prod(shape) for shape in scan.shapes)
        # Inputs and gradients, h and its gradient, and an adjoint of up to 8 bytes.
        wanted = dtype.itemsize * 2 * (x + weight + gate + h) + 8 * h + 2**32
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if free < wanted:
            gib = f"{wanted / 2**30:.0f} GiB of GPU memory, and {free / 2**30:.0f}"
            pytest.skip(f"needs {gib} are free")

    yield ask_for
    torch.cuda.empty_cache()


def draw_directly(scan: Scan) -> list[Tensor]:
    """Random tensors in bfloat16 that never exist in a wider type."""
    generator = torch.Generator("cuda").manual_seed(0)
    options = dict(generator=generator, device="cuda", dtype=torch.bfloat16)
    return [torch.randn(shape, **options) for shape in scan.shapes]


# Another size may be scanned in another way, and a sum rounded otherwise.
NEAR = dict(rtol=1.6e-2, atol=2e-3)
BEYOND_32_BITS = {
    "weight": Scan((5, 768, 768, 64), 64),
    "h": Scan((9, 1024, 1024, 64), 1),
    "x": Scan((33, 1024, 1024, 64), 1, ("left",)),
}


@pytest.mark.parametrize("name", BEYOND_32_BITS)
def test_a_batch_of_more_elements_than_32_bits_count(name, room):
    scan = BEYOND_32_BITS[name]
    largest = dict(x=0, weight=1, h=2)[name]
    assert math.prod(scan.shapes[largest]) > 2**31
    room(scan, torch.bfloat16)
    tensors = draw_directly(scan)
    got = scan.run(tensors)
    batch = scan.size[0]
    for image in (0, batch // 2, batch - 1):
        one = scan._replace(size=(1, *scan.size[1:]))
        *own, h = (t[image : image + 1].clone() for t in (*tensors, got[0]))
        for value, expected in zip(got, one.run(own, h), strict=True):
            torch.testing.assert_close(value[image : image + 1], expected, **NEAR)


@pytest.mark.parametrize("directions", [ROWS, COLUMNS], ids="-".join)
def test_an_image_of_more_elements_than_32_bits_count(directions, room):
    segment = 16
    scan = Scan((1, 2400, 2400, 64), 64, directions, segment)
    assert math.prod(scan.shapes[1]) > 2**31
    room(scan, torch.bfloat16)
    tensors = draw_directly(scan)
    got = scan.run(tensors)
    # A segment is a scan of its own, forward and backward, so the first, a middle and the last one
    # are to be had without the others.
    axis = 1 if directions == ROWS else 2
    for first in (0, 1200, 2400 - segment):
        size = [*scan.size]
        size[axis] = segment
        one = scan._replace(size=tuple(size))
        *own, h = (t.narrow(axis, first, segment).contiguous() for t in (*tensors, got[0]))
        for value, expected in zip(got, one.run(own, h), strict=True):
            torch.testing.assert_close(value.narrow(axis, first, segment), expected, **NEAR)


# Streams, graphs, devices

FILLING = [
    (Scan((8, 147, 147, 64), 64), torch.bfloat16),
    (Scan((8, 147, 147, 64), 1), torch.bfloat16),
    (Scan((16, 64, 1024, 8), 8), torch.float32),
    (Scan((4, 64, 1024, 8), 1), torch.float32),
    (Scan((1, 128, 128, 64), 64), torch.bfloat16),
    (Scan((2, 200, 300, 72), 24), torch.float16),
]


@pytest.mark.parametrize(
    ("scan", "dtype"), FILLING, ids=[f"{scan}-{str(dtype)[6:]}" for scan, dtype in FILLING]
)
def test_repeats_bit_for_bit(scan, dtype):
    tensors = scan.draw(dtype)
    first = scan.run(tensors)
    assert_same(scan.run(tensors), first)
    # Once more while the GPU has other things to do, for another order of its blocks.
    other = torch.randn(4096, 4096, device="cuda")
    busy = torch.cuda.Stream()
    busy.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(busy):
        for _ in range(5):
            other = other @ other
    assert_same(scan.run(tensors), first)
    torch.cuda.synchronize()


def eager(scan: Scan, tensors: Sequence[Tensor], backward: bool = True) -> tuple[Tensor, ...]:
    """The scan as autograd runs it."""
    *inputs, grad_h = tensors
    if not backward:
        return (line_scan(*inputs, **scan.options),)
    return with_gradients(line_scan, inputs, grad_h, **scan.options)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize(
    ("scan", "dtype"),
    [
        (Scan((2, 33, 47, 64), 64), torch.bfloat16),
        (Scan((1, 20, 1024, 8), 1, segment_length=6), torch.float32),
        (Scan((1, 5, 7, 3), 3), torch.float16),
    ],
    ids=["per channel", "long lines", "odd"],
)
def test_a_captured_graph_gives_the_eager_result_for_new_values(scan, dtype, backward):
    static = scan.draw(dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager(scan, static, backward)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = eager(scan, static, backward)
    for seed in (1, 2, 1):
        values = scan.draw(dtype, seed)
        expected = eager(scan, values, backward)
        with torch.no_grad():
            for t, value in zip(static, values, strict=True):
                t.copy_(value)
            for t in captured:
                t.fill_(torch.nan)
        graph.replay()
        assert_same(captured, expected)


def test_scans_in_several_streams_do_not_disturb_each_other():
    work = [
        (Scan((2, 64, 1024, 8), 8), torch.float32, 0),
        (Scan((4, 147, 147, 64), 1), torch.bfloat16, 0),
        (Scan((2, 64, 1024, 8), 8), torch.float32, 1),
    ]
    tensors = [scan.draw(dtype, seed) for scan, dtype, seed in work]
    expected = [eager(scan, t) for (scan, *_), t in zip(work, tensors, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in work]
    got = []
    for _ in range(4):
        for (scan, *_), stream, t in zip(work, streams, tensors, strict=True):
            with torch.cuda.stream(stream):
                got.append(eager(scan, t))
    torch.cuda.synchronize()
    for i, results in enumerate(got):
        assert_same(results, expected[i % len(work)])


SLEEP = 500_000_000  # cycles: about a quarter of a second


def test_runs_on_the_current_stream():
    scan = Scan((2, 33, 47, 64), 64)
    values = scan.draw(torch.bfloat16)
    expected = eager(scan, values)
    tensors = [torch.zeros_like(t) for t in values]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(SLEEP)
        for t, value in zip(tensors, values, strict=True):
            t.copy_(value)
        # In any other stream, these would see the zeros.
        got = eager(scan, tensors)
    torch.cuda.synchronize()
    assert_same(got, expected)


def test_does_not_wait_for_the_gpu():
    for scan, dtype in (
        (Scan((2, 33, 47, 64), 64), torch.bfloat16),
        (Scan((1, 8, 1024, 8), 1), torch.float32),
        (Scan((1, 2, 5000, 3), 3), torch.float32),
    ):
        tensors = scan.draw(dtype)
        warm = eager(scan, tensors)  # loads the kernels and lets the allocator have its memory
        del warm
        torch.cuda.synchronize()
        slept = torch.cuda.Event()
        try:
            torch.cuda.set_sync_debug_mode("error")
            torch.cuda._sleep(SLEEP)
            slept.record()
            eager(scan, tensors)
            # What PyTorch does not know of would have waited for this.
            waited = slept.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        assert not waited


def test_runs_on_the_device_of_its_inputs():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU only")
    for scan, dtype in ((Scan((2, 33, 47, 64), 64), torch.bfloat16), (LONG[0], torch.float32)):
        tensors = scan.draw(dtype)
        expected = eager(scan, tensors)
        with torch.cuda.device(0):
            got = eager(scan, [t.to("cuda:1") for t in tensors])
            assert torch.cuda.current_device() == 0
        for value, reference in zip(got, expected, strict=True):
            assert value.device == torch.device("cuda:1")
            torch.testing.assert_close(value.cpu(), reference.cpu())


# Precision under autocast, and speed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_leaves_types_as_they_are(dtype):
    scan = Scan((1, 5, 7, 8), 8)
    tensors = scan.draw(dtype)
    expected = eager(scan, tensors)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got = eager(scan, tensors)
    assert [t.dtype for t in got] == [dtype] * 4
    assert_same(got, expected)


@pytest.mark.parametrize("odd", [0, 1, 2], ids=["x", "weight", "input_gate"])
def test_autocast_does_not_mix_types(odd):
    inputs = Scan((1, 5, 7, 8), 8).draw(torch.bfloat16)[:3]
    inputs[odd] = inputs[odd].float()
    with (
        torch.autocast("cuda", dtype=torch.bfloat16),
        pytest.raises(TypeError, match="must have the dtype of x"),
    ):
        line_scan(*inputs)


def milliseconds(function: Callable[[], object], repeats: int = 7) -> float:
    """The median time of a call on the GPU, after two to warm up."""
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[2:])[repeats // 2]


TIMED = [
    (Scan((1, 1, 1, 64), 64), torch.bfloat16),
    (Scan((1, 5, 7, 3), 1), torch.float64),
    (Scan((2, 6, 9, 24), 24), torch.float32),
    (Scan((2, 33, 47, 64), 64), torch.bfloat16),
    (Scan((1, 3, 1500, 4), 4), torch.float32),
    (Scan((1, 200, 2, 384), 8, ROWS), torch.float16),
    (Scan((2, 37, 1024, 8), 1), torch.float32),
    (Scan((1, 128, 128, 64), 64), torch.bfloat16),
    (Scan((8, 64, 64, 64), 16), torch.bfloat16),
    (Scan((16, 64, 1024, 8), 8, ("down",)), torch.float32),
    (Scan((1, 31, 45, 384), 8), torch.bfloat16),
    (Scan((70001, 2, 3, 2), 2), torch.float32),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scan", "dtype"), TIMED, ids=[f"{scan}-{str(dtype)[6:]}" for scan, dtype in TIMED]
)
def test_is_never_slower_than_the_reference(scan, dtype):
    *inputs, grad_h = scan.draw(dtype)
    for name, call in (
        ("forward", lambda function: function(*inputs, **scan.options)),
        ("both", lambda function: with_gradients(function, inputs, grad_h, **scan.options)),
    ):
        op = milliseconds(lambda call=call: call(line_scan))
        reference = milliseconds(lambda call=call: call(line_scan_reference))
        assert op <= reference, f"{name}: {op:.3f} ms, and the reference {reference:.3f} ms"
