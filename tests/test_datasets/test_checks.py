"""Each way in which labels can be wrong ends in one message that names the file or the key."""

import logging
import time
from pathlib import Path

import numpy as np
import pytest
from mmengine.dataset import RepeatDataset
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from PIL import Image
from torch import nn

from cgspn_seg.datasets import CamVidDataset, DataError, checks

PREFIX = dict(img_path="images/training", seg_map_path="annotations/training")
LOADERS = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]
LOGGER = logging.getLogger("test_checks")

pytestmark = pytest.mark.usefixtures("mmseg_scope")


def build(root: Path, kind: type = BaseSegDataset, **options) -> BaseSegDataset:
    if kind is BaseSegDataset:
        options.setdefault("metainfo", dict(classes=("a", "b", "c", "d")))
    options = dict(data_root=str(root), data_prefix=PREFIX, pipeline=LOADERS) | options
    return kind(**options)


def set_pixel(root: Path, name: str, value: int, dtype: type = np.uint8) -> Path:
    path = root / "annotations/training" / name
    label = np.array(Image.open(path)).astype(dtype)
    label[0, 0] = value
    Image.fromarray(label).save(path)
    return path


def run(dataset: BaseSegDataset, **options) -> None:
    checks.check_labels(dataset, "train", LOGGER, **options)


def test_good_labels_pass_and_the_log_says_how_many_were_read(tiny_ade_root, caplog):
    with caplog.at_level(logging.INFO):
        run(build(tiny_ade_root(num_train=3)))
    assert "Checked 3 of the 3 labels of the train dataset and decoded 3 of its 3 images" in (
        caplog.text
    )
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_id_outside_the_classes_is_named_with_its_file(tiny_ade_root):
    root = tiny_ade_root()
    path = set_pixel(root, "0002.png", 77)
    with pytest.raises(
        DataError,
        match=rf"{path} holds the id 77 \(1 pixels\), but the dataset's 4 classes are 0-3, and "
        "ignored pixels 255",
    ):
        run(build(root))


def test_classes_counted_from_one_get_a_hint(tiny_ade_root):
    root = tiny_ade_root(ids=(1, 2, 3, 4))
    with pytest.raises(DataError, match=r"holds the id 4 .*set reduce_zero_label=True"):
        run(build(root))
    run(build(root, reduce_zero_label=True))


def test_ignored_pixels_are_fine(tiny_ade_root):
    run(build(tiny_ade_root(ids=(0, 3, 255))))


def test_a_zero_label_is_ignored_where_the_dataset_says_so(tiny_ade_root):
    root = tiny_ade_root(ids=(0, 1, 150, 255))
    run(build(root, ADE20KDataset))
    set_pixel(root, "0000.png", 151)
    with pytest.raises(DataError, match=r"id 151 .* classes are 1-150, and ignored pixels 0, 255"):
        run(build(root, ADE20KDataset))


def test_classes_left_out_are_ignored(tiny_ade_root):
    root = tiny_ade_root(ids=(0, 10, 11, 255))
    classes = CamVidDataset.METAINFO["classes"]
    run(build(root, CamVidDataset, metainfo=dict(classes=classes[:11])))
    set_pixel(root, "0000.png", 12)
    with pytest.raises(DataError, match=r"id 12 .* classes are 0-10, and ignored pixels 11, 255"):
        run(build(root, CamVidDataset, metainfo=dict(classes=classes[:11])))


@pytest.mark.parametrize("options", [{}, dict(reduce_zero_label=True)])
@pytest.mark.parametrize("classes", [None, ("bicyclist", "sky", "void")])
def test_training_ids_are_what_the_loader_makes_of_all_ids(tmp_path, options, classes):
    for folder in PREFIX.values():
        (tmp_path / folder).mkdir(parents=True)
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(
        tmp_path / "annotations/training/a.png"
    )
    Image.new("RGB", (16, 16)).save(tmp_path / "images/training/a.png")
    metainfo = classes and dict(classes=classes)
    dataset = build(tmp_path, CamVidDataset, metainfo=metainfo, **options)
    loaded = dataset[0]["gt_seg_map"].ravel()
    np.testing.assert_array_equal(checks.training_ids(dataset), loaded)


def test_an_id_that_eight_bits_would_wrap_into_a_class_is_seen(tiny_ade_root):
    root = tiny_ade_root()
    set_pixel(root, "0001.png", 257, np.uint16)
    assert build(root)[1]["gt_seg_map"][0, 0] == 1
    with pytest.raises(DataError, match=r"0001\.png holds the id 257"):
        run(build(root))


