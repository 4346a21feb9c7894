"""tools/benchmark.py block and model compare mixers."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from cgspn_seg.models import ARCHITECTURES
from cgspn_seg.ops import line_scan

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
ARCH = ARCHITECTURES["tiny"]
C, HIDDEN, LATENT = ARCH.embed_dims, ARCH.feedforward_channels, ARCH.latent_dims
GRID, TOKENS = 3, 9
ONE_ROW = ("--mixers", "cgspn", "--modes", "train", "--batches", "1", "--sizes", "32")
LINEAR = dict(attention=4 * C * C, mlp=2 * C * HIDDEN)
"""Weights of a block's linear maps; each takes two FLOPs a token."""


@pytest.fixture
def parsed(benchmark_tool: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """What the tool makes of a command line, tiny unless it says something else."""

    def parse(part: str, *options: str):
        command = ["benchmark.py", part, "--arch", "tiny", "--device", "cpu", *options]
        monkeypatch.setattr(sys, "argv", command)
        return benchmark_tool.parse_args()

    return parse


@pytest.fixture
def refused(parsed, capsys) -> Callable[..., str]:
    """What the tool says to a command line that it refuses."""

    def parse(*options: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            parsed(*options)
        assert stopped.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return parse


@pytest.fixture
def rows_of(benchmark_tool, parsed, monkeypatch):
    """The rows of a run whose measuring is replaced by a function of what would be measured."""
    import benchmark_rows

    def run(measure: Callable[..., dict], *options: str) -> list[dict]:
        monkeypatch.setattr(benchmark_rows, "measure", measure)
        args = parsed("model", "--depth", "6", "--patch-size", "16", *options)
        return benchmark_tool.run_model(args, write=lambda figures: None)["rows"]

    return run


@pytest.mark.parametrize("part", ["block", "model"])
def test_every_contender_gets_a_row(benchmark_tool, monkeypatch, tmp_path, capsys, part):
    options = "--device cpu --arch tiny --patch-size 16 --sizes 16 32 --batches 2 --seconds 0.01"
    files = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "times.png")]
    depth = ["--depth", "4"] if part == "model" else []
    argv = ["benchmark.py", part, *options.split(), *depth, *files]
    monkeypatch.setattr(sys, "argv", argv)
    benchmark_tool.main()

    figures = json.loads((tmp_path / "rows.json").read_text())
    contenders = ["cgspn", "cgspn-lean", "attention (flash)", "attention (math)"]
    contenders += ["hybrid"] * (part == "model")
    cases = [(m, s, c) for m in ("forward", "train") for s in (16, 32) for c in contenders]
    rows = figures["rows"]
    assert [(r["mode"], r["size"], r["contender"]) for r in rows] == cases
    for row in rows:
        assert row["images_per_s"] == pytest.approx(2e3 / row["ms"]) and row["timing"] == "host"
    forward, train = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert sum(r["ms"] for r in train) > sum(r["ms"] for r in forward) > 0
    assert figures["dtype"] == "fp32" and figures["patch_size"] == 16

    shown = capsys.readouterr().out
    assert "train, 32 px, batch 2" in shown and "attention (math)" in shown
    assert "peak" not in shown, "nothing measures the CPU's memory"
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_mode_is_what_it_says(parsed, mode, dtype):
    from benchmark_rows import run_once

    args = parsed("block", "--dtype", dtype, "--patch-size", "16", "--mixers", "cgspn")
    setting = args.setting
    module, x = setting.build(*args.contenders, mode, 48), setting.make_input(mode, 48, 2)
    assert x.shape == (2, GRID, GRID, C)
    result = run_once(module, x, mode, setting.dtype)
    if mode == "forward":
        assert result.dtype == setting.dtype and result.is_inference() and not module.training
        return
    assert module.training
    leaves = [*module.parameters(), x]
    assert all(leaf.dtype == torch.float32 for leaf in leaves), "autocast is for the operations"
    assert [g.shape for g in result] == [leaf.shape for leaf in leaves]
    assert all(gradient.abs().sum() > 0 for gradient in result)


def flops(spec: str, train: bool, grid: int = GRID) -> int:
    """As a block's row has them."""
    from benchmark_contenders import Contender, build_contender

    from cgspn_seg.ops.flops import count_flops

    with torch.device("meta"):
        block = build_contender("block", Contender(spec), ARCH, 16, 16 * grid)
        x = torch.empty(1, grid, grid, C, requires_grad=True)
    return count_flops(block, x, train)


