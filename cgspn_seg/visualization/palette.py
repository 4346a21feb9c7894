"""Colors for classes, and the font that names them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import ImageFont

__all__ = ["as_palette", "distinct_palette", "load_font"]

# The first color of every palette; the others follow by being far from those before.
_FIRST_COLOR = (66, 133, 214)


def as_palette(palette: ArrayLike) -> NDArray[np.uint8]:
    """Check a palette and return it as a uint8 array of shape (num_classes, 3).

    Raises:
        ValueError: If it is not a list of RGB triples from 0 to 255.
    """
    colors = np.asarray(palette)
    if colors.ndim != 2 or colors.shape[1] != 3 or not len(colors):
        raise ValueError(
            f"palette: expected RGB colors of shape (num_classes, 3), got shape {colors.shape}"
        )
    if colors.min() < 0 or colors.max() > 255:
        raise ValueError(
            f"palette: expected RGB colors from 0 to 255, got {colors.min()} to {colors.max()}"
        )
    return colors.astype(np.uint8)


def _lab(colors: NDArray[np.uint8]) -> NDArray[np.float32]:
    """CIELAB coordinates of (N, 3) RGB colors."""
    return cv2.cvtColor((colors[None] / 255.0).astype(np.float32), cv2.COLOR_RGB2LAB)[0]


@cache
def _palette_of(num_colors: int) -> bytes:
    steps = np.linspace(0, 255, 18).round().astype(np.uint8)
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    lab = _lab(candidates)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    # Neither near-black nor near-white, neither gray nor glaring: readable over a photograph.
    usable = (lab[:, 0] > 45) & (lab[:, 0] < 90) & (chroma > 30) & (chroma < 80)
    candidates, lab = candidates[usable], lab[usable]
    chosen = [np.array(_FIRST_COLOR, np.uint8)]
    distance = np.full(len(lab), np.inf)
    while len(chosen) < num_colors:
        distance = np.minimum(distance, np.linalg.norm(lab - _lab(chosen[-1][None]), axis=1))
        chosen.append(candidates[int(distance.argmax())])
    return np.stack(chosen).tobytes()


def distinct_palette(num_colors: int) -> NDArray[np.uint8]:
    """Colors that are told apart easily, for data sets that define none.

    Each color is the one farthest, in CIELAB, from all before it, so a palette of few colors is
    the beginning of a palette of many, and calls agree.

    Args:
        num_colors: How many, from 1 to 1024.

    Returns:
        RGB uint8 array of shape (num_colors, 3).

    Raises:
        ValueError: If `num_colors` is out of range.
    """
    if not 1 <= num_colors <= 1024:
        raise ValueError(f"num_colors: expected 1 to 1024, got {num_colors}")
    return np.frombuffer(_palette_of(num_colors), np.uint8).reshape(-1, 3).copy()


@cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans at `size` pixels; Matplotlib ships it, so every machine draws the same."""
    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size
    )
