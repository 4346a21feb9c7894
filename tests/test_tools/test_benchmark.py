"""tools/benchmark.py measures, prints and writes what it says."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from cgspn_seg.ops import DIRECTIONS, direction_indices, line_scan

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")


@pytest.fixture
def measured(repository: Path, tmp_path: Path):
    """Runs the tool's `op` with options; returns what it printed, and its figures."""

    def run(*options: str) -> tuple[str, dict]:
        file = tmp_path / "op.json"
        command = [sys.executable, repository / "tools/benchmark.py", "op", *options]
        command += ["--json", file]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return shown, json.loads(file.read_text())

    return run


def printed(benchmark_tool: ModuleType, figures: dict) -> str:
    """The table as it goes to a file."""
    console = Console(width=benchmark_tool.WIDTH)
    with console.capture() as capture:
        console.print(benchmark_tool.op_table(figures))
    return capture.get()


def test_op_writes_times_and_ratios_of_every_grouping(measured):
    options = "--threads 1 --shape 2 24 20 32 --directions up left --seconds 0.1 --groups 32 1"
    shown, figures = measured(*options.split())
    assert (
        "2×24×20×32" in shown
        and "fp32, up + left, G = 32" in shown
        and "forward + backward" in shown
    )
    assert figures["threads"] == 1
    assert [row["groups"] for row in figures["rows"]] == [32, 1]
    for row in figures["rows"]:
        forward, both = row["passes"]["forward"], row["passes"]["forward_backward"]
        assert 0 < forward["ms"] < both["ms"]
        assert both["reference_ratio"] == both["reference_ms"] / both["ms"]
        assert both["reference_ratio"] > 1, "slower than one PyTorch expression per line"


@pytest.mark.gpu
@NO_GPU
def test_op_on_a_gpu_says_how_near_the_memory_it_comes(measured):
    options = "--device cuda --shape 4 24 20 32 --directions right --dtype bf16 --groups 32 1"
    shown, figures = measured(*options.split(), "--runs", "30")
    assert "of copy" in shown and "µs/line" in shown
    assert figures["copy_gb_per_s"] > 1
    for row in figures["rows"]:
        forward = row["passes"]["forward"]
        assert forward["us_per_line"] == pytest.approx(forward["ms"] * 1e3 / 20)
        for of_pass in row["passes"].values():
            seconds = of_pass["ms"] * 1e-3
            assert of_pass["gb_per_s"] == pytest.approx(of_pass["min_bytes"] / seconds * 1e-9)
            share = of_pass["gb_per_s"] / figures["copy_gb_per_s"]
            assert 0 < of_pass["copy_share"] == pytest.approx(share)
            assert of_pass["reference_ratio"] > 1


@pytest.mark.gpu
@NO_GPU
def test_a_graph_times_one_call(benchmark_tool):
    from benchmark_timing import event_ms, graph_ms

    tensors = [torch.randn(2**25, device="cuda") for _ in range(3)]
    one_by_one = event_ms(tensors[0].exp, 30)
    assert graph_ms([tensor.exp for tensor in tensors], 30) == pytest.approx(one_by_one, rel=0.3)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize(("dtype", "directions"), [("fp32", ("up",)), ("bf16", DIRECTIONS)])
def test_bytes_count_every_tensor_once(benchmark_tool, dtype, directions, groups):
    case = benchmark_tool.Case((2, 5, 3, 8), dtype, directions, groups)
    *tensors, grad_h = case.inputs(torch.device("cpu"))
    indices = direction_indices(directions)
    h = line_scan(*tensors, directions=directions)
    gradients = torch.ops.cgspn_seg.line_scan_backward(grad_h, *tensors, h, indices)
    assert case.min_bytes() == dict(
        forward=sum(t.nbytes for t in (*tensors, h)),
        backward=sum(t.nbytes for t in (grad_h, *tensors, h, *gradients)),
    )


def test_lines_are_those_of_the_longest_direction(benchmark_tool):
    def lines(*directions: str) -> int:
        return benchmark_tool.Case((1, 4, 9, 8), "fp32", directions, 1).lines()

    assert (lines("down"), lines("left"), lines("up", "right")) == (4, 9, 9)


