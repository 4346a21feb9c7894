"""The training accuracy equals MMSegmentation's, and is what its heads use."""

import pytest
import torch
from mmseg.models.losses import accuracy
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from cgspn_seg.models.accuracy import pixel_accuracy


@pytest.mark.parametrize("ignore_index", [None, 255])
def test_equals_mmsegmentations(ignore_index: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(2, 5, 7, 9, generator=generator)
    target = torch.randint(0, 5, (2, 7, 9), generator=generator)
    if ignore_index is not None:
        target[:, :3] = ignore_index
    got = pixel_accuracy(pred, target, ignore_index=ignore_index)
    torch.testing.assert_close(got, accuracy(pred, target, ignore_index=ignore_index))


def test_without_labels_it_is_100_as_in_mmsegmentation() -> None:
    pred, target = torch.randn(1, 3, 4, 4), torch.full((1, 4, 4), 255)
    torch.testing.assert_close(
        pixel_accuracy(pred, target, ignore_index=255), accuracy(pred, target, ignore_index=255)
    )


@pytest.mark.parametrize("options", [{"topk": (1, 2)}, {"topk": 2}])
def test_the_rest_is_left_to_mmsegmentation(options: dict) -> None:
    pred, target = torch.randn(2, 5, 7, 9), torch.randint(0, 5, (2, 7, 9))
    torch.testing.assert_close(
        pixel_accuracy(pred, target, **options), accuracy(pred, target, **options)
    )


def test_heads_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_sort(*args: object, **kwargs: object) -> None:
        raise AssertionError("sorted all scores")

    monkeypatch.setattr(torch.Tensor, "topk", no_sort)
    head = MODELS.build(
        dict(type="mmseg.FCNHead", in_channels=4, channels=4, num_classes=3, num_convs=1)
    )
    sample = SegDataSample()
    sample.set_data({"gt_sem_seg": _labels(8)})
    losses = head.loss([torch.randn(2, 4, 8, 8)], [sample, sample], None)
    assert 0 <= float(losses["acc_seg"]) <= 100


def _labels(side: int):
    from mmengine.structures import PixelData

    return PixelData(data=torch.randint(0, 3, (1, side, side)))
