"""Overlays, legends and panels."""

import numpy as np
import pytest

from cgspn_seg.visualization import (
    LegendEntry,
    blend,
    colorize,
    enlarge,
    legend_entries,
    legend_panel,
    overlay_with_legend,
    panel_grid,
)

PALETTE = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
CLASSES = ["road", "tree", "sky"]


def halves(height: int, width: int) -> np.ndarray:
    """Class 1 on the left, class 2 on the right, the ignored id in the top row."""
    labels = np.full((height, width), 2, np.int64)
    labels[:, : width // 2] = 1
    labels[0] = 255
    return labels


def gray(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 100, np.uint8)


def test_colorize_paints_each_class_and_the_ignored_id() -> None:
    picture = colorize(np.array([[0, 1], [255, -1]]), PALETTE, ignore_color=(9, 9, 9))
    assert picture.tolist() == [[[255, 0, 0], [0, 255, 0]], [[9, 9, 9], [9, 9, 9]]]


def test_blend_mixes_by_opacity_and_keeps_the_image_where_no_class_is() -> None:
    labels = halves(8, 8)
    picture = blend(gray(8, 8), labels, PALETTE, opacity=0.25)
    assert (picture[0] == 100).all()
    assert picture[4, 0].tolist() == [75, 139, 75]
    assert (blend(gray(8, 8), labels, PALETTE, opacity=0.0) == 100).all()
    full = blend(gray(8, 8), labels, PALETTE, opacity=1.0)
    assert (full[1:] == colorize(labels, PALETTE)[1:]).all()


def test_blend_outlines_classes_in_large_images_only() -> None:
    small, large = halves(100, 100), halves(200, 200)
    for labels, outlined in ((small, False), (large, True)):
        side = len(labels)
        picture = blend(gray(side, side), labels, PALETTE, opacity=0.3)
        at_edge, inside = picture[side // 2, side // 2], picture[side // 2, side - 1]
        assert (not np.array_equal(at_edge, inside)) == outlined


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (gray(4, 4), np.zeros((4, 5), int), PALETTE),
            r"labels: expected the image's size \(4, 4\)",
        ),
        ((gray(4, 4)[..., 0], np.zeros((4, 4), int), PALETTE), "image: expected an RGB uint8"),
        ((gray(4, 4), np.zeros((4, 4)), PALETTE), "labels: expected an integer array"),
        ((gray(4, 4), np.zeros((4, 4), int), [[0, 0, 300]]), "palette: expected RGB colors"),
        ((gray(4, 4), np.zeros((4, 4), int), np.zeros((0, 3))), "palette: expected RGB colors"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blend(*arguments)


def test_an_opacity_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match=r"opacity: expected a number from 0 to 1, got 50"):
        blend(gray(4, 4), np.zeros((4, 4), int), PALETTE, opacity=50)


def test_enlarge_makes_square_pixels_up_to_the_wanted_side() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    large = enlarge(image, 5)
    assert large.shape == (6, 6, 3)
    assert (large[:3, 3:] == image[0, 1]).all()
    assert enlarge(image, 2) is image


def test_legend_lists_the_classes_present_by_size() -> None:
    entries = legend_entries(np.array([[1, 1, 1, 0], [255, 255, 255, 255]]), CLASSES, PALETTE)
    assert entries == [
        LegendEntry("tree", (0, 255, 0), 0.375),
        LegendEntry("road", (255, 0, 0), 0.125),
    ]
    assert legend_entries(np.full((2, 2), 255), CLASSES, PALETTE) == []


def test_legend_needs_a_color_a_class() -> None:
    with pytest.raises(ValueError, match=r"palette: expected 4 colors \(one a class\), got 3"):
        legend_entries(np.zeros((2, 2), int), [*CLASSES, "car"], PALETTE)


def test_a_long_legend_keeps_to_its_height() -> None:
    entries = [LegendEntry(f"class number {i}", (i, i, 0), 1 / 150) for i in range(150)]
    panel = legend_panel(entries, 200)
    assert panel.shape[0] == 200
    # The margin at the bottom is free: the last line sums up what did not fit.
    assert (panel[-4:] == 255).all()
    assert legend_panel([], 64).shape[0] == 64


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (40, 640), (640, 40), (1080, 2048)])
def test_overlay_has_a_readable_legend_at_every_size(size: tuple[int, int]) -> None:
    labels = np.arange(size[0] * size[1]).reshape(size) % 3
    picture = overlay_with_legend(gray(*size), labels, CLASSES, PALETTE)
    factor = max(1, -(-384 // max(size)))
    assert picture.shape[0] == max(192, factor * size[0])
    # Beside the picture is the legend: three swatches, each of a color of its own.
    legend = picture[:, factor * size[1] :]
    for color in PALETTE[np.unique(labels)]:
        rows = (legend == color).all(-1).any(1).sum()
        assert rows >= 10


def test_panels_line_up_under_their_titles() -> None:
    row = [gray(64, 64), colorize(halves(64, 64), PALETTE)]
    entries = [LegendEntry("tree", (0, 255, 0), 0.5)]
    bare, titled = panel_grid([row, row]), panel_grid([row, row], ["image", "label"])
    explained = panel_grid([row, row], ["image", "label"], entries=entries)
    assert bare.shape[1] == titled.shape[1] == explained.shape[1]
    assert bare.shape[0] < titled.shape[0] < explained.shape[0]
    assert (bare == 100).all(-1).sum() == 2 * 256 * 256


def test_panels_that_do_not_line_up_are_named() -> None:
    with pytest.raises(ValueError, match=r"titles: expected 1 \(one a column\), got 2"):
        panel_grid([[gray(8, 8)]], ["image", "label"])
    with pytest.raises(ValueError, match=r"rows: expected rows of equal length, got \[1, 2\]"):
        panel_grid([[gray(8, 8)], [gray(8, 8)] * 2])
    with pytest.raises(ValueError, match=r"resize the images first"):
        panel_grid([[gray(300, 300), gray(310, 300)]])
