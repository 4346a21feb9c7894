"""The op on the GPU and memory: strides, alignment, what is written, what is kept, huge tensors."""

import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from cgspn_seg.ops import line_scan

from .oracles import with_gradients
from .scans import COLUMNS, RESULTS, ROWS, Scan, assert_close, assert_same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible"),
]


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
