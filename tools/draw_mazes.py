#!/usr/bin/env python
"""Draw a small data set whose labels need context from across the image, in ADE20K's layout.

    python tools/draw_mazes.py

An image shows winding corridors, all alike, each with a colored door at one of its ends. The class
of every corridor pixel is the color of that door; walls have label 0, which is ignored as in
ADE20K. A model has to carry the color along the corridor, past neighbors of other colors.
"""

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

CLASSES = ("red", "amber", "green", "blue")
PALETTE = ((222, 73, 60), (246, 190, 74), (46, 160, 116), (62, 112, 201))
WALL, FLOOR = (38, 44, 58), (236, 233, 224)

# In pixels where nothing else is said.
CORRIDOR = 11.0  # from the middle of one wall to that of the next, across the image
WALL_WIDTH = 2.5
MOST_SWAY = 0.15  # of a wall beyond that of its neighbors, in widths of a corridor
DOOR = 7.0  # how far its color reaches into the corridor
STEEPEST = (0.8, 1.3)  # range of the steepest slope of an image's walls
SMALLEST = 40  # corridors of fewer pixels, cut off in a corner, are walled up

RECORD = "mazes.json"  # how a data set was drawn; its presence says that the folder is one of ours


@dataclass(frozen=True)
class MazeSet:
    """What a data set is drawn from; equal parameters give equal files.

    Attributes:
        training: Number of training images.
        validation: Number of validation images.
        size: Height and width of an image, pixels.
        seed: Of the random numbers.
    """

    training: int = 2000
    validation: int = 100
    size: int = 64
    seed: int = 0


