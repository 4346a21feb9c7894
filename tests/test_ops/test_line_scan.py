"""The operator against two oracles, its derivatives, its registration, and its refusals."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from cgspn_seg.ops import DIRECTIONS, channels_to_add, line_scan, line_scan_reference

from .oracles import TOLERANCES, dense_scan, make_inputs, relative_error, with_gradients

SUBSETS = [
    order
    for size in range(1, len(DIRECTIONS) + 1)
    for order in itertools.permutations(DIRECTIONS, size)
]
SIZES = [(1, 1), (1, 6), (6, 1), (2, 2), (3, 7), (7, 3), (5, 5)]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


def needs_gpu(test):
    return pytest.mark.gpu(NO_GPU(test))


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.mark.parametrize("segment_length", [None, 1, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("size", [(3, 4), (4, 2)])
def test_equals_the_dense_matrix_oracle(device, size, groups, segment_length):
    inputs = make_inputs(2, *size, channels=4, groups=groups)
    grad_h = torch.randn(2, *size, 4, 4, dtype=torch.float64)
    expected = with_gradients(dense_scan, inputs, grad_h, segment_length=segment_length)
    on_device = [t.to(device) for t in inputs]
    got = with_gradients(line_scan, on_device, grad_h.to(device), segment_length=segment_length)
    for value, reference in zip(got, expected, strict=True):
        assert relative_error(value, reference) < 1e-12


def test_the_reference_equals_the_dense_matrix_oracle():
    inputs = make_inputs(1, 4, 3, channels=4, groups=2)
    grad_h = torch.randn(1, 4, 3, 4, 4, dtype=torch.float64)
    expected = with_gradients(dense_scan, inputs, grad_h, segment_length=3)
    got = with_gradients(line_scan_reference, inputs, grad_h, segment_length=3)
    for value, reference in zip(got, expected, strict=True):
        assert relative_error(value, reference) < 1e-12


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (6, 3), (24, 1), (48, 24), (40, 40)])
def test_equals_the_reference_for_every_dtype_and_grouping(device, dtype, channels, groups):
    inputs = make_inputs(2, 6, 9, channels, groups=groups, dtype=dtype, device=device)
    grad_h = torch.randn(2, 6, 9, 4, channels, dtype=torch.float64).to(device, dtype)
    got = with_gradients(line_scan, inputs, grad_h)
    expected = with_gradients(line_scan_reference, [t.double() for t in inputs], grad_h.double())
    for value, reference in zip(got, expected, strict=True):
        assert value.dtype == dtype
        assert relative_error(value, reference) < TOLERANCES[dtype]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("segment_length", [None, 1, 2, 3, 100])
def test_equals_the_reference_at_every_size_and_segment_length(device, size, segment_length):
    inputs = make_inputs(1, *size, channels=4, groups=2, device=device)
    grad_h = torch.randn(1, *size, 4, 4, dtype=torch.float64, device=device)
    got = with_gradients(line_scan, inputs, grad_h, segment_length=segment_length)
    expected = with_gradients(line_scan_reference, inputs, grad_h, segment_length=segment_length)
    for value, reference in zip(got, expected, strict=True):
        assert relative_error(value, reference) < 1e-12


@pytest.mark.parametrize("directions", SUBSETS, ids="-".join)
def test_equals_the_reference_for_every_subset_and_order_of_directions(device, directions):
    inputs = make_inputs(1, 3, 4, num_directions=len(directions), device=device)
    grad_h = torch.randn_like(inputs[2])
    got = with_gradients(line_scan, inputs, grad_h, directions=directions)
    expected = with_gradients(line_scan_reference, inputs, grad_h, directions=directions)
    for value, reference in zip(got, expected, strict=True):
        assert relative_error(value, reference) < 1e-12


def test_takes_slices_of_a_joint_projection_and_transposed_inputs(device):
    channels, groups = 6, 3
    joint = torch.randn(2, 4, 5, 4 * (3 * groups + channels), dtype=torch.float64, device=device)
    weight, gate = joint.split([4 * 3 * groups, 4 * channels], dim=-1)
    weight, gate = weight.unflatten(-1, (4, 3, groups)), gate.unflatten(-1, (4, channels))
    x = torch.randn(2, channels, 4, 5, dtype=torch.float64, device=device).permute(0, 2, 3, 1)
    assert not x.is_contiguous() and not weight.is_contiguous() and not gate.is_contiguous()
    h = line_scan(x, weight, gate)
    assert h.is_contiguous()
    torch.testing.assert_close(h, line_scan(x.contiguous(), weight.contiguous(), gate.contiguous()))
    torch.testing.assert_close(h, line_scan_reference(x, weight, gate))


def test_takes_a_non_contiguous_gradient(device):
    inputs = make_inputs(2, 3, 4, device=device)
    grad_h = torch.randn(2, 3, 4, 6, 4, dtype=torch.float64, device=device).transpose(3, 4)
    got = with_gradients(line_scan, inputs, grad_h)
    for value, reference in zip(
        got, with_gradients(line_scan_reference, inputs, grad_h), strict=True
    ):
        assert relative_error(value, reference) < 1e-12


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_an_empty_batch_or_image_gives_empty_results(device, shape):
    inputs = make_inputs(*shape, device=device)
    h = line_scan(*inputs)
    assert h.shape == (*shape, 4, 6)
    h.sum().backward()
    assert [t.grad.shape for t in inputs] == [t.shape for t in inputs]


def test_logits_far_from_zero_give_finite_values_and_the_documented_bound(device):
    x, weight, gate = make_inputs(1, 3, 4, channels=2, groups=2, device=device)
    for logit in (1e4, 100.0, -20.0, -100.0, -1e4):
        inputs = [x, torch.full_like(weight, logit), gate]
        got = with_gradients(line_scan, inputs, torch.ones_like(gate))
        expected = with_gradients(line_scan_reference, inputs, torch.ones_like(gate))
        for value, reference in zip(got, expected, strict=True):
            assert torch.isfinite(value).all()
            torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-12)


def test_a_nan_in_the_weights_is_not_hidden(device):
    for dtype in (torch.float32, torch.float64):
        x, weight, gate = make_inputs(1, 3, 4, dtype=dtype, device=device)
        with torch.no_grad():
            weight[0, 1, 1, 0, 1, 0] = torch.nan
        assert line_scan(x, weight, gate)[0, 1, 1, 0, 0].isnan()


def test_the_result_does_not_depend_on_the_number_of_threads():
    inputs = make_inputs(1, 9, 8, channels=64, groups=64, dtype=torch.float32)
    grad_h = torch.randn(1, 9, 8, 4, 64)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            results.append(with_gradients(line_scan, inputs, grad_h))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("segment_length", [None, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradcheck(device, groups, segment_length):
    inputs = make_inputs(1, 3, 4, channels=4, groups=groups, device=device)
    assert gradcheck(lambda *t: line_scan(*t, segment_length=segment_length), inputs)


def test_second_derivatives_are_refused_by_the_operator_and_given_by_the_reference():
    inputs = make_inputs(1, 2, 3, channels=2, groups=2)
    (gradient,) = torch.autograd.grad(line_scan(*inputs).sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="line_scan_reference"):
        gradient.sum().backward()
    assert gradgradcheck(line_scan_reference, inputs)


def test_inference_keeps_nothing_for_a_backward_pass():
    x, weight, gate = (t.detach() for t in make_inputs())
    assert line_scan(x, weight, gate).grad_fn is None
    with torch.inference_mode():
        assert line_scan(x, weight, gate).is_inference()


@pytest.mark.parametrize("segment_length", [None, 2])
def test_opcheck(device, segment_length):
    inputs = make_inputs(1, 3, 4, channels=4, groups=2, device=device)
    torch.library.opcheck(
        torch.ops.cgspn_seg.line_scan.default, (*inputs, [2, 0, 1, 3], segment_length)
    )
    h = line_scan(*inputs, segment_length=segment_length).detach()
    detached = [t.detach() for t in inputs]
    torch.library.opcheck(
        torch.ops.cgspn_seg.line_scan_backward.default,
        (torch.ones_like(h), *detached, h, [0, 1, 2, 3], segment_length),
    )


class ScanModule(torch.nn.Module):
    def forward(self, x, weight, gate):
        return line_scan(x, weight, gate, directions=("left", "down"), segment_length=3).sum(dim=3)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks_forward_and_backward(device, backend):
    inputs = make_inputs(1, 4, 5, num_directions=2, device=device, dtype=torch.float32)
    compiled = torch.compile(ScanModule(), fullgraph=True, backend=backend)
    grad = torch.randn(1, 4, 5, 6, device=device)
    got = with_gradients(compiled, inputs, grad)
    for value, expected in zip(got, with_gradients(ScanModule(), inputs, grad), strict=True):
        torch.testing.assert_close(value, expected)


def test_exports_with_a_dynamic_size():
    x, weight, gate = (t.detach() for t in make_inputs(2, 4, 5, num_directions=2))
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    dims = {1: height, 2: width}
    program = torch.export.export(ScanModule(), (x, weight, gate), dynamic_shapes=(dims,) * 3)
    other = [t.detach() for t in make_inputs(2, 7, 3, num_directions=2)]
    torch.testing.assert_close(program.module()(*other), ScanModule()(*other))


def _shape(t: torch.Tensor, *shape: int) -> torch.Tensor:
    return t.new_zeros(shape)


REFUSALS = {
    "x of three axes": (lambda x, w, g: (x[0], w, g), {}, ValueError, r"x must have 4.*got 3"),
    "x of integers": (
        lambda x, w, g: (x.long(), w, g),
        {},
        TypeError,
        r"x must be float32.*got Long",
    ),
    "weight of another dtype": (
        lambda x, w, g: (x, w.float(), g),
        {},
        TypeError,
        r"weight must have the dtype of x, Double; got Float",
    ),
    "input_gate of another dtype": (
        lambda x, w, g: (x, w, g.bfloat16()),
        {},
        TypeError,
        r"input_gate must have the dtype",
    ),
    "weight without the axis of taps": (
        lambda x, w, g: (x, w[..., 0, :], g),
        {},
        ValueError,
        r"weight must have 6 dimensions, \(B, H, W, D, 3, G\); got 5",
    ),
    "weight of another height": (
        lambda x, w, g: (x, w[:, 1:], g),
        {},
        ValueError,
        r"weight must have shape \(B, H, W, D, 3, G\) = \[2, 4, 5, 4, 3, 6\]; got \[2, 3",
    ),
    "weight with four taps": (
        lambda x, w, g: (x, _shape(w, 2, 4, 5, 4, 4, 6), g),
        {},
        ValueError,
        r"weight must have shape.*got \[2, 4, 5, 4, 4, 6\]",
    ),
    "G that does not divide C": (
        lambda x, w, g: (x, w[..., :4], g),
        {},
        ValueError,
        r"G = 4 channel groups.*must divide the 6 channels",
    ),
    "no group": (lambda x, w, g: (x, w[..., :0], g), {}, ValueError, r"G = 0 channel groups"),
    "input_gate of other channels": (
        lambda x, w, g: (x, w, g[..., :3]),
        {},
        ValueError,
        r"input_gate must have shape \(B, H, W, D, C\)",
    ),
    "more directions than weights": (
        lambda x, w, g: (x, w[:, :, :, :2], g),
        {},
        ValueError,
        r"weight must have shape.*\[2, 4, 5, 4, 3, 6\]; got \[2, 4, 5, 2, 3, 6\]",
    ),
    "an unknown direction": (
        lambda *t: t,
        dict(directions=("down", "up", "right", "north")),
        ValueError,
        r"directions must be out of .*'north'",
    ),
    "a repeated direction": (
        lambda *t: t,
        dict(directions=("down", "up", "right", "down")),
        ValueError,
        r"directions must not repeat; got 'down' twice",
    ),
    "no direction": (lambda *t: t, dict(directions=()), ValueError, r"1 to 4 out of .* got none"),
    "a string for the directions": (
        lambda *t: t,
        dict(directions="down"),
        ValueError,
        r"did you mean \('down',\)",
    ),
    "a segment of no lines": (
        lambda *t: t,
        dict(segment_length=0),
        ValueError,
        r"segment_length must be None or at least 1 line; got 0",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses(case):
    change, options, error, message = REFUSALS[case]
    inputs = change(*(t.detach() for t in make_inputs()))
    with pytest.raises(error, match=message):
        line_scan(*inputs, **options)


@pytest.mark.parametrize("name", ["weight", "input_gate"])
def test_refuses_wrong_shapes_where_a_model_is_only_traced(name):
    shapes = dict(x=(2, 4, 5, 6), weight=(2, 4, 5, 4, 3, 6), input_gate=(2, 4, 5, 4, 6))
    shapes[name] = (2, 4, 9, *shapes[name][3:])
    with pytest.raises(ValueError, match=f"{name} must have shape .*; got "):
        line_scan(*(torch.empty(shape, device="meta") for shape in shapes.values()))


@needs_gpu
def test_refuses_tensors_on_different_devices():
    x, weight, gate = (t.detach() for t in make_inputs())
    with pytest.raises(ValueError, match=r"weight must be on the device of x, cpu; got cuda"):
        line_scan(x, weight.cuda(), gate)


@pytest.mark.parametrize(
    ("channels", "dtype", "added"),
    [
        (162, torch.bfloat16, 30),
        (324, torch.bfloat16, 60),
        (180, torch.bfloat16, 12),
        (144, torch.bfloat16, 0),  # whole accesses, though no whole slices
        (162, torch.float32, 30),
        (180, torch.float32, 0),
    ],
)
def test_channels_are_added_to_whole_slices_where_accesses_are_not_whole(channels, dtype, added):
    shape = (1, 2, 2, channels)
    on_gpu = SimpleNamespace(is_cuda=True, shape=shape, element_size=lambda: dtype.itemsize)
    assert channels_to_add(on_gpu) == added
    assert channels_to_add(torch.empty(shape, dtype=dtype)) == 0