def test_small_inputs_are_rotated_until_the_cache_holds_none(benchmark_tool):
    from benchmark_timing import MAX_ROTATION, rotation

    megabyte = 2**20
    assert rotation(240 * megabyte, l2_bytes=60 * megabyte) == 1
    assert rotation(239 * megabyte, l2_bytes=60 * megabyte) == 2
    assert rotation(36 * megabyte, l2_bytes=60 * megabyte) == 7
    assert rotation(1, l2_bytes=60 * megabyte) == MAX_ROTATION


def test_the_goals_are_one_preset(benchmark_tool, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "op", "--preset", "goals"])
    cases = benchmark_tool.cases_of(benchmark_tool.parse_args())
    assert benchmark_tool.Case((16, 1024, 1024, 8), "fp32", ("down",), 1) in cases
    assert benchmark_tool.Case((32, 147, 147, 64), "bf16", DIRECTIONS, 64) in cases


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--preset", "goals", "--dtype", "bf16"], "its cases say the dtype themselves"),
        (["--preset", "goals", "--shape", "1", "2", "3", "4"], "say the shape themselves"),
        (["--device", "mps"], "expected cpu or cuda, got mps"),
        pytest.param(
            ["--device", "cuda"],
            "PyTorch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible"),
        ),
    ],
)
def test_options_that_cannot_be_met_are_refused(benchmark_tool, monkeypatch, capsys, options, said):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "op", *options])
    with pytest.raises(SystemExit):
        benchmark_tool.parse_args()
    assert said in capsys.readouterr().err


class NaiveKernel:
    """The interface of GSPN's extension, with its recurrence a column at a time."""

    def scan(self, x: Tensor, gate: Tensor, *weights: Tensor) -> Tensor:
        columns = []
        for j in range(x.shape[3]):
            column = gate[..., j] * x[..., j]
            if columns:
                padded = F.pad(columns[-1], (1, 1))
                neighbours = padded[..., :-2], padded[..., 1:-1], padded[..., 2:]
                column = column + sum(
                    w[..., j] * n for w, n in zip(weights, neighbours, strict=True)
                )
            columns.append(column)
        return torch.stack(columns, dim=3)

    def forward(self, lines: int, *tensors: Tensor) -> None:
        *inputs, h = tensors
        assert lines == h.shape[3] and all(tensor.is_contiguous() for tensor in tensors)
        h.copy_(self.scan(*inputs))

    def backward(self, lines: int, h: Tensor, grad_h: Tensor, *tensors: Tensor) -> None:
        inputs = [tensor.detach().requires_grad_() for tensor in tensors[:5]]
        gradients = torch.autograd.grad(self.scan(*inputs), inputs, grad_h)
        for out, gradient in zip(tensors[5:], gradients, strict=True):
            out.copy_(gradient)
        grad_h.zero_()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("groups", [1, 4])
def test_the_original_kernel_gets_the_same_problem(benchmark_tool, direction, groups):
    from benchmark_original import OriginalProblem

    torch.manual_seed(0)  # in float32, unlucky values can miss the tolerance
    *tensors, grad_h = benchmark_tool.Case((2, 5, 3, 4), "fp32", (direction,), groups).inputs("cpu")
    problem = OriginalProblem(NaiveKernel(), direction, [*tensors, grad_h])
    h = line_scan(*tensors, directions=(direction,))
    problem.forward()
    problem.check(h)
    with pytest.raises(RuntimeError, match="differ by"):
        problem.check(h + 0.1 * torch.randn_like(h))

    problem.backward()
    indices = direction_indices((direction,))
    grad_x, _, grad_gate = torch.ops.cgspn_seg.line_scan_backward(grad_h, *tensors, h, indices)
    torch.testing.assert_close(problem.gradients[0], problem.arranged(grad_x))
    torch.testing.assert_close(problem.gradients[1], problem.arranged(grad_gate[..., 0, :]))
    problem.restore_gradient()
    torch.testing.assert_close(problem.adjoint, problem.arranged(grad_h[..., 0, :]))


