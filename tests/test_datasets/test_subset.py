"""`fraction` takes a part of any MMSegmentation data set, wherever it is built."""

import json
import logging
import pickle
import socket
from pathlib import Path

from cgspn_seg import compat  # noqa: F401  (before mmseg: processes import this file on their own)

# isort: split
import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, DefaultScope
from mmseg.registry import DATASETS as MMSEG_DATASETS
from PIL import Image

from cgspn_seg.datasets import CamVidDataset, DataError, check_data_paths

LOADERS = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]
PREFIX = dict(img_path="images/training", seg_map_path="annotations/training")


@pytest.fixture
def root(tiny_ade_root) -> Path:
    """20 images with the ids 0 to 2, the third class in two of them alone; 3 is in none."""
    root = tiny_ade_root(num_train=20, ids=(0, 1))
    for name in ("0004.png", "0017.png"):
        path = root / "annotations/training" / name
        label = np.array(Image.open(path))
        label[:4, :4] = 2
        Image.fromarray(label).save(path)
    return root


def config(root: Path, **options: object) -> dict:
    return dict(
        type="BaseSegDataset",
        data_root=str(root),
        data_prefix=PREFIX,
        metainfo=dict(classes=("a", "b", "c", "d")),
        pipeline=LOADERS,
    ) | dict(options)


def build(root: Path, **options: object):
    with DefaultScope.overwrite_default_scope("mmseg"):
        return DATASETS.build(ConfigDict(config(root, **options)))


def stems(dataset) -> list[str]:
    return [Path(dataset.get_data_info(i)["img_path"]).stem for i in range(len(dataset))]


@pytest.mark.parametrize(
    ("fraction", "size"), [(0.001, 1), (0.1, 2), (0.12, 2), (0.13, 3), (0.5, 10), (1, 20)]
)
def test_the_part_has_the_size_asked_for_and_at_least_one_image(root, fraction, size):
    assert len(build(root, fraction=fraction)) == size


def test_it_is_a_data_set_like_any_other(root):
    dataset = build(root, fraction=0.2)
    assert type(dataset).__name__ == "BaseSegDataset"
    assert dataset[3]["gt_seg_map"].shape == (48, 64)
    assert stems(dataset) == sorted(stems(dataset)) == dataset.subset.names
    assert stems(pickle.loads(pickle.dumps(dataset))) == stems(dataset), "as workers get it"


def test_it_holds_the_rare_class_is_fixed_and_nested(root):
    parts = [stems(build(root, fraction=f)) for f in (0.1, 0.2, 0.2, 0.4)]
    assert parts[1] == parts[2]
    assert {"0004", "0017"} & set(parts[0])
    assert set(parts[0]) < set(parts[1]) < set(parts[3])
    assert stems(build(root, fraction=0.2, seed=1)) != parts[1]


def test_it_is_the_same_where_the_data_lie_elsewhere(root, tmp_path, monkeypatch):
    here = stems(build(root, fraction=0.3))
    root.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert stems(build(Path("moved"), fraction=0.3)) == here
    whole = dict(data_prefix={k: f"moved/{v}/" for k, v in PREFIX.items()}, data_root=None)
    assert stems(build(root, fraction=0.3, **whole)) == here


@pytest.mark.parametrize("serialize_data", [True, False])
def test_the_list_is_an_ann_file_of_the_same_part(root, tmp_path, serialize_data):
    part = build(root, fraction=0.3, serialize_data=serialize_data)
    part.subset.save(tmp_path / "train_subset.txt")
    again = build(root, ann_file=str(tmp_path / "train_subset.txt"))
    infos = [[d.get_data_info(i) for i in range(len(d))] for d in (part, again)]
    assert len(part) == 6 and infos[0] == infos[1]


def test_the_figures_are_of_images_and_pixels(root, tmp_path):
    build(root, fraction=0.1, seed=3).subset.save(tmp_path / "train_subset.txt")
    figures = json.loads((tmp_path / "train_subset.json").read_text())
    assert [figures[k] for k in ("fraction", "seed", "images", "images_of")] == [0.1, 3, 2, 20]
    a, _, c, d = figures["classes"]
    assert (a["name"], a["images"], a["images_of"]) == ("a", 2, 20)
    assert (c["images"], c["images_of"]) == (1, 2)
    assert c["pixel_share_of"] == pytest.approx(16 / (48 * 64) / 10, abs=1e-6)
    assert c["pixel_share"] == pytest.approx(16 / (48 * 64) / 2, abs=1e-6)
    assert (d["images"], d["images_of"], d["pixel_share"]) == (0, 0, 0)


def test_labels_are_seen_as_training_sees_them(tiny_ade_root):
    root = tiny_ade_root(num_train=6, ids=(0, 1, 2, 255))
    reduced = build(root, fraction=0.5, reduce_zero_label=True).subset
    assert [row["images_of"] for row in reduced.classes] == [6, 6, 0, 0]
    classes = CamVidDataset.METAINFO["classes"]
    chosen = dict(classes=[classes[2], classes[0]])
    mapped = build(root, type="CamVidDataset", metainfo=chosen, fraction=0.5).subset
    assert [(row["name"], row["images_of"]) for row in mapped.classes] == [("pole", 6), ("sky", 6)]
    assert sum(row["pixel_share_of"] for row in mapped.classes) == pytest.approx(1)


