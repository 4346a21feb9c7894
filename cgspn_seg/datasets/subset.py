"""``fraction=0.1`` in the config of a data set: a fixed, class-aware part of its images."""

import inspect
import json
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine import registry as mmengine_registry
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.logging import print_log
from mmengine.registry import Registry, build_from_cfg
from mmseg import registry as mmseg_registry
from mmseg.datasets import BaseSegDataset

from cgspn_seg.datasets.checks import LabelScan, default_threads, progress_bar, require_files
from cgspn_seg.datasets.errors import DataError, listing
from cgspn_seg.datasets.stratify import choose_images

SUBSET_KEYS = ("fraction", "seed")
"""What :func:`build_dataset` takes beside the keys of the data set itself."""


@dataclass(frozen=True)
class Subset:
    """Which part of a data set was taken.

    Attributes:
        fraction: The part that was asked for.
        seed: The seed of the choice.
        indices: The images taken, as indices in the whole data set, ascending.
        names: Their paths in the folder of images, without suffix; whole paths where there are
            several folders, as in an ImageFolderDataset.
        num_total: How many images the whole data set has.
        classes: For each class, its ``name``, the number of ``images`` with it and its
            ``pixel_share``, of all pixels that have a class; the same of the whole data set as
            ``images_of`` and ``pixel_share_of``.
    """

    fraction: float
    seed: int
    indices: list[int]
    names: list[str]
    num_total: int
    classes: list[dict]

    def save(self, path: Path) -> None:
        """Write the names, in the form of an ``ann_file``, and beside them the figures.

        Args:
            path: The text file; the figures go into a JSON file of the same name.
        """
        path.write_text("".join(f"{name}\n" for name in self.names), encoding="utf-8")
        figures = dict(
            fraction=self.fraction,
            seed=self.seed,
            images=len(self.names),
            images_of=self.num_total,
            classes=self.classes,
        )
        path.with_suffix(".json").write_text(json.dumps(figures, indent=1), encoding="utf-8")


def build_dataset(
    cfg: Mapping[str, Any], registry: Registry, default_args: Mapping[str, Any] | None = None
) -> object:
    """Build a data set as MMEngine does, and take a part of it where its config says so.

    This is the way in which MMEngine's and MMSegmentation's data sets are built once
    `cgspn_seg.datasets` is imported; what has no ``fraction`` is built as before.

    Args:
        cfg: The config of a data set. ``fraction`` takes that part of its images, and ``seed``
            (default 0) chooses which.
        registry: Where its type is registered.
        default_args: Defaults for its keys.

    Returns:
        The data set. One with ``fraction`` has what was taken as its attribute ``subset``.

    Raises:
        DataError: ``fraction`` or ``seed`` cannot be used, or a label cannot be read.
    """
    wanted = None
    if isinstance(cfg, dict) and not cfg.keys().isdisjoint(SUBSET_KEYS):
        with registry.switch_scope_and_registry(cfg.get("_scope_")) as scoped:
            wanted = subset_keys(cfg, scoped)
    if wanted is None:
        return build_from_cfg(cfg, registry, default_args)
    whole = {key: value for key, value in cfg.items() if key not in SUBSET_KEYS}
    dataset = build_from_cfg(whole, registry, default_args)
    if whole.get("lazy_init") and not whole.get("pipeline"):
        return dataset  # asked for the names of its classes and the like, without data
    dataset.full_init()
    # One process reads the labels. The others wait for it, and stop with it.
    result: list = [None]
    if is_main_process():
        try:
            result = [_choose(dataset, *wanted)]
        except DataError as error:
            result = [error]
    broadcast_object_list(result)
    if isinstance(result[0], DataError):
        raise DataError(str(result[0]))
    dataset.subset = result[0]
    dataset.get_subset_(dataset.subset.indices)
    return dataset