def test_an_unreadable_label_is_named(tiny_ade_root):
    root = tiny_ade_root()
    (root / "annotations/training/0001.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"The label \S+0001\.png cannot be read"):
        run(build(root))


def test_a_truncated_image_is_named_though_opencv_would_fill_it(tiny_ade_root):
    root = tiny_ade_root()
    path = root / "images/training/0001.jpg"
    noise = np.random.default_rng(0).integers(0, 256, np.asarray(Image.open(path)).shape, np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(DataError, match=r"The image \S+0001\.jpg cannot be read \(.*truncated"):
        run(build(root))


def test_an_image_that_no_decoder_reads_is_named(tiny_ade_root):
    root = tiny_ade_root(size=(48, 64))
    path = root / "images/training/0001.png"
    Image.new("RGB", (64, 48)).save(path)
    content = path.read_bytes()
    start = content.index(b"IDAT") + 4
    damaged = content[:start] + bytes(8) + content[start + 8 :]
    path.with_suffix(".jpg").write_bytes(damaged)
    path.unlink()
    with pytest.raises(DataError, match=r"The image \S+0001\.jpg cannot be read"):
        run(build(root))


def test_a_label_of_another_size_is_named(tiny_ade_root):
    root = tiny_ade_root(size=(48, 64))
    Image.new("RGB", (60, 48)).save(root / "images/training/0003.jpg")
    with pytest.raises(DataError, match=r"0003\.png has 64x48 pixels, its image 60x48"):
        run(build(root))


def test_an_image_turned_by_its_exif_data_fits_its_label(tiny_ade_root):
    root = tiny_ade_root(num_train=1, size=(48, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    Image.new("RGB", (48, 64)).save(root / "images/training/0000.jpg", exif=exif)
    assert build(root)[0]["img"].shape[:2] == (48, 64)
    run(build(root))


def test_labels_of_colors_are_named(tiny_ade_root):
    root = tiny_ade_root()
    Image.new("RGB", (64, 48)).save(root / "annotations/training/0000.png")
    with pytest.raises(DataError, match=r"0000\.png has shape \(48, 64, 3\).*class ids"):
        run(build(root))


def test_the_first_of_several_bad_labels_is_named_and_they_are_counted(tiny_ade_root):
    root = tiny_ade_root(num_train=4)
    for name in ("0001.png", "0003.png"):
        set_pixel(root, name, 9)
    with pytest.raises(
        DataError, match=r"0001\.png.*\(2 problems in the 4 labels and 4 images that"
    ):
        run(build(root))


def test_reading_stops_at_the_time_limit_and_says_so(tiny_ade_root, monkeypatch, caplog):
    read = checks.LabelScan.__call__

    def slowly(self, sample: dict) -> np.ndarray:
        time.sleep(0.05)
        return read(self, sample)

    monkeypatch.setattr(checks.LabelScan, "__call__", slowly)
    with caplog.at_level(logging.INFO):
        run(build(tiny_ade_root(num_train=40)), max_seconds=0.2, num_threads=1)
    counts = [int(r.message.split()[1]) for r in caplog.records if r.message.startswith("Checked")]
    assert len(counts) == 1
    assert 1 <= counts[0] < 40
    assert "decoded 0 of its 40 images" in caplog.text, "labels come first"


def test_classes_that_no_label_holds_are_reported(tiny_ade_root, caplog):
    run(build(tiny_ade_root(ids=(0, 2))))
    assert "2 classes are in no label of the train dataset: b, d." in caplog.text


def test_data_without_labels_are_passed_over(tiny_ade_root, caplog):
    dataset = build(
        tiny_ade_root(),
        data_prefix=dict(img_path="images/training"),
        pipeline=LOADERS[:1],
    )
    with caplog.at_level(logging.INFO):
        run(dataset)
        checks.check_pairs(dataset, "test", LOGGER)
    assert not caplog.records


def test_loaders_inside_test_time_augmentation_are_found(tiny_ade_root):
    root = tiny_ade_root()
    tta = dict(type="TestTimeAug", transforms=[[dict(type="LoadAnnotations")]])
    set_pixel(root, "0000.png", 9)
    with pytest.raises(DataError, match="holds the id 9"):
        run(build(root, pipeline=[dict(type="LoadImageFromFile"), tta]))


def test_an_image_without_its_label_is_named(tiny_ade_root):
    root = tiny_ade_root()
    label = root / "annotations/training/0001.png"
    label.unlink()
    with pytest.raises(
        DataError,
        match=rf"1 of the 4 labels of the train dataset do not exist; the first .* {label}\.",
    ):
        checks.check_pairs(build(root), "train", LOGGER)


def test_where_all_are_missing_the_suffix_is_named(tiny_ade_root):
    root = tiny_ade_root()
    with pytest.raises(
        DataError,
        match=r"4 of the 4 labels .*0000_l\.png\. .* end in '_l\.png': where theirs end "
        r"otherwise, set train_dataloader\.dataset\.seg_map_suffix, and .*, "
        r"train_dataloader\.dataset\.data_prefix\.seg_map_path\.",
    ):
        checks.check_pairs(build(root, seg_map_suffix="_l.png"), "train", LOGGER)
    (root / "list.txt").write_text("0000\n0001\n")
    with pytest.raises(
        DataError, match=r"2 of the 2 images .*set val_dataloader.dataset.img_suffix"
    ):
        listed = build(root, img_suffix=".jpeg", ann_file="list.txt")
        checks.check_pairs(listed, "val", LOGGER)


def test_a_listed_image_that_does_not_exist_is_named(tiny_ade_root):
    root = tiny_ade_root()
    (root / "list.txt").write_text("0000\n0009\n")
    with pytest.raises(DataError, match=r"1 of the 2 images .* \S+0009\.jpg\."):
        checks.check_pairs(build(root, ann_file="list.txt"), "train", LOGGER)


def test_a_label_without_its_image_is_a_warning(tiny_ade_root, caplog):
    root = tiny_ade_root()
    (root / "images/training/0002.jpg").unlink()
    checks.check_pairs(build(root), "train", LOGGER)
    assert "1 labels in the folder of the train dataset have no image" in caplog.text
    assert "annotations/training/0002.png" in caplog.text


def test_a_subset_of_the_data_is_no_reason_to_warn(tiny_ade_root, caplog):
    checks.check_pairs(build(tiny_ade_root(), indices=2), "train", LOGGER)
    assert not caplog.records


class Model(nn.Module):
    def __init__(self, decode: int, auxiliary: int | tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.decode_head = self.head(decode)
        if isinstance(auxiliary, tuple):
            self.auxiliary_head = nn.ModuleList(map(self.head, auxiliary))
        elif auxiliary is not None:
            self.auxiliary_head = self.head(auxiliary)

    @staticmethod
    def head(num_classes: int) -> nn.Module:
        head = nn.Identity()
        head.num_classes = num_classes
        return head


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("model", [Model(4), Model(4, 4), Model(4, (4, 4)), Wrapper(Model(4, 4))])
def test_heads_with_the_datasets_classes_pass(tiny_ade_root, model):
    checks.check_num_classes(build(tiny_ade_root()), "train", model)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (Model(150, 4), "model.decode_head.num_classes=150:"),
        (Model(19, 19), "model.decode_head.num_classes=19, model.auxiliary_head.num_classes=19:"),
        (Wrapper(Model(4, (4, 5))), "model.auxiliary_head.1.num_classes=5:"),
    ],
)
def test_heads_with_other_classes_are_named(tiny_ade_root, model, named):
    with pytest.raises(DataError) as caught:
        checks.check_num_classes(build(tiny_ade_root()), "train", model)
    assert named in str(caught.value)
    assert "4 classes (a, b, c, d)" in str(caught.value)
    assert "set num_classes=4 for every head" in str(caught.value)


def test_a_dataset_without_classes_is_named(tiny_ade_root):
    with pytest.raises(DataError, match=r"no classes: .*metainfo=dict\(classes=\('first', "):
        checks.check_num_classes(build(tiny_ade_root(), metainfo=None), "train", Model(2))


def test_wrapped_datasets_are_opened(tiny_ade_root):
    a, b = (
        dict(type="BaseSegDataset", data_root=str(tiny_ade_root(name=name)), data_prefix=PREFIX)
        for name in "ab"
    )
    wrapped = RepeatDataset(dict(type="ConcatDataset", datasets=[a, b]), times=3)
    roots = [leaf.data_root for leaf in checks.leaf_datasets(wrapped)]
    assert roots == [a["data_root"], b["data_root"]]
