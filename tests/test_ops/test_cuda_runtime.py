"""The op on the GPU in PyTorch: streams, graphs, devices, autocast, and its speed."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from cgspn_seg.ops import line_scan, line_scan_reference

from .oracles import with_gradients
from .scans import ROWS, Scan, assert_same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible"),
]

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
    for scan, dtype in (
        (Scan((2, 33, 47, 64), 64), torch.bfloat16),
        (Scan((1, 3, 1500, 4), 4), torch.float32),
    ):
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
