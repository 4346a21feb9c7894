"""Finds what is wrong with images, labels and classes before training time is spent on them."""

import os
import random
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from logging import Logger
from pathlib import Path

import mmcv
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmengine import fileio
from mmengine.dataset import BaseDataset
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import nn

from cgspn_seg.datasets.errors import DataError, check_label_shape, listing, unreadable

IGNORED = 255  # what mmseg's loader makes of a zero label and of a class left out


def leaf_datasets(dataset: object) -> Iterator[BaseDataset]:
    """Go through RepeatDataset, ConcatDataset and other wrappers to the datasets inside."""
    if isinstance(dataset, BaseDataset):
        yield dataset
    elif hasattr(dataset, "datasets"):
        for part in dataset.datasets:
            yield from leaf_datasets(part)
    elif hasattr(dataset, "dataset"):
        yield from leaf_datasets(dataset.dataset)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside those of distributed training and of test-time augmentation."""
    while hasattr(model, "module"):
        model = model.module
    return model


def check_num_classes(dataset: BaseSegDataset, name: str, model: nn.Module) -> None:
    """Check that the heads of a model predict as many classes as a dataset has.

    Args:
        dataset: The dataset.
        name: What to call it in a message: train, val, test.
        model: The segmentor, bare or wrapped.

    Raises:
        DataError: They do not, or the dataset does not say what its classes are.
    """
    classes = dataset.metainfo.get("classes")
    if not classes:
        raise DataError(
            f"The {name} dataset ({type(dataset).__name__}) has no classes: name them in the order "
            f"of their ids, {name}_dataloader.dataset.metainfo=dict(classes=('first', 'second'))."
        )
    model = unwrap(model)
    wrong = []
    for key in ("decode_head", "auxiliary_head"):
        head = getattr(model, key, None)
        heads = enumerate(head) if isinstance(head, nn.ModuleList) else [(None, head)]
        for i, part in heads:
            found = getattr(part, "num_classes", len(classes))
            if found != len(classes):
                wrong.append(f"model.{key}{'' if i is None else f'.{i}'}.num_classes={found}")
    if wrong:
        raise DataError(
            f"The {name} dataset has {len(classes)} classes ({listing(classes)}), but the config "
            f"says {', '.join(wrong)}: set num_classes={len(classes)} for every head, or give the "
            "dataset the classes of its own with metainfo=dict(classes=...)."
        )


def check_pairs(dataset: BaseSegDataset, name: str, logger: Logger) -> None:
    """Check that each image has its label, and warn of labels without their image.

    Args:
        dataset: The dataset; one that has no labels or is not on a local disk is passed over.
        name: What to call it in a message: train, val, test.
        logger: Takes the warning.

    Raises:
        DataError: An image or its label does not exist.
    """
    require_files(dataset, f"the {name} dataset", f"{name}_dataloader.dataset")
    lonely = _labels_without_image(dataset) if _local_samples(dataset) else []
    if lonely:
        logger.warning(
            f"{len(lonely)} labels in the folder of the {name} dataset have no image ending in "
            f"{dataset.img_suffix!r}, and are not used; the first is {lonely[0]}."
        )


def require_files(dataset: BaseSegDataset, called: str, where: str) -> None:
    """Check that each image and each label exists.

    Args:
        dataset: The dataset; one that has no labels or is not on a local disk is passed over.
        called: What to call it in a message, such as "the train dataset".
        where: Its key in the config.

    Raises:
        DataError: An image or its label does not exist.
    """
    samples = _local_samples(dataset)
    for key, what, suffix in (
        ("img_path", "image", "img_suffix"),
        ("seg_map_path", "label", "seg_map_suffix"),
    ):
        missing = [sample[key] for sample in samples if not os.path.exists(sample[key])]
        if not missing:
            continue
        way_out = (
            f"Supply them, or name the complete pairs in a text file and that in {where}.ann_file."
        )
        if len(missing) == len(samples):
            ending = getattr(dataset, suffix)
            way_out = (
                f"They are looked for as names that end in {ending!r}: where theirs end otherwise, "
                f"set {where}.{suffix}, and where they lie elsewhere, {where}.data_prefix.{key}."
            )
        raise DataError(
            f"{len(missing)} of the {len(samples)} {what}s of {called} do not exist; the first "
            f"that is missing is {missing[0]}. {way_out}"
        )


def _labels_without_image(dataset: BaseSegDataset) -> list[Path]:
    images, labels = (Path(dataset.data_prefix.get(k) or "") for k in ("img_path", "seg_map_path"))
    ending = dataset.seg_map_suffix
    relative = (str(p.relative_to(labels)) for p in sorted(labels.rglob(f"*{ending}")))
    stems = (name.removesuffix(ending) for name in relative)
    return [
        labels / (s + ending) for s in stems if not (images / (s + dataset.img_suffix)).exists()
    ]


def check_labels(
    dataset: BaseSegDataset,
    name: str,
    logger: Logger,
    *,
    max_seconds: float | None = 60.0,
    num_threads: int | None = None,
) -> None:
    """Read the labels, and check that each fits its image and holds the dataset's ids only.

    Then decodes the images, in the time that is left. Also warns of classes that no label holds,
    and says in the log how many labels and images were read.

    Args:
        dataset: The dataset; one that loads no labels or is not on a local disk is passed over.
        name: What to call it in a message: train, val, test.
        logger: Takes warnings and the result.
        max_seconds: When to stop, leaving the rest unread; `None` reads all. Labels come before
            images; the order among them is random, and always the same.
        num_threads: How many files to read at a time; `None` means one for each core, up to 16.

    Raises:
        DataError: A label or an image cannot be read, or a label is not of the size of its image
            or holds other ids.
    """
    samples = _local_samples(dataset)
    scan = LabelScan(dataset)
    if not samples or scan.load_label is None:
        return
    random.Random(0).shuffle(samples)
    logger.info(f"Checking the {len(samples)} labels of the {name} dataset, and its images ...")
    start = time.monotonic()
    pixels = np.zeros(scan.num_classes, np.int64)
    problems: set[str] = set()  # the label's check may have met an unreadable image as well
    checked = decoded = 0
    num_images = len(samples) if scan.load_image is not None else 0
    pool = ThreadPoolExecutor(num_threads or default_threads())
    with progress_bar() as progress:
        task = progress.add_task(f"Checking {name} data", total=len(samples) + num_images)
        try:
            # The pool takes them in this order.
            labels = {pool.submit(scan, sample) for sample in samples}
            images = {pool.submit(scan.decode_image, s["img_path"]) for s in samples[:num_images]}
            for future in as_completed(labels | images, timeout=max_seconds):
                progress.advance(task)
                try:
                    if future in images:
                        decoded += 1
                        future.result()
                    else:
                        checked += 1
                        pixels += future.result()
                except DataError as error:
                    problems.add(str(error))
        except TimeoutError:
            pass
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    if problems:
        read = f"{checked} labels and {decoded} images that were read"
        count = f" ({len(problems)} problems in the {read}.)"
        raise DataError(min(problems) + (count if len(problems) > 1 else ""))
    logger.info(
        f"Checked {checked} of the {len(samples)} labels of the {name} dataset and decoded "
        f"{decoded} of its {num_images} images in {time.monotonic() - start:.1f} s: no errors."
    )
    unseen = [c for c, n in zip(dataset.metainfo["classes"], pixels, strict=True) if n == 0]
    if unseen and checked == len(samples):
        logger.warning(
            f"{len(unseen)} classes are in no label of the {name} dataset: {listing(unseen)}."
        )


def default_threads() -> int:
    """How many files to read at a time."""
    return min(16, os.cpu_count() or 1)


def progress_bar() -> Progress:
    """A progress bar on the terminal, or none where the output goes elsewhere."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