@pytest.mark.parametrize(("train", "passes"), [(False, 1), (True, 3)])
def test_attention_counts_its_two_products(benchmark_tool, train, passes):
    linear = 2 * TOKENS * sum(LINEAR.values())
    assert flops("attention", train) == passes * (linear + 4 * TOKENS**2 * C)


@pytest.mark.parametrize(("train", "passes", "scan"), [(False, 1, 7 + 14), (True, 3, 22 + 45)])
def test_the_scan_and_the_depthwise_convolution_count(benchmark_tool, train, passes, scan):
    coefficients = LATENT * 4 * (3 + 1 + 1) * LATENT
    linear = 2 * C * C + 2 * C * LATENT + coefficients + LINEAR["mlp"]
    products = 2 * TOKENS * (linear + 9 * C)  # the 3x3 filter of each channel last
    assert flops("cgspn", train) == passes * products + TOKENS * 4 * LATENT * scan


class Scan(nn.Module):
    """The operator alone; one set of coefficients for all channels."""

    def forward(self, x: Tensor) -> Tensor:
        weight = x.new_zeros(*x.shape[:3], 2, 3, 1)
        return line_scan(x, weight, x.new_ones(*x.shape[:3], 2, C), directions=("up", "left"))


def test_shared_coefficients_are_normalized_once(benchmark_tool):
    from cgspn_seg.ops.flops import count_flops

    x = torch.empty(2, 5, 4, C, device="meta")
    assert count_flops(Scan(), x, train=False) == 2 * 5 * 4 * 2 * (7 * C + 14)


@pytest.mark.parametrize(
    ("num_layers", "layers"), [(27, [8, 17, 26]), (12, [3, 7, 11]), (4, [0, 1, 3])]
)
def test_a_hybrid_attends_in_three_layers(benchmark_tool, num_layers, layers):
    from benchmark_contenders import hybrid_layers

    assert hybrid_layers(num_layers) == layers


def test_options_reach_the_mixer_and_the_block(parsed):
    spec = (
        'cgspn:directions=("down","up"),latent_dims=16,state_norm=False,'
        "local_perception=mlp,eager=True"
    )
    args = parsed("block", "--mixers", spec)
    (contender,) = args.contenders
    block = args.setting.build(contender, "forward", 28)
    assert block.mixer.directions == ("down", "up") and block.mixer.up.in_features == 16
    assert block.mixer.state_norm is None
    assert block.mixer_lpu is None and block.mlp_lpu is not None
    assert contender.label == spec and contender.eager


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["block", "--mixers", "cgspm"], "got 'cgspm'; did you mean 'cgspn'?"),
        (
            ["block", "--mixers", "hybrid"],
            "out of ['attention', 'cgspn', 'cgspn-lean', 'gspn', 'gspn2']",
        ),
        (["model", "--mixers", "cgspn:latent=3"], "has no option 'latent'"),
        (["model", "--mixers", "hybrid:latent=3"], "has no option 'latent'"),
        (["block", "--mixers", "cgspn:latent_dims=(3"], "expected cgspn:key=value,key=value"),
        (["block", "--mixers", "cgspn:3"], "expected cgspn:key=value,key=value"),
        (["block", "--mixers", "cgspn:local_perception=norm"], "local_perception must be"),
        (["model", "--mixers", "hybrid", "--depth", "3"], "and the encoder has 3"),
        (["model", "--arch", "huge"], "--arch: arch must be one of"),
        (["model", "--sizes", "224", "13"], "13 is less than a patch, 14"),
        (["model", "--batches", "0"], "invalid positive_int value: '0'"),
        (["model", "--plot", "times.pdf"], "ends in .png, got times.pdf"),
        (["model", "--json", "no/such/folder/rows.json"], "does not exist"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(refused, options, said):
    assert said in refused(*options)


def test_memory_that_runs_out_is_a_row(rows_of, benchmark_tool):
    tried = []

    def measure(setting, contender, mode, size, batch):
        tried.append((contender.label, size, batch))
        if contender.mixer == "attention" and size * batch > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 240.00 GiB")
        return dict(ms=2.0 * batch, timing="graph", peak_gib=1.0)

    options = "--mixers cgspn attention --attention math --modes forward --batches 2 4 --sizes 32"
    rows = rows_of(measure, *options.split(), "64", "96")
    errors = {(r["size"], r["batch"]): r.get("error") for r in rows if r["mixer"] == "attention"}
    assert errors.pop((32, 2)) is None
    assert set(errors.values()) == {"out of memory"} and len(errors) == 5
    assert ("attention (math)", 96, 2) in tried, "larger images, no more of them"
    assert ("attention (math)", 64, 4) in tried, "its images are larger, as many ran out"
    assert ("attention (math)", 96, 4) not in tried, "more and larger images than (64, 2)"
    assert [r["ms"] for r in rows if r["mixer"] == "cgspn"] == [4.0, 8.0] * 3
    assert [r.get("vs_attention") for r in rows if r["mixer"] == "cgspn"] == [1.0, *[None] * 5]
    table = benchmark_tool.model_table(
        dict(part="model", arch="tiny", layers=6, patch_size=16, dtype="bf16", device="H200")
        | dict(rows=rows)
    )
    assert table.columns[1]._cells.count("out of memory") == 5


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("No available kernel. Aborting execution."), "not available"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 4 TB"), "out of memory"),
        (RuntimeError("int is too small\nmore"), "failed: int is too small"),
    ],
)
def test_other_refusals_are_rows_as_well(rows_of, error, said):
    def measure(*_):
        raise error

    (row,) = rows_of(measure, *ONE_ROW)
    assert row["error"] == said and row["parameters"] > 0 and row["flops_per_image"] > 0