def subset_keys(
    cfg: Mapping[str, Any], registry: Registry, where: str = "dataset"
) -> tuple[float, int] | None:
    """Read and check the keys of a subset.

    Args:
        cfg: The config of a data set or of a wrapper around some.
        registry: Where its type is registered.
        where: Its key in the whole config, for messages.

    Returns:
        ``fraction`` and ``seed``; `None` where there is no ``fraction``, or the type of the data
        set has one of its own.

    Raises:
        DataError: A value is out of range, or the type is a wrapper or no data set for
            segmentation.
    """
    kind = cfg.get("type")
    kind = registry.get(kind) if isinstance(kind, str) else kind
    if cfg.keys().isdisjoint(SUBSET_KEYS) or kind is None:
        return None
    own_keys = inspect.signature(kind).parameters
    if "fraction" in own_keys:
        return None
    if "fraction" not in cfg:
        if "seed" in own_keys or not can_be_divided(kind):
            return None  # whatever it means there
        raise DataError(
            f"{where}.seed: it chooses which images {where}.fraction takes, which is not set; set "
            "it, or leave the seed out."
        )
    if not can_be_divided(kind):
        way_out = "only data sets that derive from MMSegmentation's BaseSegDataset can"
        for inner in ("dataset", "datasets.0"):
            if inner.partition(".")[0] in cfg:
                way_out = f"set {where}.{inner}.fraction, of what is inside, instead"
        raise DataError(f"{where}.fraction: {kind.__name__} cannot be divided; {way_out}.")
    fraction, seed = cfg["fraction"], cfg.get("seed", 0)
    is_number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
    if not (is_number and 0 < fraction <= 1):
        hint = f" Write {fraction / 100:g} for {fraction} %." if is_number and fraction > 1 else ""
        raise DataError(
            f"{where}.fraction: expected a number above 0 and up to 1, got {fraction!r}.{hint}"
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise DataError(f"{where}.seed: expected an integer, got {seed!r}.")
    return float(fraction), seed


def can_be_divided(kind: object) -> bool:
    """Whether a data set of this type takes :data:`SUBSET_KEYS`."""
    return inspect.isclass(kind) and issubclass(kind, BaseSegDataset)


def _choose(dataset: BaseSegDataset, fraction: float, seed: int) -> Subset:
    """Choose a part of a data set, by its labels."""
    samples = [dataset.get_data_info(i) for i in range(len(dataset))]
    kind = type(dataset).__name__
    classes = dataset.metainfo.get("classes")
    if not samples or not classes:
        raise DataError(
            f"dataset.fraction: the {kind} has no {'classes' if samples else 'images'}, so no "
            "part can be taken of it."
        )
    names = _names(dataset, samples)
    start = time.monotonic()
    print_log(f"Reading the {len(samples)} labels of the {kind}, to take a part ...", "current")
    pixels = _count_pixels(dataset, samples)
    print_log(f"Read them in {time.monotonic() - start:.1f} s.", "current")
    size = max(1, int(fraction * len(samples) + 0.5))
    present = pixels > 0
    labels = [np.flatnonzero(row).tolist() for row in present]
    indices = choose_images(names, labels, size, seed)

    def figures(pixels: np.ndarray) -> tuple[list, list]:
        shares = pixels.sum(0) / max(1, pixels.sum())
        return (pixels > 0).sum(0).tolist(), shares.round(7).tolist()

    keys = ("name", "images", "pixel_share", "images_of", "pixel_share_of")
    table = zip(classes, *figures(pixels[indices]), *figures(pixels), strict=True)
    rows = [dict(zip(keys, row, strict=True)) for row in table]
    # A run may have several data sets, of one class; their folders tell which this is.
    folder = dataset.data_prefix.get("img_path") or dataset.data_root
    print_log(
        f"Took {size} of the {len(samples)} images in {folder} ({fraction=}, {seed=}).", "current"
    )
    if lost := [row["name"] for row in rows if row["images_of"] and not row["images"]]:
        message = f"They are too few for all classes: none shows {listing(lost)}."
        print_log(message, "current", logging.WARNING)
    return Subset(fraction, seed, indices, [names[i] for i in indices], len(samples), rows)


def _names(dataset: BaseSegDataset, samples: list[dict]) -> list[str]:
    """The paths of images in their folder, without suffix, as an ``ann_file`` has them."""
    folder = (dataset.data_prefix.get("img_path") or "").rstrip("/")
    folder = f"{folder}/" if folder else ""
    paths = (sample["img_path"].removeprefix(folder) for sample in samples)
    return [path.removesuffix(dataset.img_suffix) for path in paths]


def _count_pixels(dataset: BaseSegDataset, samples: list[dict]) -> np.ndarray:
    """(images, classes) pixels of each class in each image, as training sees them."""
    scan = LabelScan(dataset)
    kind = type(dataset).__name__
    if scan.load_label is None or not all(sample.get("seg_map_path") for sample in samples):
        raise DataError(
            f"dataset.fraction: the {kind} loads no labels, by which to choose; it needs "
            "LoadAnnotations in its pipeline and data_prefix.seg_map_path."
        )
    require_files(dataset, f"the {kind}", "dataset")
    with ThreadPoolExecutor(default_threads()) as pool, progress_bar() as progress:
        counts = pool.map(scan, samples)
        return np.stack([*progress.track(counts, len(samples), description="Reading labels")])


def install() -> None:
    """Have MMEngine and MMSegmentation build their data sets with :func:`build_dataset`."""
    # `build_func` is the registries' own setting for that. It makes the key work under every
    # tool that imports this package, inside RepeatDataset and ConcatDataset too.
    mmengine_registry.DATASETS.build_func = build_dataset
    mmseg_registry.DATASETS.build_func = build_dataset
