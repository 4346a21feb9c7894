"""What MMSegmentation lacks on the way from files to training samples."""

from cgspn_seg import compat  # noqa: F401  (before mmseg)
from cgspn_seg.datasets.camvid import CamVidDataset
from cgspn_seg.datasets.errors import DataError
from cgspn_seg.datasets.image_folder import ImageFolderDataset
from cgspn_seg.datasets.paths import check_data_paths
from cgspn_seg.datasets.subset import Subset, install
from cgspn_seg.datasets.transforms import LoadAnnotations, LoadImageFromFile

__all__ = [
    "CamVidDataset",
    "DataError",
    "ImageFolderDataset",
    "LoadAnnotations",
    "LoadImageFromFile",
    "Subset",
    "check_data_paths",
]

install()  # `fraction` in the config of a data set
