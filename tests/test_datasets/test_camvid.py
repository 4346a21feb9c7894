"""CamVidDataset finds its images, and its labels mean what the config says."""

from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from cgspn_seg.datasets import CamVidDataset, DataError
from cgspn_seg.datasets.camvid import find_image_suffix

PREFIX = dict(img_path="images", seg_map_path="annotations")
PIPELINE = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]


def make(root: Path, suffix: str, name: str = "a", label: np.ndarray | None = None) -> Path:
    for folder in ("images", "annotations"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    label = np.arange(12, dtype=np.uint8).reshape(3, 4) if label is None else label
    Image.fromarray(np.zeros((*label.shape, 3), np.uint8)).save(root / f"images/{name}{suffix}")
    Image.fromarray(label).save(root / f"annotations/{name}.png")
    return root


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg"])
def test_the_suffix_of_the_images_is_found(tmp_path, suffix):
    dataset = CamVidDataset(data_root=str(make(tmp_path, suffix)), data_prefix=PREFIX)
    info = dataset.get_data_info(0)
    assert info["img_path"] == str(tmp_path / f"images/a{suffix}")
    assert info["seg_map_path"] == str(tmp_path / "annotations/a.png")


def test_a_folder_with_two_formats_is_refused_unless_one_is_named(tmp_path):
    make(tmp_path, ".png", "a")
    make(tmp_path, ".jpg", "b")
    with pytest.raises(DataError, match=r"mixes images ending in \.jpg and \.png.*img_suffix"):
        CamVidDataset(data_root=str(tmp_path), data_prefix=PREFIX)
    dataset = CamVidDataset(data_root=str(tmp_path), data_prefix=PREFIX, img_suffix=".jpg")
    assert len(dataset) == 1


def test_other_files_among_the_images_are_passed_over(tmp_path):
    make(tmp_path, ".png")
    (tmp_path / "images/Thumbs.db").touch()
    assert find_image_suffix(tmp_path / "images") == ".png"


def test_void_is_ignored_by_the_shipped_config(tmp_path, repository, mmseg_scope):
    base = Config.fromfile(repository / "configs/_base_/datasets/camvid.py")
    dataset = CamVidDataset(
        data_root=str(make(tmp_path, ".png")),
        data_prefix=PREFIX,
        metainfo=base.metainfo,
        pipeline=PIPELINE,
    )
    assert dataset.metainfo["classes"] == CamVidDataset.METAINFO["classes"][:11]
    assert dataset.metainfo["palette"] == CamVidDataset.METAINFO["palette"][:11]
    label = dataset[0]["gt_seg_map"]
    np.testing.assert_array_equal(label.ravel(), [*range(11), 255])


def test_each_class_has_a_color_of_its_own():
    classes, palette = CamVidDataset.METAINFO["classes"], CamVidDataset.METAINFO["palette"]
    assert len(classes) == len(palette) == len({tuple(color) for color in palette}) == 12
