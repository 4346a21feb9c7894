"""tools/benchmark.py encoders puts whole encoders side by side."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")


@pytest.fixture
def parsed(benchmark_tool, monkeypatch):
    """What the tool makes of a command line."""

    def parse(*options: str):
        monkeypatch.setattr(
            sys, "argv", ["benchmark.py", "encoders", "--device", "cpu", "--threads", "1", *options]
        )
        return benchmark_tool.parse_args()

    return parse


@pytest.fixture
def figures_of(benchmark_tool, parsed, monkeypatch):
    """The figures of a run whose measuring is replaced by a function of what would be measured."""
    import benchmark_rows

    def run(measure: Callable[..., dict], *options: str) -> dict:
        monkeypatch.setattr(benchmark_rows, "measure", measure)
        return benchmark_tool.run_encoders(parsed(*options), write=lambda figures: None)

    return run


def constant(setting, contender, mode, size, batch) -> dict:
    """Stands for a measurement."""
    return dict(ms=2.0, timing="host")


def test_names_are_those_of_every_size(benchmark_tool):
    from benchmark_named import find_encoders as find

    plain = ["tiny", "small", "base", "large", "so400m"]
    stages = ["tiny", "small", "base"]
    families = dict.fromkeys(["cgspn", "cgspn-lean", "vit"], plain)
    families |= dict.fromkeys(["gspn", "gspn2", "swin", "convnext"], stages)
    assert [e.label for e in find(None)] == [f"{f}-{a}" for f in families for a in families[f]]
    assert [e.label for e in find(["swin-base", "vit-so400m", "swin-base"])] == [
        "swin-base",
        "vit-so400m",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--encoders", "swin-tny"], "got 'swin-tny'; did you mean 'swin-tiny'?"),
        (["--encoders", "gspn2-large"], "out of ['cgspn-tiny', 'cgspn-small',"),
        (["--sizes", "512", "31"], "31 is less than the coarsest stride, 32"),
        (["--json", "no/such/folder/rows.json"], "does not exist"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(parsed, capsys, options, said):
    with pytest.raises(SystemExit) as stopped:
        parsed(*options)
    assert stopped.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_every_encoder_gets_a_row(benchmark_tool, monkeypatch, tmp_path, capsys):
    names = ["cgspn-tiny", "gspn2-tiny", "vit-tiny", "swin-tiny"]
    options = "--device cpu --threads 1 --sizes 32 --batches 2 --seconds 0.01 --encoders"
    file = tmp_path / "rows.json"
    argv = ["benchmark.py", "encoders", *options.split(), *names, "--json", str(file)]
    monkeypatch.setattr(sys, "argv", argv)
    benchmark_tool.main()

    figures = json.loads(file.read_text())
    assert (figures["dtype"], figures["layout"]) == ("fp32", "channels_last")
    rows = figures["rows"]
    cases = [(mode, name) for mode in ("forward", "train") for name in names]
    assert [(row["mode"], row["contender"]) for row in rows] == cases
    for row in rows:
        assert row["images_per_s"] == pytest.approx(2e3 / row["ms"]) and row["timing"] == "host"
        assert row["parameters"] > 0 and row["macs_per_image"] > 0
    forward, train = rows[: len(names)], rows[len(names) :]
    assert sum(r["ms"] for r in train) > sum(r["ms"] for r in forward) > 0
    assert {row["library"].split()[0] for row in rows} == {"cgspn_seg", "mmseg"}

    shown = capsys.readouterr().out
    assert "train, 32 px, batch 2" in shown and "GMAC/image" in shown and "mmseg 1." in shown
    assert all(shown.count(name) == 2 for name in names)


def test_counting_alone_measures_nothing(figures_of, benchmark_tool, capsys):
    def measure(*_):
        raise AssertionError("something is measured")

    figures = figures_of(
        measure, "--count-only", "--encoders", "cgspn-tiny", "vit-tiny", "--sizes", "64", "32"
    )
    rows = figures["rows"]
    assert [(r["size"], r["contender"]) for r in rows] == [
        (size, name) for size in (32, 64) for name in ("cgspn-tiny", "vit-tiny")
    ]
    scanning, attending = (
        rows[i + 2]["macs_per_image"] / rows[i]["macs_per_image"] for i in (0, 1)
    )
    assert scanning == pytest.approx(4) and attending > 4
    table = benchmark_tool.encoder_table(figures)
    headers = [column.header for column in table.columns]
    assert headers == ["encoder", "Mparams", "GMAC/image", "library"]


def test_an_encoder_without_a_library_is_a_row(figures_of, benchmark_tool, monkeypatch):
    monkeypatch.setattr("benchmark_named.find_spec", lambda name: None)
    options = "--encoders convnext-tiny cgspn-tiny --modes forward --sizes 32 --batches 1"
    figures = figures_of(constant, *options.split())
    missing, ours = figures["rows"]
    assert missing["error"] == "not available: needs mmpretrain or timm" and "ms" not in missing
    assert ours["ms"] == 2
    table = benchmark_tool.encoder_table(figures)
    assert "not available: needs mmpretrain or timm" in table.columns[1]._cells
    (missing, _) = figures_of(constant, *options.split(), "--count-only")["rows"]
    assert missing["error"] == "not available: needs mmpretrain or timm"


@pytest.mark.parametrize("found", ["mmpretrain", "timm"])
def test_convnext_is_from_the_first_library_that_is_there(benchmark_tool, monkeypatch, found):
    from benchmark_named import convnext_library

    there = {"mmpretrain", "timm"} if found == "mmpretrain" else {"timm"}
    monkeypatch.setattr("benchmark_named.find_spec", lambda name: name in there or None)
    assert convnext_library() == found


def test_a_library_that_fails_is_a_row(figures_of, monkeypatch):
    from benchmark_named import FAMILIES

    def build(arch, size):
        raise AssertionError("MMCV==2.3.0 is used but incompatible\nmore")

    monkeypatch.setitem(FAMILIES, "swin", replace(FAMILIES["swin"], build=build))
    options = "--encoders swin-base --sizes 48 --batches 1 8"
    figures = figures_of(constant, *options.split())
    said = "failed: mmseg cannot build swin-base: AssertionError: MMCV==2.3.0 is used but "
    assert [row["error"] for row in figures["rows"]] == [said + "incompatible"] * 4


def test_memory_that_runs_out_is_a_row(figures_of):
    tried = []

    def measure(setting, contender, mode, size, batch):
        tried.append((contender.label, size, batch))
        if contender.label == "vit-tiny" and batch > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 240.00 GiB")
        return constant(setting, contender, mode, size, batch)

    options = "--encoders vit-tiny cgspn-tiny --modes forward --sizes 32 64 --batches 1 2 4"
    rows = figures_of(measure, *options.split())["rows"]
    errors = {(r["size"], r["batch"]) for r in rows if r.get("error") == "out of memory"}
    assert errors == {(32, 2), (32, 4), (64, 2), (64, 4)}
    assert ("vit-tiny", 64, 2) in tried and ("vit-tiny", 64, 4) not in tried
    assert sum("ms" in row for row in rows) == 8


def test_encoders_are_in_float32_under_autocast(parsed):
    from benchmark_rows import run_once

    args = parsed("--dtype", "bf16", "--encoders", "swin-tiny")
    images = args.setting.make_input("forward", 32, 2)
    model = args.setting.build(*args.contenders, "forward", 32)
    assert images.dtype == torch.float32 and not model.training
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert args.setting.build(*args.contenders, "train", 32).training
    features = run_once(model.patch_embed.projection, images, "forward", args.setting.dtype)
    assert features.dtype == torch.bfloat16 and features.is_inference()


def test_the_backend_of_attention_is_that_of_the_vit_alone(figures_of):
    def measure(setting, contender, mode, size, batch):
        flash = torch.backends.cuda.flash_sdp_enabled()
        return dict(ms=1.0 if flash else 2.0, timing="host")

    options = "--attention math --encoders vit-tiny cgspn-tiny --sizes 32 --batches 1"
    figures = figures_of(measure, *options.split(), "--modes", "forward")
    assert figures["attention"] == "math" and [row["ms"] for row in figures["rows"]] == [2, 1]


@pytest.mark.gpu
@NO_GPU
def test_on_a_gpu_time_and_memory_are_measured(benchmark_tool, monkeypatch, tmp_path):
    options = "--device cuda --sizes 64 --batches 2 --seconds 0.1 --encoders"
    names = ["cgspn-tiny", "gspn-tiny", "gspn2-tiny", "vit-tiny", "swin-tiny"]
    file = tmp_path / "rows.json"
    argv = ["benchmark.py", "encoders", *options.split(), *names, "--json", str(file)]
    monkeypatch.setattr(sys, "argv", argv)
    benchmark_tool.main()
    figures = json.loads(file.read_text())
    assert figures["dtype"] == "bf16" and len(figures["rows"]) == 2 * len(names)
    for row in figures["rows"]:
        assert "error" not in row and row["ms"] > 0, row
        assert row["timing"] == "graph" or row["contender"] == "swin-tiny", row
        # Parameters in float32, with their gradients when training.
        size = 8 if row["mode"] == "train" else 4
        assert row["peak_gib"] * 2**30 > size * row["parameters"]
