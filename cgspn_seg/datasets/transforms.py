"""The loaders of images and labels, with errors that name the file."""

import mmcv.transforms
import mmseg.datasets.transforms
from mmseg.registry import TRANSFORMS

from cgspn_seg.datasets.errors import check_label_shape, unreadable

# They take the places of the transforms they extend, under the same names: MMSegmentation's
# inference API finds the loaders of a pipeline by name, and every pipeline gains as it is.


@TRANSFORMS.register_module(force=True)
class LoadImageFromFile(mmcv.transforms.LoadImageFromFile):
    """Load an image, as :class:`mmcv.transforms.LoadImageFromFile` does.

    Raises:
        DataError: The file is missing or no readable image; the message names it.
    """

    def transform(self, results: dict) -> dict | None:
        """Add ``img``, ``img_shape`` and ``ori_shape`` to ``results``, from ``img_path``."""
        try:
            return super().transform(results)
        except Exception as error:  # each backend and decoder has its own
            raise unreadable("image", results["img_path"], error) from error


@TRANSFORMS.register_module(force=True)
class LoadAnnotations(mmseg.datasets.transforms.LoadAnnotations):
    """Load a label, as :class:`mmseg.datasets.transforms.LoadAnnotations` does.

    Raises:
        DataError: The file is missing or no readable image, holds colors instead of class ids, or
            is not of its image's size; the message names it.
    """

    def _load_seg_map(self, results: dict) -> None:
        path = results["seg_map_path"]
        try:
            super()._load_seg_map(results)
        except (AssertionError, KeyError):
            raise  # about the config, not about the file
        except Exception as error:
            raise unreadable("label", path, error) from error
        check_label_shape(path, results["gt_seg_map"].shape, results.get("ori_shape"))