@pytest.fixture
def no_original(benchmark_tool, monkeypatch) -> None:
    """GSPN's extension cannot be imported."""
    monkeypatch.setattr("benchmark_original.import_original", lambda: None)


def test_without_the_original_kernel_its_times_are_quoted(benchmark_tool, no_original):
    from benchmark_original import original_ms

    # Only the shape counts.
    inputs = [torch.empty(16, 1024, 1024, 8, device="meta")] * 4
    assert original_ms("fp32", "down", inputs, runs=30) == dict(
        forward=dict(ms=33.4, quoted=True), backward=dict(ms=80.1, quoted=True)
    )
    assert original_ms("bf16", "down", inputs, runs=30) == {}


def test_the_original_kernel_is_timed_where_it_is(benchmark_tool, monkeypatch):
    import benchmark_original

    def event_ms(call, runs, prepare=None):
        call()
        return 2.0

    monkeypatch.setattr(benchmark_original, "import_original", NaiveKernel)
    monkeypatch.setattr(benchmark_original, "event_ms", event_ms)
    inputs = benchmark_tool.Case((2, 5, 3, 4), "fp32", ("up",), 4).inputs("cpu")
    times = benchmark_original.original_ms("fp32", "up", inputs, runs=30)
    assert times["backward"] == dict(ms=2.0, quoted=False)


def figures_of_a_gpu() -> dict:
    """As benchmark_op returns them, for two cases."""
    forward = dict(ms=0.876, min_bytes=3221225472, gb_per_s=3677.0, copy_share=0.861)
    forward |= dict(us_per_line=0.855, reference_ms=310.0, reference_ratio=353.9)
    backward = dict(
        ms=189.0,
        reference_ms=23100.0,
        reference_ratio=122.2,
        min_bytes=6442450944,
        gb_per_s=3390.0,
        copy_share=0.79,
    )
    quoted = dict(original_ms=33.4, original_ratio=38.13, original_quoted=True)
    case = dict(shape=(16, 1024, 1024, 128), dtype="fp32", groups=128)
    rows = [
        dict(case, directions=("down",), passes=dict(forward=forward | quoted, backward=backward)),
        dict(case, directions=DIRECTIONS, passes=dict(forward=forward, backward=backward)),
    ]
    facts = dict(device="NVIDIA H200", runs=50, copy_gb_per_s=4270.0)
    return facts | dict(rows=rows)


def test_the_table_marks_what_was_not_measured_in_this_run(benchmark_tool):
    shown = printed(benchmark_tool, figures_of_a_gpu())
    assert "38.1×*" in shown and "* against times measured on one H200, not in this run" in shown
    assert "86.1%" in shown and "4270 GB/s" in shown and "all four" in shown
    assert "–" in shown, "what was not measured is a dash"
    assert "…" not in shown and "fp32, all four, G = 128 " in shown, "something is cut"


def test_the_table_leaves_out_what_no_case_has(benchmark_tool):
    figures = figures_of_a_gpu()
    del figures["rows"][0]
    shown = printed(benchmark_tool, figures)
    assert "GSPN" not in shown and "*" not in shown


def test_memory_that_runs_out_leaves_a_dash(benchmark_tool, no_original, monkeypatch):
    import benchmark_op

    def run_out(*_):
        raise torch.OutOfMemoryError

    times = dict(forward=dict(ms=1.0), backward=dict(ms=2.0))
    monkeypatch.setattr(benchmark_op, "op_ms", lambda *_: times)
    monkeypatch.setattr(benchmark_op, "reference_ms", run_out)
    case = benchmark_tool.Case((1, 4, 4, 8), "fp32", ("up",), 8)
    device = torch.device("cpu")
    options = dict(bandwidth=1e9, runs=30, reference=True)
    passes = benchmark_op.measure_on_gpu(case, device, **options)
    assert passes["forward"]["us_per_line"] == 250
    assert "reference_ms" not in passes["forward"]
