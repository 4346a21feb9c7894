"""Finds missing data folders before a runner is built."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from mmengine.config import Config
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from cgspn_seg.datasets.errors import DataError, listing
from cgspn_seg.datasets.subset import subset_keys

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")


def check_data_paths(cfg: Config, loaders: Iterable[str] = LOADERS) -> None:
    """Check that the folders of the datasets in a config exist and that there are images in them.

    Also checks the keys that take a part of a dataset.

    To be called before a runner is built, which fails on them in less helpful ways. Datasets that
    are not on a local disk are left to their file backend.

    Args:
        cfg: The whole config.
        loaders: Which of its data loaders to look at; those it does not have are passed over.

    Raises:
        DataError: A folder or an annotation file is missing, no image has the right suffix, or the
            part of a dataset that is asked for does not exist.
    """
    for key in loaders:
        loader = cfg.get(key)
        if isinstance(loader, dict):
            for where, dataset in _leaves(loader["dataset"], f"{key}.dataset"):
                if _is_local(dataset):
                    _check_exists(dataset, where, cfg)
                    _check_not_empty(dataset, where)


def _leaves(dataset: dict, where: str) -> Iterator[tuple[str, dict]]:
    """The configs inside RepeatDataset, ConcatDataset and other wrappers, with their keys.

    Raises:
        DataError: A wrapper or what is inside has a ``fraction`` that cannot be taken.
    """
    subset_keys(dataset, DATASETS, where)
    if isinstance(dataset.get("dataset"), dict):
        yield from _leaves(dataset["dataset"], f"{where}.dataset")
    elif "datasets" in dataset:
        for i, part in enumerate(dataset["datasets"]):
            yield from _leaves(part, f"{where}.datasets.{i}")
    else:
        yield where, dataset


def _is_local(dataset: dict) -> bool:
    return not dataset.get("backend_args") and "://" not in (dataset.get("data_root") or "")


def _check_exists(dataset: dict, where: str, cfg: Config) -> None:
    """Raise where a folder or file that the config of a dataset names does not exist."""
    root = Path(dataset.get("data_root") or "")
    parts = {f"data_prefix.{key}": part for key, part in (dataset.get("data_prefix") or {}).items()}
    parts["ann_file"] = dataset.get("ann_file")
    paths = {"data_root": root} | {key: root / part for key, part in parts.items() if part}
    for key, path in paths.items():
        if path.exists():
            continue
        message = f"{where}.{key}: {path.absolute()} does not exist"
        if key != "data_root":
            message += f"; its data_root holds {listing(sorted(p.name for p in root.iterdir()))}"
        message += ". Put the data there (see docs/new_dataset.md), or say where it is: "
        base = os.environ.get("CGSPN_DATA", "data")
        if "{{$CGSPN_DATA" in cfg.text and root.is_relative_to(base):
            message += f"set CGSPN_DATA to the folder that holds {root.relative_to(base)}, or "
        raise DataError(f"{message}pass --cfg-options {where}.data_root=/path/to/it.")


def _check_not_empty(dataset: dict, where: str) -> None:
    """Raise where a dataset finds no image in its folder."""
    kind = DATASETS.get(dataset["type"]) if isinstance(dataset["type"], str) else dataset["type"]
    if kind is None or not issubclass(kind, BaseSegDataset):
        return
    # Without pipeline and data list a dataset costs nothing, and knows its paths and suffixes.
    built = DATASETS.build({**dataset, "pipeline": [], "lazy_init": True})
    if built.load_data_list():
        return
    if built.ann_file:
        raise DataError(f"{where}.ann_file: {Path(built.ann_file).absolute()} lists no image.")
    folder = Path(built.data_prefix["img_path"]).absolute()
    suffixes = sorted({path.suffix for path in folder.rglob("*") if path.is_file()})
    found = f"there are files ending in {listing(suffixes)}: set {where}.img_suffix to theirs"
    raise DataError(
        f"{where}.data_prefix.img_path: no file in {folder} ends in {built.img_suffix!r}; "
        f"{found if suffixes else 'there are no files at all: put the images there'}."
    )
