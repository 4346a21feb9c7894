"""Learning curves; how they look was judged by eye, that every case is drawn is tested here."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cgspn_seg.visualization.curves import _smooth, _spread, draw_curves
from cgspn_seg.visualization.training_log import TrainingLog, read_training_log
from tests.test_visualization.logs import write_run


def run_of(folder: Path, num_classes: int, num_validations: int = 3) -> TrainingLog:
    ious = {f"class {i}": 100 * (i + 1) / (num_classes + 1) for i in range(num_classes)}
    if num_classes > 1:
        ious["class 0"] = math.nan  # occurs in no label
    steps = range(1, 10 * max(1, num_validations) + 1)
    found = {10 * (i + 1): ious for i in range(num_validations)}
    return read_training_log(write_run(folder, steps, found))


@pytest.mark.parametrize("num_classes", [1, 11, 150])
@pytest.mark.parametrize("num_runs", [1, 3])
@pytest.mark.parametrize("num_validations", [0, 1, 3])
def test_every_number_of_runs_classes_and_validations_is_drawn(
    tmp_path: Path, num_classes: int, num_runs: int, num_validations: int
) -> None:
    runs = [run_of(tmp_path / f"t{i}", num_classes, num_validations) for i in range(num_runs)]
    picture = Image.open(io.BytesIO(draw_curves(runs, [run.name for run in runs])))
    assert picture.width == 1650
    # Without a table there is no room for one; with 150 classes there is room for all.
    assert (picture.height < 500) == (num_validations == 0)
    assert (picture.height > 1300) == (num_classes == 150 and num_validations > 0)


def test_every_run_needs_a_label(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"labels: expected one a run \(1\), got 2"):
        draw_curves([run_of(tmp_path / "t1", 2)], ["a", "b"])


def test_smoothing_keeps_a_line_and_evens_out_noise() -> None:
    line = np.linspace(5.0, 1.0, 300)
    noisy = line + np.where(np.arange(300) % 2, 0.5, -0.5)
    assert np.abs(_smooth(line) - line)[10:-10].max() < 1e-9
    assert np.abs(_smooth(noisy) - line).max() < 0.15
    assert np.isfinite(_smooth([1.0, math.nan, 3.0])).all()


def test_labels_keep_their_order_and_distance() -> None:
    wanted = [0.0, 1.0, 2.0, 50.0, 99.0, 100.0]
    places = _spread(wanted, gap=5.0, low=0.0, high=100.0)
    assert (np.diff(places) >= 5.0 - 1e-9).all()
    assert places[3] == 50.0 and min(places) >= 0.0 and max(places) <= 100.0