class LabelScan:
    """Reads labels as a dataset's pipeline does, and sees what that would pass over."""

    def __init__(self, dataset: BaseSegDataset) -> None:
        self.load_image = _find_transform(dataset.pipeline.transforms, LoadImageFromFile)
        self.load_label = _find_transform(dataset.pipeline.transforms, LoadAnnotations)
        self.reduce_zero_label = dataset.reduce_zero_label
        self.num_classes = len(dataset.metainfo["classes"])
        self.training_ids = training_ids(dataset)
        self.is_class = self.training_ids < self.num_classes
        self.is_ignored = np.isin(self.training_ids, (IGNORED, dataset.ignore_index))

    def __call__(self, sample: dict) -> np.ndarray:
        """Count the pixels of each class in the label of a sample.

        Args:
            sample: Its ``img_path`` and ``seg_map_path``.

        Returns:
            (classes,) integers.

        Raises:
            DataError: The label cannot be read, or holds other ids than those of the dataset, or
                is not of the size of its image.
        """
        path = sample["seg_map_path"]
        try:
            content = fileio.get(path, backend_args=self.load_label.backend_args)
            backend = self.load_label.imdecode_backend
            label = mmcv.imfrombytes(content, flag="unchanged", backend=backend).squeeze()
            counts = np.bincount(label.ravel(), minlength=256)
        except Exception as error:  # each decoder has its own
            raise unreadable("label", path, error) from error
        image_shape = self._image_shape(sample["img_path"], label.shape)
        check_label_shape(path, label.shape, image_shape)
        wrong = counts.copy()
        wrong[:256][self.is_class | self.is_ignored] = 0
        if wrong.any():
            self._raise_wrong_ids(path, wrong)
        pixels = np.zeros(256, np.int64)
        np.add.at(pixels, self.training_ids, counts[:256])  # classes may be merged
        return pixels[: self.num_classes]

    def _image_shape(self, path: str, expected: tuple[int, ...]) -> tuple[int, int] | None:
        """(H, W) of an image; from the head of its file alone where that is as expected."""
        if self.load_image is None:
            return None
        try:
            with Image.open(path) as image:
                shape = (image.height, image.width)
        except OSError:
            shape = None
        if shape == expected:
            return shape
        # Indeed another, or turned by its EXIF data, or of a format that Pillow does not know.
        return self.load_image({"img_path": path})["ori_shape"]

    def decode_image(self, path: str) -> None:
        """Decode an image in full, or raise :class:`DataError`."""
        try:
            with Image.open(path) as image:
                image.load()
        except Exception as error:  # Pillow raises what its decoders raise
            # OpenCV fills the end of a truncated file with gray, and says nothing.
            if "truncated" in str(error).lower():
                raise unreadable("image", path, error) from error
            self.load_image({"img_path": path})

    def _raise_wrong_ids(self, path: str, wrong: np.ndarray) -> None:
        """Raise for ids that occur ``wrong`` times, indexed by id, and mean nothing."""
        ids = np.flatnonzero(wrong)
        hint = ""
        if not self.reduce_zero_label and ids.tolist() == [self.num_classes]:
            hint = " If the classes are counted from 1, set reduce_zero_label=True on the dataset."
        raise DataError(
            f"The label {path} holds the id {ids[0]} ({wrong[ids[0]]} pixels), but the dataset's "
            f"{self.num_classes} classes are {_ranges(self.is_class)}, and ignored pixels "
            f"{_ranges(self.is_ignored & ~self.is_class)}. Correct the label, or add the class to "
            f"the dataset's metainfo.classes and to num_classes of the heads.{hint}"
        )


