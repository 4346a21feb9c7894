"""tools/demo.py: its configs, its steps, and a run of a few iterations."""

import ast
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from mmengine.config import Config
from mmseg.registry import MODELS
from PIL import Image
from rich.progress import Progress

ADE20K = "cgspn/cgspn-tiny_upernet_8xb2-80k_ade20k-512x512.py"


@pytest.fixture(scope="module")
def demo(repository: Path) -> Iterator[ModuleType]:
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location("demo", repository / "tools" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(repository / "tools")  # as for any script in there
        patch.setitem(sys.modules, "demo", module)  # dataclasses look themselves up
        spec.loader.exec_module(module)
        yield module


def base_of(config: Path) -> Path:
    """The file that a config's `_base_` names."""
    for node in ast.parse(config.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "_base_":
            return (config.parent / ast.literal_eval(node.value)).resolve()
    raise AssertionError(f"{config} has no _base_")


def test_the_configs_inherit_the_ade20k_one(demo, repository):
    model, twin = (variant.config for variant in demo.VARIANTS)
    assert base_of(model) == repository / "configs" / ADE20K
    assert base_of(twin) == model
    cfg, ade20k = Config.fromfile(model), Config.fromfile(base_of(model))
    for key in ("neck", "decode_head", "auxiliary_head", "backbone"):
        assert cfg.model[key].type == ade20k.model[key].type
    assert cfg.model.neck.rescales == ade20k.model.neck.rescales
    assert cfg.train_dataloader.dataset.data_prefix == ade20k.train_dataloader.dataset.data_prefix
    for key in ("val_evaluator", "custom_hooks", "env_cfg"):
        assert cfg[key] == ade20k[key]


def test_the_twin_lacks_propagation_and_nothing_else(demo, mmseg_scope):
    model, twin = (Config.fromfile(variant.config) for variant in demo.VARIANTS)
    built = [MODELS.build(cfg.model.backbone) for cfg in (model, twin)]
    shapes = [{name: p.shape for name, p in m.state_dict().items()} for m in built]
    assert shapes[0] == shapes[1]
    assert [block.mixer.segment_length for block in built[0].blocks] == [None] * 4
    assert [block.mixer.segment_length for block in built[1].blocks] == [1] * 4
    assert twin.model.backbone.pop("mixer") == dict(type="cgspn", segment_length=1)
    model.model.backbone.pop("mixer", None)
    assert model.to_dict() == twin.to_dict()


def test_the_mazes_are_drawn_where_the_configs_look_for_them(demo, monkeypatch, tmp_path):
    for data in (None, str(tmp_path)):
        if data is None:
            monkeypatch.delenv("CGSPN_DATA", raising=False)
        else:
            monkeypatch.setenv("CGSPN_DATA", data)
        for variant in demo.VARIANTS:
            cfg = Config.fromfile(variant.config)
            for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
                assert Path(loader.dataset.data_root) == demo.default_folder()


def test_another_length_stretches_the_whole_schedule(demo):
    cfg = Config.fromfile(demo.VARIANTS[0].config)
    as_is = cfg.to_dict()
    pairs = (option.split("=") for option in demo.shortened_schedule(cfg.train_cfg.max_iters))
    cfg.merge_from_dict({key: int(value) for key, value in pairs})
    assert cfg.to_dict() == as_is


def steps_of(demo: ModuleType, folder: Path, programs: dict[str, str]) -> list:
    """Steps that run programs in the place of tools."""
    progress = Progress(disable=True)
    for name, program in programs.items():
        (folder / f"{name}.py").write_text(program)
    return [demo.Step(n, [folder / f"{n}.py"], folder / f"{n}.out", progress) for n in programs]


def test_a_step_that_fails_is_quoted_with_its_end(demo, tmp_path):
    program = "import sys; print(*range(100), sep='\\n'); sys.exit('no more disk')"
    steps = steps_of(demo, tmp_path, dict(train=program))
    with pytest.raises(demo.StepFailed) as failed:
        demo.run_side_by_side(steps)
    said = str(failed.value).splitlines()
    assert said[: demo.LOG_TAIL] == [*map(str, range(81, 100)), "no more disk"]
    assert said[-1] == f"train: exit code 1; all that was said is in {tmp_path / 'train.out'}"


def test_a_step_that_fails_ends_those_beside_it(demo, tmp_path):
    lasting = f"import time; time.sleep(3); open({str(tmp_path / 'done')!r}, 'w')"
    steps = steps_of(demo, tmp_path, dict(lasting=lasting, failing="raise SystemExit(3)"))
    begin = time.monotonic()
    with pytest.raises(demo.StepFailed, match="failing: exit code 3"):
        demo.run_side_by_side(steps)
    assert time.monotonic() - begin < 2
    assert not (tmp_path / "done").exists()


def start(repository: Path, folder: Path, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, repository / "tools" / "demo.py", *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CGSPN_DATA": str(folder / "data")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_short_run_goes_through_all_steps(repository, tmp_path):
    process = start(repository, tmp_path, "--iters", 4, "--seed", 3, "--work-dir", "out")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said

    scores = {}
    for folder, title in (("cgspn", "C-GSPN"), ("no-propagation", "no propagation")):
        (scalars,) = (tmp_path / "out" / folder / "test").glob("*/*.json")
        scores[folder] = round(json.loads(scalars.read_text())["mIoU"], 1)
        assert re.search(rf"^ *{title} +{scores[folder]} *$", said, re.MULTILINE)
        assert f"Train {title}: 4/4, loss " in said
        predicted = sorted((tmp_path / "out" / folder / "test" / "predictions").iterdir())
        assert len(predicted) == 100
        assert set(np.unique(Image.open(predicted[0]))) <= {1, 2, 3, 4}
    assert f"{scores['cgspn'] - scores['no-propagation']:+.1f}" in said
    assert "below the 20 points to expect (--iters is short)" in said

    sheet = Image.open(tmp_path / "out" / "mazes.png")
    assert sheet.width > 4 * 256 and sheet.height > 5 * 256
    assert Image.open(tmp_path / "out" / "curves.png").width > 1000
    log = (tmp_path / "out" / "cgspn" / "train.out").read_text()
    assert "Iter(train) [4/4]" in log and "Iter(train)" not in said
    assert json.loads((tmp_path / "data" / "mazes" / "mazes.json").read_text())["seed"] == 3


@pytest.mark.slow
def test_an_interruption_ends_the_trainings_too(repository, tmp_path):
    process = start(repository, tmp_path)
    outputs = [tmp_path / "work_dirs/demo" / n / "train.out" for n in ("cgspn", "no-propagation")]
    for _ in range(600):
        if all(path.is_file() and "Iter(train)" in path.read_text() for path in outputs):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)  # to the demo alone
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said.endswith("demo.py: interrupted\n") and "Traceback" not in said
    sizes = [path.stat().st_size for path in outputs]
    time.sleep(2)
    assert [path.stat().st_size for path in outputs] == sizes, "the trainings must have ended"


@pytest.mark.slow
def test_a_folder_in_the_way_is_one_message(repository, tmp_path):
    (tmp_path / "data" / "mazes").mkdir(parents=True)
    (tmp_path / "data" / "mazes" / "mine.txt").touch()
    process = start(repository, tmp_path)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said.startswith("demo.py: error: ") and "Traceback" not in said
