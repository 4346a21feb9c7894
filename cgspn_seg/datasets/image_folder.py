"""Images without labels, from any folder: what distillation needs."""

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.dataset import BaseDataset
from mmseg.registry import DATASETS

from cgspn_seg.datasets.errors import DataError, listing
from cgspn_seg.datasets.subset import Subset

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


@DATASETS.register_module()
class ImageFolderDataset(BaseDataset):
    """All images in some folders and the folders in them, in the order of their paths.

    Links to folders are followed, to each folder once; files and folders whose name begins with a
    dot are not read. With MMSegmentation's transforms, which leave labels alone where there are
    none.

    Args:
        data_root: what relative ``folders`` are in.
        folders: one folder or several.
        suffixes: of image files, in small letters or capitals; both are found.
        fraction: part of the images to take, at random; as there are no labels, without regard to
            classes.
        seed: which.
        **kwargs: see :class:`mmengine.dataset.BaseDataset`.

    Raises:
        DataError: a folder does not exist or no image is found, or the fraction is out of range.
    """

    METAINFO = {"classes": ()}

    def __init__(
        self,
        data_root: str = "",
        folders: str | Sequence[str] = "",
        suffixes: Sequence[str] = IMAGE_SUFFIXES,
        fraction: float = 1.0,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
        if not (number and 0 < fraction <= 1):
            raise DataError(f"dataset.fraction: expected above 0 and up to 1, got {fraction!r}.")
        names = [folders] if isinstance(folders, str) else list(folders)
        endings = [suffixes] if isinstance(suffixes, str) else list(suffixes)
        if not names or not endings:
            raise DataError("dataset.folders and dataset.suffixes must not be empty.")
        if "data_prefix" in kwargs:
            raise DataError("dataset.data_prefix: this data set has `folders` in its place.")
        self.folders = [Path(data_root, name).expanduser() for name in names]
        self.suffixes = tuple(f".{ending.lower().removeprefix('.')}" for ending in endings)
        self.fraction, self.seed = float(fraction), seed
        super().__init__(data_root="", data_prefix={}, **kwargs)

    def load_data_list(self) -> list[dict]:
        """One dict with ``img_path`` for each image; the chosen ones with a fraction.

        Raises:
            DataError: see the class.
        """
        found = [str(path) for folder in self.folders for path in self._walk(folder)]
        size = max(1, int(self.fraction * len(found) + 0.5))
        if size < len(found):
            indices = sorted(random.Random(self.seed).sample(range(len(found)), size))
            names = [found[i] for i in indices]
            self.subset = Subset(self.fraction, self.seed, indices, names, len(found), [])
            found = names
        return [dict(img_path=path, seg_fields=[], sample_idx=i) for i, path in enumerate(found)]

    def _walk(self, folder: Path) -> list[Path]:
        if not folder.is_dir():
            raise DataError(
                f"dataset.folders: {folder.absolute()} is no folder; give folders of images, "
                "relative to data_root where that is set."
            )
        images, others, seen = [], set(), set()
        for place, folders, files in os.walk(folder, followlinks=True):
            real = os.path.realpath(place)
            if real in seen:  # by a link to a folder that was read, or that it lies in
                folders.clear()
                continue
            seen.add(real)
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                if name.startswith("."):
                    continue
                if name.lower().endswith(self.suffixes):
                    images.append(Path(place, name))
                else:
                    others.add(Path(name).suffix)
        if not images:
            there = f"; there are files ending in {listing(sorted(others))}" if others else ""
            raise DataError(
                f"dataset.folders: no file in {folder.absolute()} ends in "
                f"{listing(self.suffixes)}{there}."
            )
        return sorted(images)