def training_ids(dataset: BaseSegDataset) -> np.ndarray:
    """Tell what mmseg's loader makes of label ids.

    Args:
        dataset: The dataset, with its ``reduce_zero_label`` and ``label_map``.

    Returns:
        (256,) integers; the id that training sees, for each id that a label file can hold.
    """
    ids = np.arange(256)
    if dataset.reduce_zero_label:
        ids = np.where(np.isin(ids, (0, IGNORED)), IGNORED, ids - 1)
    result = ids.copy()
    for old, new in (dataset.label_map or {}).items():
        result[ids == old] = new
    return result


def _local_samples(dataset: BaseSegDataset) -> list[dict]:
    """The samples that have labels, of a dataset on a local disk."""
    if dataset.backend_args or "://" in (dataset.data_prefix.get("img_path") or ""):
        return []
    samples = (dataset.get_data_info(i) for i in range(len(dataset)))
    return [sample for sample in samples if sample.get("seg_map_path")]


def _find_transform(transforms: Iterable[object], kind: type) -> object | None:
    """The first transform of a kind, also inside wrappers such as TestTimeAug."""
    for transform in transforms:
        if isinstance(transform, kind):
            return transform
        inner = [*getattr(transform, "transforms", ()), *getattr(transform, "subroutines", ())]
        if (found := _find_transform(inner, kind)) is not None:
            return found
    return None


def _ranges(mask: np.ndarray) -> str:
    """Write the indices where ``mask`` holds as ranges: ``0, 3-5``."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    return ", ".join(str(a) if b - a == 1 else f"{a}-{b - 1}" for a, b in edges) or "none"
