#!/usr/bin/env python
"""Segment images: python tools/predict.py CONFIG CHECKPOINT INPUT [INPUT ...] --out-dir DIR."""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mmcv
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cgspn_seg.engine import launch
from cgspn_seg.engine.cli import is_debugging
from cgspn_seg.engine.inference import Predictor
from cgspn_seg.engine.memory import PeakMemory
from cgspn_seg.errors import closest
from cgspn_seg.visualization import overlay_with_legend
from cgspn_seg.visualization.files import write_png

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
MAX_CLASSES = 256  # what an 8-bit label map holds


@dataclass(frozen=True)
class Job:
    """An image and the name of its outputs, relative to their folders and without a suffix."""

    image: Path
    name: Path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write a label map (PNG of class ids) and a color overlay with a legend for "
        "every image",
    )
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="checkpoint file (.pth or .safetensors) or URL")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="images, or folders of them")
    parser.add_argument("--out-dir", required=True, help="folder for labels/ and overlays/")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--opacity", type=float, default=0.5, help="of the overlay, 0 to 1")
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="draw only these classes in the overlays"
    )
    launch.add_config_arguments(parser, runs=False)
    args = parser.parse_args()
    if not 0 <= args.opacity <= 1:
        parser.error(f"--opacity: expected a number from 0 to 1, got {args.opacity}")
    return args


def find_images(inputs: Sequence[str]) -> list[Job]:
    """List the images in files and folders, with a name for each that no other one has.

    Raises:
        FileNotFoundError: If an input does not exist, or a folder has no image.
    """
    found: dict[Path, Path] = {}  # image to the folder below which it is named
    for given in map(Path, inputs):
        if given.is_dir():
            images = sorted(p for p in given.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not images:
                raise FileNotFoundError(
                    f"{given}: no image in this folder or below it; expected files that end in "
                    f"{', '.join(IMAGE_SUFFIXES)}"
                )
            for image in images:
                found.setdefault(image, given)
        elif given.is_file():
            found.setdefault(given, given.parent)
        else:
            raise FileNotFoundError(f"{given} does not exist; expected an image or a folder")
    return name_outputs(found)


def name_outputs(found: Mapping[Path, Path]) -> list[Job]:
    """Name the outputs of images by their path below a folder, so that no two names are equal.

    Images of one name get that of their folder before it if they are from several, their suffix
    behind it if these differ (a.jpg and a.png become a_jpg and a_png), and a number otherwise.

    Args:
        found: Images and the folders below which they were found.
    """
    names = {image: image.relative_to(root).with_suffix("") for image, root in found.items()}
    for same in groups(names):
        if len({found[image] for image in same}) > 1:
            for image in same:
                names[image] = Path(found[image].absolute().name, names[image])
    for same in groups(names):
        if len({image.suffix for image in same}) > 1:
            for image in same:
                names[image] = names[image].with_name(f"{names[image].name}_{image.suffix[1:]}")
    taken: set[Path] = set()
    for image, name in names.items():
        number = 1
        while names[image] in taken:
            number += 1
            names[image] = name.with_name(f"{name.name}_{number}")
        taken.add(names[image])
    return [Job(image, name) for image, name in names.items()]


def groups(names: Mapping[Path, Path]) -> list[list[Path]]:
    """Lists of the images that share a name."""
    by_name: dict[Path, list[Path]] = {}
    for image, name in names.items():
        by_name.setdefault(name, []).append(image)
    return [images for images in by_name.values() if len(images) > 1]


def chosen_ids(classes: Sequence[str], names: Sequence[str] | None) -> list[int]:
    """Ids of the classes to draw."""
    if names is None:
        return list(range(len(classes)))
    for name in names:
        if name not in classes:
            hint = closest(name, classes) or f"; it has {', '.join(classes)}"
            raise ValueError(f"--classes: the model has no class {name!r}{hint}")
    return [classes.index(name) for name in names]


def read_image(image: Path) -> np.ndarray | None:
    """Read an image as RGB, `None` where that cannot be done."""
    try:
        return mmcv.imread(str(image), channel_order="rgb")
    except Exception:  # decoders raise what they like, and MMCV asserts
        return None


def main() -> int:
    args = parse_args()
    jobs = find_images(args.inputs)
    cfg = launch.load_config(args)
    predictor = Predictor(cfg, args.checkpoint, args.device)
    if predictor.num_classes > MAX_CLASSES:
        raise ValueError(
            f"{args.config}: label maps are 8-bit, so expected at most {MAX_CLASSES} classes, got "
            f"{predictor.num_classes}"
        )
    shown = chosen_ids(predictor.classes, args.classes)
    out_dir = Path(args.out_dir)

    failed: list[Path] = []
    seconds: list[float] = []
    memory = PeakMemory(predictor.device)
    console = Console(stderr=True)

    def skip(image: Path, reason: str) -> None:
        failed.append(image)
        # Names and messages may hold brackets, which are markup otherwise.
        console.print(f"{image}: {reason}; skipped", style="red", markup=False, soft_wrap=True)

    columns = (TextColumn("Segmenting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for job in progress.track(jobs):
            image = read_image(job.image)
            if image is None:
                skip(job.image, "not readable as an image")
                continue
            start = time.perf_counter()
            try:
                labels = predictor(job.image)
            except (ValueError, RuntimeError) as error:  # such as a size that the model refuses
                if is_debugging():
                    raise
                skip(job.image, next(iter(str(error).splitlines()), type(error).__name__))
                continue
            seconds.append(time.perf_counter() - start)
            write_png(out_dir / "labels" / f"{job.name}.png", labels.astype(np.uint8))
            drawn = np.where(np.isin(labels, shown), labels, -1)
            overlay = overlay_with_legend(
                image, drawn, predictor.classes, predictor.palette, opacity=args.opacity
            )
            write_png(out_dir / "overlays" / f"{job.name}.png", overlay)
    print(f"Wrote {len(jobs) - len(failed)} label maps and overlays to {out_dir}")
    if seconds:
        print(f"Predicted in {sum(seconds) / len(seconds):.2f} s per image, {memory}")
    if failed:
        sys.stderr.write(
            f"{len(failed)} of {len(jobs)} images could not be segmented (named above)\n"
        )
        return 1
    return 0


if __name__ == "__main__":
    launch.run(main)
