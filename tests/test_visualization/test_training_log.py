"""What is read from the logs of a run; a real one is read in test_tools/test_plot_log.py."""

import json
import math
from pathlib import Path

import pytest

from cgspn_seg.visualization.training_log import read_training_log
from tests.test_visualization.logs import STAMP, table, write_run


@pytest.mark.parametrize("scalars", [True, False], ids=["scalars", "text alone"])
def test_scalars_and_per_class_tables_are_read(tmp_path: Path, scalars: bool) -> None:
    ious = {4: {"sky": 10.0, "tree light": 20.0}, 8: {"sky": 30.0, "tree light": math.nan}}
    write_run(tmp_path / "run" / "t1", range(2, 9, 2), ious, scalars=scalars)
    run = read_training_log(tmp_path / "run")
    assert run.name == "run" and run.parts == [("t1", 2, 8)]
    steps, losses = run.series("loss")
    assert steps == [2, 4, 6, 8] and losses == pytest.approx([50, 25, 100 / 6, 12.5], abs=1e-4)
    assert run.series("lr")[1] == pytest.approx([5e-4, 2.5e-4, 1e-3 / 6, 1.25e-4], abs=1e-7)
    assert [found.step for found in run.validations] == [4, 8]
    assert [found.metrics["mIoU"] for found in run.validations] == [15.0, 30.0]
    assert run.validations[0].per_class["IoU"] == ious[4]
    assert math.isnan(run.validations[1].per_class["IoU"]["tree light"])


def test_a_resumed_run_is_joined_and_replaces_what_was_done_twice(tmp_path: Path) -> None:
    write_run(tmp_path / "20261120_100000", range(1, 8), {4: {"sky": 1.0}, 6: {"sky": 2.0}})
    write_run(tmp_path / "20261120_110000", range(5, 11), {6: {"sky": 3.0}, 10: {"sky": 4.0}})
    run = read_training_log(tmp_path)
    assert run.series("loss")[0] == list(range(1, 11))
    assert [(v.step, v.per_class["IoU"]["sky"]) for v in run.validations] == [
        (4, 1.0),
        (6, 3.0),
        (10, 4.0),
    ]
    assert [name for name, _, _ in run.parts] == ["20261120_100000", "20261120_110000"]


def test_the_log_of_a_test_in_the_same_folder_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "t1", range(1, 5), {4: {"sky": 1.0}})
    tested = tmp_path / "t2"
    tested.mkdir()
    summary = f"{STAMP}Iter(test) [3/3]    aAcc: 1.0000  mIoU: 99.0000  mAcc: 1.0000"
    (tested / "t2.log").write_text("\n".join([*table({"sky": 99.0}), summary]))
    run = read_training_log(tmp_path)
    assert [part[0] for part in run.parts] == ["t1"] and len(run.validations) == 1


def test_a_line_cut_off_at_the_end_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "t1", range(1, 5), {})
    scalars = folder / "vis_data" / "scalars.json"
    scalars.write_text(scalars.read_text() + '{"lr": 0.0')
    assert read_training_log(folder).series("loss")[0] == [1, 2, 3, 4]


def test_epoch_based_runs_are_put_on_iterations(tmp_path: Path) -> None:
    """Their validations are logged by epoch."""
    records = [
        {"loss": 1.0, "lr": 1.0, "epoch": 1, "iter": 50, "step": 50},
        {"mIoU": 10.0, "step": 1},
        {"loss": 0.5, "lr": 1.0, "epoch": 2, "iter": 100, "step": 100},
        {"val/mIoU": 20.0, "step": 2},
    ]
    (tmp_path / "t1" / "vis_data").mkdir(parents=True)
    text = "\n".join(map(json.dumps, records))
    (tmp_path / "t1" / "vis_data" / "scalars.json").write_text(text)
    (tmp_path / "t1" / "t1.log").write_text(
        f"{STAMP}Epoch(train)   [1][50/50]  lr: 1.0e+00  loss: 1.0000\n"
        + "\n".join(table({"sky": 10.0}))
        + f"\n{STAMP}Epoch(val) [1][3/3]    mIoU: 10.0000\n"
    )
    run = read_training_log(tmp_path)
    assert [(found.step, found.metrics["mIoU"]) for found in run.validations] == [
        (50, 10.0),
        (100, 20.0),
    ]
    assert run.validations[0].per_class["IoU"] == {"sky": 10.0}


def test_single_files_are_read_with_what_lies_beside_them(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "t1", range(1, 5), {4: {"sky": 7.0}})
    for path in (folder / "t1.log", folder / "vis_data" / "scalars.json"):
        run = read_training_log(path)
        assert run.name == "t1"
        assert run.validations[0].per_class["IoU"] == {"sky": 7.0}


def test_what_is_no_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing does not exist"):
        read_training_log(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no log found; expected a work folder"):
        read_training_log(tmp_path)
    (tmp_path / "empty.log").touch()
    with pytest.raises(ValueError, match=r"empty.log: the log holds no training iteration"):
        read_training_log(tmp_path / "empty.log")
    (tmp_path / "other.json").write_text("not json")
    with pytest.raises(ValueError, match=r"other.json: expected one JSON object a line"):
        read_training_log(tmp_path / "other.json")
