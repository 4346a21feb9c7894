"""The loaders do what mmseg's do, and name the file that is broken."""

from collections.abc import Callable
from pathlib import Path

import mmcv.transforms
import mmseg.datasets.transforms
import numpy as np
import pytest
from mmengine.registry import TRANSFORMS
from mmseg.datasets import BaseSegDataset
from PIL import Image
from torch.utils.data import DataLoader

from cgspn_seg.datasets import DataError, LoadAnnotations, LoadImageFromFile


def sample(root: Path, label: np.ndarray | None = None, size: tuple[int, int] = (8, 6)) -> dict:
    """Writes an image of ``size`` (width, height) and a label; returns what a dataset would say."""
    image, seg_map = root / "image.jpg", root / "label.png"
    Image.new("RGB", size).save(image)
    Image.fromarray(np.zeros(size[::-1], np.uint8) if label is None else label).save(seg_map)
    return dict(
        img_path=str(image),
        seg_map_path=str(seg_map),
        label_map=None,
        reduce_zero_label=False,
        seg_fields=[],
    )


def garbage(path: str) -> None:
    Path(path).write_bytes(b"this is no image")


def empty(path: str) -> None:
    Path(path).write_bytes(b"")


def truncated(path: str) -> None:
    noise = np.random.default_rng(0).integers(0, 4, (64, 64), np.uint8)
    Image.fromarray(noise).save(path)
    Path(path).write_bytes(Path(path).read_bytes()[:-200])


def remove(path: str) -> None:
    Path(path).unlink()


def test_pipelines_get_these_loaders_under_mmsegs_names(mmseg_scope):
    for kind in (LoadImageFromFile, LoadAnnotations):
        assert type(TRANSFORMS.build(dict(type=kind.__name__))) is kind


@pytest.mark.parametrize("reduce_zero_label", [False, True])
@pytest.mark.parametrize("label_map", [None, {0: 255, 1: 0, 2: 1}])
def test_loading_is_mmsegs(tmp_path, reduce_zero_label, label_map):
    label = np.array([[0, 1, 2, 3], [254, 255, 3, 0]], np.uint8)
    results = []
    for loaders in (
        (LoadImageFromFile, LoadAnnotations),
        (mmcv.transforms.LoadImageFromFile, mmseg.datasets.transforms.LoadAnnotations),
    ):
        result = sample(tmp_path, label, size=(4, 2))
        result |= dict(reduce_zero_label=reduce_zero_label, label_map=label_map)
        for loader in loaders:
            result = loader()(result)
        results.append(result)
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    np.testing.assert_array_equal(ours["img"], theirs["img"])
    np.testing.assert_array_equal(ours["gt_seg_map"], theirs["gt_seg_map"])
    assert ours["ori_shape"] == (2, 4)


@pytest.mark.parametrize("spoil", [garbage, empty])
def test_an_unreadable_image_is_named(tmp_path, spoil: Callable):
    info = sample(tmp_path)
    spoil(info["img_path"])
    with pytest.raises(
        DataError, match=r"The image \S+image\.jpg cannot be read \(.+\): replace"
    ) as caught:
        LoadImageFromFile()(info)
    assert str(caught.value).count("image.jpg") == 1


@pytest.mark.parametrize(
    ("spoil", "backend"),
    [
        (garbage, "pillow"),
        (garbage, "cv2"),
        (empty, "pillow"),
        (empty, "cv2"),
        (truncated, "pillow"),  # OpenCV fills up what is missing
    ],
)
def test_an_unreadable_label_is_named(tmp_path, spoil: Callable, backend):
    info = sample(tmp_path)
    spoil(info["seg_map_path"])
    with pytest.raises(DataError, match=r"The label \S+label\.png cannot be read \(.+\): replace"):
        LoadAnnotations(imdecode_backend=backend)(info)


def test_missing_files_are_named(tmp_path):
    info = sample(tmp_path)
    remove(info["img_path"])
    with pytest.raises(DataError, match=r"The image \S+image\.jpg does not exist"):
        LoadImageFromFile()(info)
    remove(info["seg_map_path"])
    with pytest.raises(DataError, match=r"The label \S+label\.png does not exist"):
        LoadAnnotations()(info)


def test_images_may_be_skipped_as_mmcv_allows(tmp_path):
    info = sample(tmp_path)
    garbage(info["img_path"])
    info["img_path"] += ".gone"
    assert LoadImageFromFile(ignore_empty=True)(info) is None


def test_a_label_of_another_size_than_its_image_is_named(tmp_path):
    info = sample(tmp_path, np.zeros((6, 9), np.uint8), size=(8, 6))
    with pytest.raises(DataError, match=r"label\.png has 9x6 pixels, its image 8x6"):
        LoadAnnotations()(LoadImageFromFile()(info))


def test_the_size_is_that_of_the_file_when_the_image_was_resized_before(tmp_path):
    info = LoadImageFromFile()(sample(tmp_path, size=(8, 6)))
    resized = mmcv.transforms.Resize(scale=(16, 12))(info)
    assert LoadAnnotations()(resized)["gt_seg_map"].shape == (6, 8)


def test_a_label_of_colors_is_named(tmp_path):
    info = sample(tmp_path, np.zeros((6, 8, 3), np.uint8), size=(8, 6))
    with pytest.raises(DataError, match=r"label\.png has shape \(6, 8, 3\).*class ids"):
        LoadAnnotations()(LoadImageFromFile()(info))


def test_a_label_with_a_palette_is_read_as_ids(tmp_path):
    info = sample(tmp_path)
    ids = np.array([[0, 1], [2, 1]], np.uint8)
    image = Image.fromarray(ids)
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    image.save(info["seg_map_path"])
    np.testing.assert_array_equal(LoadAnnotations()(info)["gt_seg_map"], ids)


def test_a_clash_of_settings_is_not_blamed_on_the_file(tmp_path):
    with (
        pytest.warns(UserWarning, match="reduce_zero_label"),
        pytest.raises(AssertionError, match="reduce_zero_label"),
    ):
        LoadAnnotations(reduce_zero_label=True)(sample(tmp_path))


def test_the_message_survives_a_worker_process(tmp_path, tiny_ade_root, mmseg_scope):
    root = tiny_ade_root(num_train=2)
    garbage(root / "images/training/0001.jpg")
    dataset = BaseSegDataset(
        data_root=str(root),
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=[dict(type="LoadImageFromFile")],
    )
    with pytest.raises(DataError, match=r"The image \S+0001\.jpg cannot be read"):
        list(DataLoader(dataset, batch_size=None, num_workers=1))