def test_what_breaks_the_gpu_is_no_row(rows_of):
    def measure(*_):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError):
        rows_of(measure, *ONE_ROW)


def test_the_hybrid_takes_the_attention_that_was_fastest(rows_of):
    took = []

    def measure(setting, contender, mode, size, batch):
        if contender.mixer == "hybrid":
            took.append(contender.backend)
        fastest = "math" if size == 32 else "flash"
        return dict(ms=1.0 if contender.backend == fastest else 3.0, timing="graph")

    options = "--mixers hybrid attention --attention flash math --modes forward --batches 1"
    rows = rows_of(measure, *options.split(), "--sizes", "32", "64")
    assert took == ["math", "flash"]
    assert [row["contender"] for row in rows[:3]] == [
        "attention (flash)",
        "attention (math)",
        "hybrid",
    ]
    assert [row["vs_attention"] for row in rows[:3]] == [1 / 3, 1, 1]


def test_a_run_that_is_ended_leaves_its_rows(benchmark_tool, parsed, monkeypatch):
    import benchmark_rows

    def measure(setting, contender, mode, size, batch):
        if size == 64:
            raise KeyboardInterrupt
        return dict(ms=1.0, timing="graph")

    monkeypatch.setattr(benchmark_rows, "measure", measure)
    options = ["--mixers", "cgspn", "--batches", "1", "--sizes", "32", "64", "--patch-size", "16"]
    written = []
    benchmark_tool.run_model(parsed("block", *options), lambda f: written.append(len(f["rows"])))
    assert written == [1]


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("part", ["block", "model"])
def test_on_a_gpu_rows_are_replays_of_a_graph(benchmark_tool, monkeypatch, tmp_path: Path, part):
    options = "--device cuda --arch tiny --patch-size 16 --sizes 64 --batches 2 --seconds 0.1"
    argv = ["benchmark.py", part, *options.split(), "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", argv)
    benchmark_tool.main()
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    measured = [row for row in rows if "error" not in row]
    assert {row["error"] for row in rows if "error" in row} <= {"not available"}
    assert {row["mode"] for row in measured if row["mixer"] == "cgspn"} == {"forward", "train"}
    for row in measured:
        assert row["timing"] == "graph" and row["ms"] > 0, row["contender"]
        # Parameters are there, in float32 with their gradients when training.
        size = 8 if row["mode"] == "train" else 2
        assert row["peak_gib"] * 2**30 > size * row["parameters"]
    if part == "model":
        backends = {row["attention"] for row in measured if row["mixer"] == "hybrid"}
        assert backends and None not in backends


@pytest.mark.gpu
@NO_GPU
def test_what_cannot_be_captured_is_launched(benchmark_tool, parsed, monkeypatch):
    import benchmark_rows

    def graph_ms(calls, runs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(benchmark_rows, "graph_ms", graph_ms)
    options = "--mixers cgspn --modes train --batches 1 --sizes 64 --patch-size 16 --seconds 0.1"
    args = parsed("block", *options.split(), "--device", "cuda")
    (row,) = benchmark_tool.run_model(args, write=lambda figures: None)["rows"]
    assert row["timing"] == "events" and row["ms"] > 0
