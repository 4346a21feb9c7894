"""Missing data folders are found before a runner is built."""

from pathlib import Path

import pytest
from mmengine.config import Config

from cgspn_seg.datasets import DataError, check_data_paths

PREFIX = dict(img_path="images/training", seg_map_path="annotations/training")


def config(root: Path | str, **changes) -> Config:
    dataset = dict(type="BaseSegDataset", data_root=str(root), data_prefix=PREFIX) | changes
    return Config(dict(train_dataloader=dict(batch_size=1, dataset=dataset)))


def test_complete_data_pass(tiny_ade_root):
    check_data_paths(config(tiny_ade_root()))


def test_a_missing_root_is_named_with_its_absolute_path_and_the_ways_out(
    tmp_path, monkeypatch, repository
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CGSPN_DATA", raising=False)
    cfg = Config.fromfile(repository / "configs/_base_/datasets/camvid.py")
    with pytest.raises(DataError) as caught:
        check_data_paths(cfg)
    message = str(caught.value)
    assert message.startswith(f"train_dataloader.dataset.data_root: {tmp_path}/data/camvid does")
    assert "set CGSPN_DATA to the folder that holds camvid" in message
    assert "--cfg-options train_dataloader.dataset.data_root=" in message


def test_cgspn_data_moves_the_data_of_the_shipped_configs(tmp_path, monkeypatch, repository):
    monkeypatch.setenv("CGSPN_DATA", str(tmp_path / "elsewhere"))
    cfg = Config.fromfile(repository / "configs/_base_/datasets/ade20k.py")
    with pytest.raises(DataError, match=f"{tmp_path}/elsewhere/ade/ADEChallengeData2016 does not"):
        check_data_paths(cfg)


def test_cgspn_data_is_not_proposed_where_the_config_does_not_read_it(tmp_path):
    with pytest.raises(DataError) as caught:
        check_data_paths(config(tmp_path / "data" / "mine"))
    assert "CGSPN_DATA" not in str(caught.value)


def test_a_missing_subfolder_is_named_with_what_is_there(tiny_ade_root):
    root = tiny_ade_root()
    cfg = config(root, data_prefix=PREFIX | dict(seg_map_path="labels/training"))
    with pytest.raises(
        DataError,
        match=rf"data_prefix\.seg_map_path: {root}/labels/training does not exist; "
        "its data_root holds annotations, images",
    ):
        check_data_paths(cfg)


def test_a_missing_annotation_file_is_named(tiny_ade_root):
    with pytest.raises(DataError, match=r"dataset\.ann_file: \S+/splits/a\.txt does not exist"):
        check_data_paths(config(tiny_ade_root(), ann_file="splits/a.txt"))


def test_an_empty_annotation_file_is_named(tiny_ade_root):
    root = tiny_ade_root()
    (root / "all.txt").touch()
    with pytest.raises(DataError, match=r"all\.txt lists no image"):
        check_data_paths(config(root, ann_file="all.txt"))


def test_the_wrong_image_suffix_is_named_with_the_one_that_is_there(tiny_ade_root):
    cfg = config(tiny_ade_root(), img_suffix=".tif")
    with pytest.raises(DataError, match=r"ends in '\.tif'; there are files ending in \.jpg: set "):
        check_data_paths(cfg)


def test_an_empty_folder_is_named(tiny_ade_root):
    with pytest.raises(DataError, match=r"images/training ends in '\.jpg'; there are no files"):
        check_data_paths(config(tiny_ade_root(num_train=0)))


@pytest.mark.parametrize("loader", ["val_dataloader", "test_dataloader"])
def test_only_the_loaders_asked_for_are_checked(tiny_ade_root, loader):
    cfg = config(tiny_ade_root())
    cfg[loader] = dict(dataset=dict(type="BaseSegDataset", data_root="/nowhere"))
    cfg["extra_dataloader"] = None
    check_data_paths(cfg, ["train_dataloader", "extra_dataloader"])
    with pytest.raises(DataError, match=rf"{loader}\.dataset\.data_root: /nowhere does not exist"):
        check_data_paths(cfg)


def test_datasets_inside_wrappers_are_checked(tiny_ade_root):
    good = config(tiny_ade_root()).train_dataloader.dataset
    bad = dict(type="BaseSegDataset", data_root="/nowhere", data_prefix=PREFIX)
    concat = dict(type="ConcatDataset", datasets=[good, bad])
    cfg = Config(
        dict(train_dataloader=dict(dataset=dict(type="RepeatDataset", times=2, dataset=concat)))
    )
    with pytest.raises(
        DataError, match=r"train_dataloader\.dataset\.dataset\.datasets\.1\.data_root: /nowhere"
    ):
        check_data_paths(cfg)


def test_data_that_are_not_on_a_local_disk_are_left_to_their_backend():
    check_data_paths(config("s3://bucket/ade"))
    check_data_paths(config("/nowhere", backend_args=dict(backend="petrel")))
