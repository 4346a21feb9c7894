"""CamVid: street scenes from a car, 480x360, in the 11 classes and the split of SegNet."""

import os
from pathlib import Path
from typing import Any

from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from cgspn_seg.datasets.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


@DATASETS.register_module()
class CamVidDataset(BaseSegDataset):
    """CamVid as ``tools/dataset_converters/camvid.py`` lays it out.

    Labels are PNGs of class ids: 0 to 10 for the classes that are scored, 11 for void. Where
    ``metainfo=dict(classes=...)`` names the first 11 classes only, as in
    ``configs/_base_/datasets/camvid.py``, void becomes the ignored label 255.

    Args:
        img_suffix: Suffix of the image files; `None` takes the one found in the image folder. The
            public images are PNGs, copies of the data set often hold JPEGs.
        **kwargs: See :class:`mmseg.datasets.BaseSegDataset`.

    Raises:
        DataError: ``img_suffix`` is `None` and the folder mixes several formats.
    """

    METAINFO = {
        "classes": (
            "sky",
            "building",
            "pole",
            "road",
            "pavement",
            "tree",
            "sign/symbol",
            "fence",
            "car",
            "pedestrian",
            "bicyclist",
            "void",
        ),
        "palette": [
            [128, 128, 128],
            [128, 0, 0],
            [192, 192, 128],
            [128, 64, 128],
            [60, 40, 222],
            [128, 128, 0],
            [192, 128, 128],
            [64, 64, 128],
            [64, 0, 128],
            [64, 64, 0],
            [0, 128, 192],
            [0, 0, 0],
        ],
    }

    def __init__(self, img_suffix: str | None = None, **kwargs: Any) -> None:
        super().__init__(img_suffix=img_suffix, **kwargs)

    def load_data_list(self) -> list[dict]:
        """List the images and where their labels are.

        Returns:
            One dict for each image, with ``img_path`` and ``seg_map_path``.
        """
        if self.img_suffix is None:
            self.img_suffix = find_image_suffix(self.data_prefix["img_path"])
        return super().load_data_list()


def find_image_suffix(folder: str | os.PathLike) -> str:
    """Find the suffix of the images in a folder.

    Args:
        folder: The folder, looked through without its subfolders.

    Returns:
        The only one of ``.png``, ``.jpg`` and ``.jpeg`` there; ``.png`` where there is none.

    Raises:
        DataError: The folder mixes them.
    """
    found = sorted({path.suffix for path in Path(folder).iterdir()}.intersection(IMAGE_SUFFIXES))
    if len(found) > 1:
        raise DataError(
            f"{folder} mixes images ending in {' and '.join(found)}: keep one format, "
            "or choose one with `img_suffix` in the dataset's config."
        )
    return found[0] if found else ".png"
