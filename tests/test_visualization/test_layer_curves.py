"""Pictures of a distillation."""

import io

import pytest
from PIL import Image

from cgspn_seg.visualization.layer_curves import draw_layer_curves, has_layers
from cgspn_seg.visualization.training_log import TrainingLog, Validation


def validation(step: int, taps: tuple[str, ...] = ("mixer",), layers: int = 3) -> Validation:
    values = {
        f"{tap}/{name}": [0.5 / step] * layers for tap in taps for name in ("error", "cosine")
    }
    return Validation(step, {}, per_layer=values)


def run(*validations: Validation) -> TrainingLog:
    train = [{"step": i, "loss": 3.0 / i, "loss_00": 1.0 / i, "loss_01": 2.0 / i} for i in (1, 2)]
    return TrainingLog("run", train, list(validations))


def height(picture: bytes) -> int:
    return Image.open(io.BytesIO(picture)).height


def test_a_row_for_each_kind_of_tap() -> None:
    one = draw_layer_curves(run(validation(1), validation(2)), "one")
    two = draw_layer_curves(run(validation(1, ("mixer", "block"))), "two")
    assert height(two) > height(one)


def test_a_folder_may_have_runs_of_both_stages() -> None:
    mixed = run(
        validation(1), validation(2, ("mixer", "block")), validation(3, ("mixer", "block"), 2)
    )
    assert height(draw_layer_curves(mixed, "mixed")) > 0


def test_without_layers_there_is_nothing_to_draw() -> None:
    other = run(Validation(1, {"mIoU": 50.0}))
    assert not has_layers(other)
    with pytest.raises(ValueError, match=r"run: no validation compares layers"):
        draw_layer_curves(other, "other")
