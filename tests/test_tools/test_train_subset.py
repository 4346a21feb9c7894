"""A part of the training data, by one option of tools/train.py and MMSegmentation's own."""

import json
import re
from pathlib import Path

import mmseg
import pytest

from tests.test_tools.conftest import Workshop

pytestmark = pytest.mark.slow

FRACTION = "train_dataloader.dataset.fraction=0.5"
OPTIONS = ("--cfg-options", "train_cfg.max_iters=2", "train_cfg.val_interval=2")


def saved(work_dir: Path) -> list[list[str]]:
    """The lists below a work folder, from the oldest."""
    return [path.read_text().split() for path in sorted(work_dir.glob("*/train_subset.txt"))]


def losses(said: str) -> list[str]:
    return re.findall(r"Iter\(train\).* loss: ([\d.]+)", said)


def test_one_option_trains_on_a_part_and_leaves_its_list(workshop: Workshop, tmp_path: Path):
    common = (workshop.config, "--work-dir", tmp_path, *OPTIONS, "randomness.seed=0")
    said = workshop.run("train.py", *common, FRACTION)
    assert re.search(r"Took 3 of the 6 images in \S+/training \(fraction=0.5, seed=0\)\.", said)
    assert "Checked 3 of the 3 labels of the train dataset" in said
    assert "Checked 3 of the 3 labels of the val dataset" in said, "which stays whole"
    (names,) = saved(tmp_path)
    assert len(names) == 3 and set(names) < set("012345")
    (figures,) = tmp_path.glob("*/train_subset.json")
    rows = json.loads(figures.read_text())["classes"]
    assert [(row["name"], row["images"]) for row in rows] == [("floor", 3), ("box", 3), ("ball", 3)]
    assert not list(tmp_path.glob("*/val_subset*"))

    (path,) = tmp_path.glob("*/train_subset.txt")
    by_list = workshop.run("train.py", *common, f"train_dataloader.dataset.ann_file={path}")
    assert losses(by_list) == losses(said) and len(losses(said)) == 2


def test_a_resumed_run_without_our_hooks_takes_the_same_part(workshop: Workshop, tmp_path: Path):
    common = (workshop.config, "--work-dir", tmp_path)
    own = ("custom_hooks=[]", FRACTION, "train_dataloader.dataset.seed=5")
    workshop.run("train.py", *common, *OPTIONS, "default_hooks.checkpoint.interval=2", *own)
    said = workshop.run("train.py", *common, "--resume", "--cfg-options", *own)
    assert "resumed epoch: 0, iter: 2" in said and "(fraction=0.5, seed=5)" in said
    first, second = saved(tmp_path)
    assert first == second and len(first) == 3


def test_mmsegmentations_own_tool_takes_it_as_well(workshop: Workshop, tmp_path: Path):
    tool = Path(mmseg.__file__).parent / ".mim" / "tools" / "train.py"
    if not tool.is_file():
        pytest.skip("needs the tools that MMSegmentation's wheel carries")
    said = workshop.run(tool, workshop.config, "--work-dir", tmp_path, *OPTIONS, FRACTION)
    assert "Took 3 of the 6 images" in said
    assert [len(names) for names in saved(tmp_path)] == [3]


def test_a_part_that_does_not_exist_is_one_message(workshop: Workshop, tmp_path: Path):
    said = workshop.run(
        "train.py", workshop.config, "--work-dir", tmp_path / "run", "--cfg-options",
        "train_dataloader.dataset.fraction=50", code=2,
    )  # fmt: skip
    assert "train.py: error: train_dataloader.dataset.fraction: expected a number above 0" in said
    assert "Write 0.5 for 50 %" in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()
