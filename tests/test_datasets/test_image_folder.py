"""Images without labels from folders."""

from pathlib import Path

import numpy as np
import pytest
from mmseg.registry import DATASETS
from PIL import Image

from cgspn_seg.datasets import DataError, ImageFolderDataset

PIPELINE = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomResize", scale=(24, 16), ratio_range=(1.0, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(8, 12)),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image = Image.fromarray(np.arange(16 * 24 * 3, dtype=np.uint8).reshape(16, 24, 3))
    for name in ("b/2.png", "b/1.JPG", "z.jpeg", "c/d/e.webp", ".hidden/x.png", "b/.x.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    (tmp_path / "b" / "notes.txt").write_text("no image")
    return tmp_path


def names(dataset: ImageFolderDataset, root: Path) -> list[str]:
    return [
        str(Path(dataset.get_data_info(i)["img_path"]).relative_to(root))
        for i in range(len(dataset))
    ]


def test_finds_all_images_in_the_order_of_their_paths(folder: Path) -> None:
    dataset = ImageFolderDataset(str(folder))
    assert names(dataset, folder) == ["b/1.JPG", "b/2.png", "c/d/e.webp", "z.jpeg"]


def test_several_folders_and_links(folder: Path, tmp_path: Path) -> None:
    (folder / "link").symlink_to(folder / "c", target_is_directory=True)
    dataset = ImageFolderDataset(str(folder), ["b", "link"])
    assert names(dataset, folder) == ["b/1.JPG", "b/2.png", "link/d/e.webp"]


def test_a_link_to_a_folder_above_ends(folder: Path) -> None:
    for name in ("self", "b/up"):
        (folder / name).symlink_to(folder, target_is_directory=True)
    assert len(ImageFolderDataset(str(folder))) == 4


@pytest.mark.parametrize("suffixes", ["jpg", ".JPG", [".jpg"]])
def test_suffixes_in_any_form(folder: Path, suffixes: object) -> None:
    assert names(ImageFolderDataset(str(folder), "b", suffixes), folder) == ["b/1.JPG"]


def test_mmsegmentations_transforms_work_without_labels(mmseg_scope: None, folder: Path) -> None:
    cfg = dict(type="ImageFolderDataset", data_root=str(folder), pipeline=PIPELINE)
    dataset = DATASETS.build(cfg)
    for i in range(len(dataset)):
        sample = dataset[i]
        assert tuple(sample["inputs"].shape) == (3, 8, 12)
        assert "gt_sem_seg" not in sample["data_samples"]


def test_a_fraction_is_fixed_by_its_seed(folder: Path) -> None:
    def chosen(**options: object) -> list[str]:
        cfg = dict(type="ImageFolderDataset", data_root=str(folder), **options)
        return names(DATASETS.build(cfg), folder)

    half = chosen(fraction=0.5)
    assert len(half) == 2
    assert half == chosen(fraction=0.5, seed=0)
    assert any(chosen(fraction=0.5, seed=seed) != half for seed in range(1, 6))
    dataset = ImageFolderDataset(str(folder), fraction=0.5)
    dataset.subset.save(folder / "list.txt")
    assert len((folder / "list.txt").read_text().splitlines()) == 2


@pytest.mark.parametrize("fraction", [0, -1, 1.5, True, "0.5"])
def test_a_fraction_out_of_range_is_refused(folder: Path, fraction: object) -> None:
    with pytest.raises(DataError, match=r"dataset.fraction: expected above 0"):
        ImageFolderDataset(str(folder), fraction=fraction)


def test_what_cannot_be_meant_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"must not be empty"):
        ImageFolderDataset(str(folder), [])
    with pytest.raises(DataError, match=r"data_prefix: this data set has `folders`"):
        ImageFolderDataset(str(folder), data_prefix=dict(img_path="b"))


def test_a_missing_or_empty_folder_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"missing is no folder"):
        ImageFolderDataset(str(folder), "missing")
    (folder / "empty").mkdir()
    (folder / "empty" / "x.gif").write_text("")
    with pytest.raises(DataError, match=r"no file in .*empty ends in \.jpg.*ending in \.gif"):
        ImageFolderDataset(str(folder), "empty")