def test_classes_that_do_not_fit_are_named(tiny_ade_root, monkeypatch):
    root = tiny_ade_root(num_train=4, ids=(0,))
    for i in range(4):
        path = root / f"annotations/training/{i:04d}.png"
        Image.fromarray(np.full((48, 64), i, np.uint8)).save(path)
    logged = []
    monkeypatch.setattr(
        "cgspn_seg.datasets.subset.print_log",
        lambda text, _, level=20: logged.append((level, text)),
    )
    build(root, fraction=0.75)
    (warning,) = (text for level, text in logged if level == logging.WARNING)
    assert warning.startswith("They are too few for all classes: none shows ")


def test_repeated_and_joined_data_sets_take_their_parts(root):
    part = config(root, fraction=0.2)
    with DefaultScope.overwrite_default_scope("mmseg"):
        repeated = DATASETS.build(dict(type="RepeatDataset", times=3, dataset=part))
        joined = MMSEG_DATASETS.build(dict(type="ConcatDataset", datasets=[part, config(root)]))
    assert (len(repeated), len(joined)) == (12, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(fraction=0), r"fraction: expected a number above 0 and up to 1, got 0\."),
        (dict(fraction=-0.1), r"up to 1, got -0\.1"),
        (dict(fraction=10), r"up to 1, got 10\. Write 0\.1 for 10 %"),
        (dict(fraction="10%"), r"got '10%'"),
        (dict(fraction=True), "got True"),
        (dict(fraction=float("nan")), "got nan"),
        (dict(fraction=0.5, seed=0.5), r"seed: expected an integer, got 0\.5"),
        (dict(seed=3), r"seed: it chooses which images {where}\.fraction takes, which is not set"),
        (
            dict(type="RepeatDataset", fraction=0.5, dataset={}, times=2),
            r"RepeatDataset cannot be divided; set {where}\.dataset\.fraction",
        ),
        (
            dict(type="ConcatDataset", fraction=0.5, datasets=[]),
            r"set {where}\.datasets\.0\.fraction",
        ),
        (
            dict(type="BaseCDDataset", fraction=0.5),
            "BaseCDDataset cannot be divided; only data sets that derive from MMSegmentation",
        ),
    ],
)
def test_what_cannot_be_taken_is_named_with_the_way_out(root, options, message, mmseg_scope):
    where = "train_dataloader.dataset"
    cfg = config(root, **options)
    with pytest.raises(DataError, match=message.replace("{where}", where)) as caught:
        check_data_paths(Config(dict(train_dataloader=dict(dataset=cfg))))
    assert str(caught.value).startswith(where)
    with pytest.raises(DataError, match=message.replace("{where}", "dataset")):
        DATASETS.build(cfg)


def test_labels_are_needed(root):
    for options in (
        dict(pipeline=LOADERS[:1]),
        dict(data_prefix=dict(img_path="images/training")),
        dict(metainfo=None),
    ):
        with pytest.raises(DataError, match=r"loads no labels|has no classes"):
            build(root, fraction=0.5, **options)


def test_a_bad_label_is_named(root):
    (root / "annotations/training/0003.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"0003\.png cannot be read"):
        build(root, fraction=0.5)


def test_labels_that_do_not_exist_are_counted_before_any_is_read(root):
    with pytest.raises(
        DataError,
        match=r"20 of the 20 labels of the BaseSegDataset do not exist; .*0000_label\.png\. .*end "
        r"in '_label\.png': where theirs end otherwise, set dataset\.seg_map_suffix",
    ):
        build(root, fraction=0.5, seg_map_suffix="_label.png")


def test_the_log_says_of_which_images_the_part_is(root, monkeypatch):
    logged = []
    monkeypatch.setattr("cgspn_seg.datasets.subset.print_log", lambda text, *_: logged.append(text))
    build(root, fraction=0.5)
    (said,) = (text for text in logged if text.startswith("Took"))
    assert said == f"Took 10 of the 20 images in {root}/images/training (fraction=0.5, seed=0)."


def test_names_of_classes_cost_no_data(root):
    assert build(root / "no", fraction=0.5, pipeline=[], lazy_init=True).metainfo["classes"]
    check_data_paths(Config(dict(train_dataloader=dict(dataset=config(root, fraction=0.5)))))


def test_a_lazy_data_set_is_divided_all_the_same(root):
    dataset = build(root, fraction=0.5, lazy_init=True)
    dataset.full_init()
    assert len(dataset) == 10


def test_a_type_with_a_fraction_of_its_own_keeps_it(root):
    def own(fraction: float, seed: int) -> tuple:
        return fraction, seed

    assert DATASETS.build(dict(type=own, fraction=7, seed=2)) == (7, 2)


def _build_in_process(rank: int, root: str, port: int, out: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    if rank == 1:  # it need not read, and could not
        from cgspn_seg.datasets import subset

        subset.LabelScan = None
    for name in ("good", "bad"):
        try:
            said = " ".join(stems(build(Path(root, name), fraction=0.5)))
        except DataError as error:
            said = str(error)
        Path(out, f"{name}{rank}").write_text(said)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_processes_take_the_same_or_stop_together(tiny_ade_root, tmp_path):
    for name in ("good", "bad"):
        root = tiny_ade_root(num_train=8, name=name)
    (root / "annotations/training/0003.png").write_bytes(b"")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_build_in_process, (str(tmp_path), port, str(tmp_path)), nprocs=2)
    good, bad = ([(tmp_path / f"{n}{r}").read_text() for r in (0, 1)] for n in ("good", "bad"))
    assert good[0] == good[1] and len(good[0].split()) == 4
    assert bad[0] == bad[1] and "0003.png cannot be read" in bad[0]
