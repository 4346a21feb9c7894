"""Pictures of segmentations: colored label maps, overlays, legends and rows of titled panels.

Everything here takes and returns RGB uint8 arrays of shape (H, W, 3); label maps are integer
arrays of shape (H, W). Nothing depends on a model, a data set or a config.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from cgspn_seg.visualization.palette import as_palette, load_font

__all__ = [
    "LegendEntry",
    "blend",
    "colorize",
    "enlarge",
    "legend_entries",
    "legend_panel",
    "overlay_with_legend",
    "panel_grid",
]

RGBImage = NDArray[np.uint8]

_PAPER = (255, 255, 255)
_INK = (32, 33, 36)
_FAINT_INK = (112, 117, 122)
_HAIRLINE = (189, 193, 198)


def _check_labels(labels: ArrayLike) -> NDArray[np.integer]:
    labels = np.asarray(labels)
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels: expected an integer array of shape (H, W), got {labels.dtype} of shape "
            f"{labels.shape}; take the argmax over classes and squeeze the batch axis first"
        )
    return labels


def _check_image(image: ArrayLike) -> RGBImage:
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"image: expected an RGB uint8 array of shape (H, W, 3), got {image.dtype} of shape "
            f"{image.shape}"
        )
    return image


def colorize(
    labels: ArrayLike,
    palette: ArrayLike,
    *,
    ignore_color: tuple[int, int, int] = (0, 0, 0),
) -> RGBImage:
    """Paint a label map with one color per class.

    Args:
        labels: Class ids, integers of shape (H, W). Ids without a color in the palette (255, the
            usual ignore index, among them) get `ignore_color`.
        palette: RGB colors of shape (num_classes, 3), 0 to 255.
        ignore_color: RGB color of the ids outside the palette.

    Returns:
        RGB uint8 array of shape (H, W, 3).

    Raises:
        ValueError: If `labels` or `palette` has the wrong shape or type.
    """
    labels = _check_labels(labels)
    colors = np.concatenate([as_palette(palette), np.array([ignore_color], np.uint8)])
    known = (labels >= 0) & (labels < len(colors) - 1)
    return colors[np.where(known, labels, len(colors) - 1)]


def _boundaries(labels: NDArray[np.integer], thickness: int) -> NDArray[np.bool_]:
    """Pixels at which the class changes, (H, W) bool, about `thickness` pixels wide."""
    edge = np.zeros(labels.shape, np.uint8)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:, :] |= labels[1:, :] != labels[:-1, :]
    if thickness > 1:
        edge = cv2.dilate(edge, np.ones((thickness, thickness), np.uint8))
    return edge.astype(bool)


def blend(
    image: ArrayLike,
    labels: ArrayLike,
    palette: ArrayLike,
    *,
    opacity: float = 0.5,
    outline: bool = True,
) -> RGBImage:
    """Lay the class colors over an image; pixels without a class keep the image.

    Args:
        image: RGB uint8 array of shape (H, W, 3).
        labels: Class ids, integers of shape (H, W). Ids without a color are left transparent.
        palette: RGB colors of shape (num_classes, 3).
        opacity: Share of the color in the result, from 0 (image) to 1 (color).
        outline: Draw class boundaries in the opaque class color, which keeps thin and similarly
            colored classes apart. Left out for images under 128 pixels.

    Returns:
        RGB uint8 array of shape (H, W, 3).

    Raises:
        ValueError: If a shape or type is wrong, the sizes differ or `opacity` is outside [0, 1].
    """
    image, labels = _check_image(image), _check_labels(labels)
    if image.shape[:2] != labels.shape:
        raise ValueError(
            f"labels: expected the image's size {image.shape[:2]}, got {labels.shape} "
            "(height, width); resize the label map with nearest-neighbor interpolation"
        )
    if not 0.0 <= opacity <= 1.0:
        raise ValueError(f"opacity: expected a number from 0 to 1, got {opacity}")
    colors = as_palette(palette)
    painted = colorize(labels, colors)
    alpha = np.full((*labels.shape, 1), opacity, np.float32)
    short_side = min(labels.shape)
    if outline and short_side >= 128:
        edge = _boundaries(labels, thickness=max(1, round(short_side / 400)))
        alpha[edge] = max(opacity, 0.9)
    alpha[(labels < 0) | (labels >= len(colors))] = 0.0
    return np.rint(image * (1 - alpha) + painted * alpha).astype(np.uint8)


def enlarge(image: ArrayLike, min_side: int) -> RGBImage:
    """Enlarge a small image by a whole factor, every pixel a square; larger ones pass unchanged.

    Args:
        image: RGB uint8 array of shape (H, W, 3).
        min_side: Wanted length of the longer side, in pixels.

    Returns:
        RGB uint8 array of shape (k H, k W, 3) with the smallest k that reaches `min_side`.
    """
    image = _check_image(image)
    factor = max(1, -(-min_side // max(image.shape[:2])))
    return image.repeat(factor, axis=0).repeat(factor, axis=1) if factor > 1 else image


@dataclass(frozen=True)
class LegendEntry:
    """One line of a legend: class name, RGB color and share of the pixels (0 to 1)."""

    name: str
    color: tuple[int, int, int]
    share: float


def legend_entries(
    labels: ArrayLike, classes: Sequence[str], palette: ArrayLike
) -> list[LegendEntry]:
    """List the classes present in a label map, the largest first.

    Args:
        labels: Class ids, integers of shape (H, W).
        classes: Class names; index i names id i.
        palette: RGB colors of shape (num_classes, 3), one per class.

    Returns:
        One entry per class that occurs; shares are of all pixels, ids without a class included.
    """
    labels, colors = _check_labels(labels), as_palette(palette)
    if len(colors) < len(classes):
        raise ValueError(
            f"palette: expected {len(classes)} colors (one a class), got {len(colors)}"
        )
    known = labels[(labels >= 0) & (labels < len(classes))]
    counts = np.bincount(known.ravel().astype(np.int64), minlength=len(classes))
    order = np.argsort(-counts, kind="stable")
    return [
        LegendEntry(classes[i], tuple(int(c) for c in colors[i]), counts[i] / labels.size)
        for i in order
        if counts[i]
    ]


def _percent(share: float) -> str:
    if 0 < share < 0.001:
        return "<0.1 %"
    return f"{100 * share:.1f} %"


def _text_width(font: ImageFont.FreeTypeFont, text: str) -> int:
    return round(font.getlength(text))


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Cut `text` with an ellipsis so that it is at most `width` pixels wide."""
    if _text_width(font, text) <= width:
        return text
    while text and _text_width(font, text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def legend_panel(
    entries: Sequence[LegendEntry], height: int, *, font_size: int | None = None
) -> RGBImage:
    """Draw a legend: a swatch, the class name and its share of the image, one class a line.

    Args:
        entries: What to list, in this order; what does not fit is summed up in the last line.
        height: Height of the panel in pixels.
        font_size: Height of the text in pixels. Default: grows with `height`, from 12 to 34.

    Returns:
        RGB uint8 array of shape (height, W, 3), W as wide as the longest line.
    """
    size = font_size or int(np.clip(height / 30, 12, 34))
    font = load_font(size)
    line, margin = round(1.7 * size), round(0.9 * size)
    rows = max(1, (height - 2 * margin + line - size) // line)
    lines = [(entry.name, entry.color, _percent(entry.share)) for entry in entries]
    if len(lines) > rows:
        rest = entries[rows - 1 :]
        share = _percent(sum(entry.share for entry in rest))
        lines = [*lines[: rows - 1], (f"+ {len(rest)} more", None, share)]
    lines = lines or [("no class", None, "")]
    names = [_shorten(name, font, 16 * size) for name, _, _ in lines]
    name_width = max(_text_width(font, name) for name in names)
    share_width = max(_text_width(font, share) for _, _, share in lines)
    swatch = round(1.1 * size)
    width = 2 * margin + swatch + round(0.7 * size) + name_width + size + share_width

    panel = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(panel)
    for row, (name, (_, color, share)) in enumerate(zip(names, lines, strict=True)):
        middle = margin + row * line + size // 2
        if color is not None:
            box = (margin, middle - swatch // 2, margin + swatch, middle + swatch // 2)
            draw.rounded_rectangle(box, radius=max(1, size // 5), fill=color, outline=_HAIRLINE)
        text_left = margin + swatch + round(0.7 * size)
        ink = _INK if color is not None else _FAINT_INK
        draw.text((text_left, middle), name, fill=ink, font=font, anchor="lm")
        draw.text((width - margin, middle), share, fill=_FAINT_INK, font=font, anchor="rm")
    return np.asarray(panel)


def overlay_with_legend(
    image: ArrayLike,
    labels: ArrayLike,
    classes: Sequence[str],
    palette: ArrayLike,
    *,
    opacity: float = 0.5,
    min_side: int = 384,
) -> RGBImage:
    """Blend a label map over its image and put a legend of the classes present to its right.

    Args:
        image: RGB uint8 array of shape (H, W, 3).
        labels: Class ids, integers of shape (H, W). Ids without a class are left transparent.
        classes: Class names; index i names id i.
        palette: RGB colors of shape (num_classes, 3).
        opacity: Share of the color in the overlay, from 0 to 1.
        min_side: Images whose longer side is shorter are enlarged by a whole factor.

    Returns:
        RGB uint8 array; the overlay on the left, the legend on the right.
    """
    entries = legend_entries(labels, classes, palette)
    picture = enlarge(blend(image, labels, palette, opacity=opacity), min_side)
    # A strip of an image has no room for a legend beside it: pad it to a readable height.
    height = max(picture.shape[0], min_side // 2)
    canvas = np.full((height, picture.shape[1], 3), _PAPER, np.uint8)
    canvas[: picture.shape[0]] = picture
    # The text follows the whole picture, so that it stays readable when both are scaled down.
    size = int(np.clip(np.sqrt(picture.shape[0] * picture.shape[1]) / 34, 12, 40))
    return np.concatenate([canvas, legend_panel(entries, height, font_size=size)], axis=1)


def panel_grid(
    rows: Sequence[Sequence[ArrayLike]],
    titles: Sequence[str] = (),
    *,
    min_side: int = 256,
    entries: Sequence[LegendEntry] = (),
) -> RGBImage:
    """Arrange images in rows, with a title above each column and a legend below if wanted.

    Args:
        rows: Rows of RGB uint8 arrays. All rows have the same number of images; the images of a
            row have one height, those of a column one width, after small ones were enlarged.
        titles: One title a column, or none.
        min_side: Images whose longer side is shorter are enlarged by a whole factor.
        entries: Classes to explain in one line (or a few) below the rows; shares are not shown.

    Returns:
        RGB uint8 array.

    Raises:
        ValueError: If the rows differ in length, sizes do not line up or a title is missing.
    """
    if not rows or not rows[0] or len({len(row) for row in rows}) != 1:
        raise ValueError(f"rows: expected rows of equal length, got {[len(row) for row in rows]}")
    if titles and len(titles) != len(rows[0]):
        raise ValueError(f"titles: expected {len(rows[0])} (one a column), got {len(titles)}")
    pictures = [[enlarge(image, min_side) for image in row] for row in rows]
    widths = [picture.shape[1] for picture in pictures[0]]
    for row in pictures:
        sizes = [picture.shape[:2] for picture in row]
        if len({h for h, _ in sizes}) != 1 or [w for _, w in sizes] != widths:
            raise ValueError(
                "rows: expected one height in a row and one width in a column, got (height, width) "
                f"{sizes} in a grid of column widths {widths}; resize the images first"
            )

    size = int(np.clip(np.mean(widths) / 17, 13, 40))
    gap, font = max(4, size // 2), load_font(size)
    heading = round(2.0 * size) if titles else 0
    width = sum(widths) + gap * (len(widths) + 1)
    footer = _legend_lines(entries, width - 2 * gap, font)
    height = heading + gap + sum(row[0].shape[0] + gap for row in pictures)
    total = height + len(footer) * round(1.8 * size)

    grid = Image.new("RGB", (width, total), _PAPER)
    draw = ImageDraw.Draw(grid)
    top = heading + gap
    for row in pictures:
        left = gap
        for column, picture in enumerate(row):
            grid.paste(Image.fromarray(picture), (left, top))
            if titles and top == heading + gap:
                title = _shorten(titles[column], font, widths[column])
                where = (left + widths[column] // 2, gap + heading // 2)
                draw.text(where, title, fill=_INK, font=font, anchor="mm")
            left += widths[column] + gap
        top += row[0].shape[0] + gap
    for line, items in enumerate(footer):
        _draw_legend_line(draw, items, gap, top + line * round(1.8 * size) + size // 2, font)
    return np.asarray(grid)


def _legend_item_width(entry: LegendEntry, font: ImageFont.FreeTypeFont) -> int:
    return round(font.size * 3.0) + _text_width(font, entry.name)


def _legend_lines(
    entries: Sequence[LegendEntry], width: int, font: ImageFont.FreeTypeFont
) -> list[list[LegendEntry]]:
    """Break legend entries into lines of at most `width` pixels."""
    lines: list[list[LegendEntry]] = []
    used = width + 1
    for entry in entries:
        needed = _legend_item_width(entry, font)
        if used + needed > width:
            lines.append([])
            used = 0
        lines[-1].append(entry)
        used += needed
    return lines


def _draw_legend_line(
    draw: ImageDraw.ImageDraw,
    entries: Sequence[LegendEntry],
    left: int,
    middle: int,
    font: ImageFont.FreeTypeFont,
) -> None:
    size = int(font.size)
    for entry in entries:
        box = (left, middle - size // 2, left + size, middle + size // 2)
        draw.rounded_rectangle(box, radius=size // 5, fill=entry.color, outline=_HAIRLINE)
        where = (left + round(1.5 * size), middle)
        draw.text(where, entry.name, fill=_INK, font=font, anchor="lm")
        left += _legend_item_width(entry, font)
