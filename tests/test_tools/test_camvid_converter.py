"""The CamVid converter reads SegNet's layout, checks it, and writes all of it or nothing."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from mmengine.config import Config
from mmseg.registry import DATASETS
from PIL import Image

from cgspn_seg.datasets import DataError, check_data_paths


@pytest.fixture(scope="module")
def converter(repository: Path) -> ModuleType:
    path = repository / "tools/dataset_converters/camvid.py"
    spec = importlib.util.spec_from_file_location("camvid_converter", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """SegNet's layout with two training images and one each to validate and test on."""
    root = tmp_path / "CamVid"
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
        for i in range(count):
            name = f"{split}_{i}.png"
            Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).save(root / split / name)
            Image.fromarray(rng.integers(0, 12, (6, 8), np.uint8)).save(
                root / f"{split}annot" / name
            )
    return root


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def fails(converter: ModuleType, source: Path, out: Path, match: str) -> None:
    """Converting ends in a message, and leaves nothing behind."""
    before = set(out.parent.rglob("*"))
    with pytest.raises(DataError, match=match):
        converter.main([str(source), "--out", str(out)])
    assert set(out.parent.rglob("*")) == before


def test_images_and_labels_go_where_the_config_looks(converter, source, tmp_path):
    out = tmp_path / "data" / "camvid"
    converter.main([str(source), "--out", str(out)])
    assert files(out) == {
        "images/training/train_0.png",
        "images/training/train_1.png",
        "images/validation/val_0.png",
        "images/test/test_0.png",
        "annotations/training/train_0.png",
        "annotations/training/train_1.png",
        "annotations/validation/val_0.png",
        "annotations/test/test_0.png",
    }
    for kind, folder in (("images", "train"), ("annotations", "trainannot")):
        converted = (out / kind / "training/train_1.png").read_bytes()
        assert converted == (source / folder / "train_1.png").read_bytes()
    assert list(out.parent.iterdir()) == [out]


def test_the_test_split_may_be_absent(converter, source, tmp_path):
    for folder in ("test", "testannot"):
        (source / folder / "test_0.png").unlink()
        (source / folder).rmdir()
    out = tmp_path / "out"
    converter.main([str(source), "--out", str(out)])
    assert not (out / "images/test").exists()


def test_links_point_at_the_originals(converter, source, tmp_path, monkeypatch):
    monkeypatch.chdir(source.parent)
    converter.main(["CamVid", "--out", str(tmp_path / "a/b/camvid"), "--link"])
    link = tmp_path / "a/b/camvid/images/test/test_0.png"
    assert link.is_symlink()
    assert link.resolve() == source / "test/test_0.png"


def test_the_default_output_follows_cgspn_data(converter, source, tmp_path, monkeypatch):
    monkeypatch.setenv("CGSPN_DATA", str(tmp_path / "datasets"))
    converter.main([str(source)])
    assert (tmp_path / "datasets/camvid/images/training/train_0.png").is_file()


def test_a_second_run_changes_nothing(converter, source, tmp_path, capsys):
    out = tmp_path / "camvid"
    converter.main([str(source), "--out", str(out)])
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    converter.main([str(source), "--out", str(out)])
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times


def test_a_folder_with_other_files_is_left_alone(converter, source, tmp_path):
    out = tmp_path / "camvid"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    fails(converter, source, out, r"9 files differ, the first is annotations/test/test_0\.png")
    assert (out / "thesis.txt").read_text() == "precious"


def test_a_changed_file_is_not_taken_for_complete(converter, source, tmp_path):
    out = tmp_path / "camvid"
    converter.main([str(source), "--out", str(out)])
    (out / "images/training/train_0.png").write_bytes(b"half")
    fails(converter, source, out, r"1 files differ, the first is images/training/train_0\.png")


def test_an_interruption_leaves_nothing_half_written(converter, source, tmp_path, monkeypatch):
    copied = []

    def copy_two(here: Path, there: Path) -> None:
        if len(copied) == 2:
            raise KeyboardInterrupt
        copied.append(there)
        there.write_bytes(here.read_bytes())

    monkeypatch.setattr(converter.shutil, "copyfile", copy_two)
    out = tmp_path / "data" / "camvid"
    with pytest.raises(KeyboardInterrupt):
        converter.main([str(source), "--out", str(out)])
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("wrong", ["nowhere", "CamVid/train"])
def test_another_folder_is_refused_with_what_was_expected(converter, source, tmp_path, wrong):
    fails(
        converter,
        source.parent / wrong,
        tmp_path / "out",
        r"expected the folders train, trainannot, val and valannot.*train is missing",
    )


def test_the_folder_above_the_right_one_is_recognized(converter, source, tmp_path):
    fails(converter, source.parent, tmp_path / "out", rf"Did you mean {source}\?")


def test_a_test_split_without_labels_is_refused(converter, source, tmp_path):
    (source / "testannot/test_0.png").unlink()
    (source / "testannot").rmdir()
    fails(converter, source, tmp_path / "out", "testannot is missing")


def test_an_image_without_its_label_is_named(converter, source, tmp_path):
    (source / "trainannot/train_1.png").unlink()
    fails(converter, source, tmp_path / "out", r"train/train_1\.png has no label: expected \S+")


def test_a_label_without_its_image_is_named(converter, source, tmp_path):
    (source / "val/val_0.png").rename(source / "val/val_1.png")
    fails(converter, source, tmp_path / "out", r"valannot/val_0\.png has no image: expected \S+")


def test_an_id_that_camvid_has_not_is_named(converter, source, tmp_path):
    Image.fromarray(np.full((6, 8), 12, np.uint8)).save(source / "valannot/val_0.png")
    fails(converter, source, tmp_path / "out", r"valannot/val_0\.png holds the id 12")


def test_the_colors_of_the_original_release_are_recognized(converter, source, tmp_path):
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(source / "trainannot/train_0.png")
    fails(converter, source, tmp_path / "out", r"train_0\.png is a color image.*SegNet")


def test_an_image_of_another_size_is_named(converter, source, tmp_path):
    Image.fromarray(np.zeros((6, 9, 3), np.uint8)).save(source / "train/train_0.png")
    fails(converter, source, tmp_path / "out", r"train_0\.png has 8x6 pixels, its image 9x6")


def test_a_broken_image_is_named(converter, source, tmp_path):
    path = source / "train/train_0.png"
    path.write_bytes(path.read_bytes()[:60])
    fails(converter, source, tmp_path / "out", r"The image \S+train_0\.png cannot be read")


@pytest.mark.slow
def test_as_a_tool_it_ends_with_one_message(repository, tmp_path):
    done = subprocess.run(
        [sys.executable, repository / "tools/dataset_converters/camvid.py", tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "\ncamvid.py: error: " in done.stderr and "is not CamVid as SegNet" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_public_data_are_ready_for_the_shipped_config(
    converter, camvid_root, tmp_path, monkeypatch, repository, mmseg_scope
):
    monkeypatch.setenv("CGSPN_DATA", str(tmp_path))
    converter.main([str(camvid_root), "--link"])
    cfg = Config.fromfile(repository / "configs/_base_/datasets/camvid.py")
    check_data_paths(cfg)
    train = DATASETS.build(cfg.train_dataloader.dataset)
    val = DATASETS.build(cfg.val_dataloader.dataset)
    assert (len(train), len(val)) == (367, 101)
    sample = train[0]
    assert max(sample["inputs"].shape[1:]) <= 480
    assert set(sample["data_samples"].gt_sem_seg.data.unique().tolist()) <= {*range(11), 255}
    assert val[0]["inputs"].shape == (3, 360, 480)
