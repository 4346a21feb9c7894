"""tools/plot_log.py on the log of a real run."""

from pathlib import Path

import pytest
from PIL import Image

from cgspn_seg.visualization.training_log import read_training_log
from tests.test_tools.conftest import CLASSES, Workshop

pytestmark = pytest.mark.slow


def test_a_real_log_is_read(trained: Workshop) -> None:
    run = read_training_log(trained.work_dir)
    assert run.series("lr")[0] == list(range(1, 9))
    assert [found.step for found in run.validations] == [4, 8]
    for found in run.validations:
        ious = found.per_class["IoU"]
        assert tuple(ious) == CLASSES
        assert sum(ious.values()) / 3 == pytest.approx(found.metrics["mIoU"], abs=0.02)


def test_one_run_and_several_are_drawn(trained: Workshop, tmp_path: Path) -> None:
    said = trained.run("plot_log.py", trained.work_dir, "--out", tmp_path / "curves" / "one.png")
    assert "boxes: 2 validations" in said and "(iterations 1-8)" in said
    (log,) = trained.work_dir.glob("*/*.log")
    trained.run(
        "plot_log.py", trained.work_dir, log, "--labels", "a", "b", "--out", tmp_path / "two.png"
    )
    for path in (tmp_path / "curves" / "one.png", tmp_path / "two.png"):
        assert Image.open(path).width == 1650


def test_mistakes_are_one_message_each(trained: Workshop, tmp_path: Path) -> None:
    for arguments, message in (
        ((tmp_path, "--out", "x.png"), "no log found; expected a work folder"),
        ((trained.work_dir, "--out", "x.pdf"), "--out: expected a file that ends in .png"),
        (
            (trained.work_dir, "--out", "x.png", "--labels", "a", "b"),
            "--labels: expected one for each of the 1 runs, got 2",
        ),
    ):
        said = trained.run("plot_log.py", *arguments, code=2, cwd=tmp_path)
        assert message in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())