def draw_maze(rng: np.random.Generator, size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one maze.

    Args:
        rng: Where everything random comes from.
        size: Height and width, pixels.

    Returns:
        The RGB image (size, size, 3), and the label (size, size): 0 for walls, i + 1 for the
        corridors whose door has the color `PALETTE[i]`.
    """
    along = np.arange(size) + 0.5
    across = along[:, None]
    walls = _wall_lines(rng, along, size)
    # How much of a pixel is wall, and between which walls it lies.
    cover, corridor = np.zeros((size, size)), np.zeros((size, size), int)
    for line in walls:
        distance = np.abs(across - line) / np.hypot(1, np.gradient(line))
        cover = np.maximum(cover, np.clip((WALL_WIDTH + 1) / 2 - distance, 0, 1))
        corridor += across > line
    # A corridor that leaves the image and comes back is two: each piece has a door of its own.
    walkable = cover < 0.5
    count, pieces = cv2.connectedComponents(walkable.astype(np.uint8), connectivity=4)
    # Each corridor has another color than the one before.
    steps = rng.integers(1, len(PALETTE), len(walls) + 1)
    colors = (rng.integers(len(PALETTE)) + np.cumsum(steps)) % len(PALETTE)
    floor = np.full((size, size, 3), FLOOR, float)
    label = np.where(walkable, colors[corridor] + 1, 0)
    for piece in range(1, count):
        inside = pieces == piece
        # The edges of the walls around it too, which are part floor.
        grown = cv2.dilate(inside.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        grown &= inside | ~walkable
        if inside.sum() < SMALLEST:
            cover[grown], label[inside] = 1, 0
            continue
        reach = along[inside.any(axis=0)]
        at_start = rng.random() < 0.5
        door = along < reach[0] + DOOR if at_start else along > reach[-1] - DOOR
        floor[grown & door] = PALETTE[label[inside][0] - 1]
    image = np.rint(floor + cover[..., None] * (np.array(WALL) - floor))
    turns = rng.integers(4)
    return (
        np.ascontiguousarray(np.rot90(image, turns), np.uint8),
        np.ascontiguousarray(np.rot90(label, turns), np.uint8),
    )


def _wall_lines(
    rng: np.random.Generator, along: NDArray[np.float64], size: int
) -> list[NDArray[np.float64]]:
    """Positions across the image, one array for each wall: they drift together, and sway alone."""
    drift = _waves(rng, along / size, frequencies=(0.75, 1.25, 1.75))
    drift *= rng.uniform(*STEEPEST) / np.abs(np.gradient(drift)).max()
    drift -= (drift.max() + drift.min()) / 2
    lines = []
    for middle in np.arange(-size, 2 * size, CORRIDOR) + rng.uniform(0, CORRIDOR):
        sway = _waves(rng, along / size, frequencies=(0.9, 1.8))
        lines.append(middle + drift + MOST_SWAY * CORRIDOR * np.tanh(sway))
    return [line for line in lines if line.max() > -WALL_WIDTH and line.min() < size + WALL_WIDTH]


def _waves(
    rng: np.random.Generator, position: NDArray[np.float64], frequencies: tuple[float, ...]
) -> NDArray[np.float64]:
    """A sum of sines of random strength and phase; frequencies are waves per image, ± 30 %."""
    return sum(
        rng.normal() / f * np.sin(2 * np.pi * (f * rng.uniform(0.7, 1.3) * position + rng.random()))
        for f in frequencies
    )


def draw_pair(
    maze_set: MazeSet, split: str, index: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw image and label number `index` of a split; every pair has random numbers of its own."""
    entropy = (maze_set.seed, ("training", "validation").index(split), index)
    return draw_maze(np.random.default_rng(entropy), maze_set.size)


def draw_set(maze_set: MazeSet, out: Path) -> bool:
    """Draw a data set, all of it or nothing, in the place of another one that this tool has drawn.

    Args:
        maze_set: What to draw.
        out: The folder to write: images/{training,validation}/*.jpg and, below annotations,
            labels of the same names as PNG files.

    Returns:
        Whether anything was drawn: False if the folder holds this very data set already.

    Raises:
        FileExistsError: The folder holds something else.
    """
    record = _record(maze_set)
    if (out / RECORD).is_file() and (out / RECORD).read_text(encoding="utf-8") == record:
        return False
    if out.exists() and not (out / RECORD).is_file() and (out.is_file() or any(out.iterdir())):
        raise FileExistsError(
            f"{out.absolute()} exists and was not drawn by this tool (it has no {RECORD}): remove "
            "it, or name another folder"
        )
    staging = out.with_name(f".{out.name}.{os.getpid()}.partial")
    jobs = [
        (split, index)
        for split in ("training", "validation")
        for index in range(getattr(maze_set, split))
    ]
    try:
        shown = track(
            jobs, f"Drawing {len(jobs)} mazes", transient=True, disable=not sys.stdout.isatty()
        )
        for split, index in shown:
            image, label = draw_pair(maze_set, split, index)
            _write_pair(staging, split, f"maze_{index:05d}", image, label)
        (staging / RECORD).write_text(record, encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return True


def _record(maze_set: MazeSet) -> str:
    """What identifies a data set: its parameters and, as drawing may change, its first pair."""
    first = b"".join(array.tobytes() for array in draw_pair(maze_set, "training", 0))
    return json.dumps(asdict(maze_set) | {"first": sha256(first).hexdigest()}, indent=2) + "\n"


def _write_pair(
    root: Path, split: str, name: str, image: NDArray[np.uint8], label: NDArray[np.uint8]
) -> None:
    for kind in ("images", "annotations"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    image_file = root / "images" / split / f"{name}.jpg"
    Image.fromarray(image).save(image_file, quality=100, subsampling=0)
    picture = Image.fromarray(label)
    picture.putpalette(np.array((WALL, *PALETTE), np.uint8).tobytes())  # shows in any viewer
    picture.save(root / "annotations" / split / f"{name}.png")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = MazeSet()
    parser.add_argument(
        "--out",
        type=Path,
        default=default_folder(),
        help="the folder to write (default: $CGSPN_DATA/mazes, or data/mazes)",
    )
    for name in ("training", "validation"):
        count = getattr(default, name)
        parser.add_argument(
            f"--{name}", type=int, default=count, help=f"number of {name} images ({count})"
        )
    parser.add_argument("--size", type=int, default=default.size, help="height and width (64)")
    parser.add_argument("--seed", type=int, default=default.seed, help="of what is random (0)")
    return parser.parse_args()


def default_folder() -> Path:
    """Where the demo's configs look for the mazes."""
    return Path(os.environ.get("CGSPN_DATA", "data"), "mazes")


def main() -> None:
    args = parse_args()
    maze_set = MazeSet(args.training, args.validation, args.size, args.seed)
    try:
        drawn = draw_set(maze_set, args.out)
    except FileExistsError as error:
        sys.exit(f"draw_mazes.py: error: {error}")
    counts = f"{maze_set.training} training and {maze_set.validation} validation images"
    print(f"{args.out}: {counts}{'' if drawn else ', drawn before'}")


if __name__ == "__main__":
    main()
