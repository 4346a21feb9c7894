"""Colors for data sets that define none."""

import cv2
import numpy as np
import pytest

from cgspn_seg.visualization import distinct_palette


@pytest.mark.parametrize(("num_colors", "distance"), [(2, 60), (11, 35), (21, 25), (150, 8)])
def test_colors_are_far_apart(num_colors: int, distance: float) -> None:
    """In CIELAB, in which 2.3 is just noticeable."""
    colors = distinct_palette(num_colors)
    assert colors.shape == (num_colors, 3) and colors.dtype == np.uint8
    lab = cv2.cvtColor((colors[None] / 255).astype(np.float32), cv2.COLOR_RGB2LAB)[0]
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    assert apart[np.triu_indices(num_colors, 1)].min() > distance


def test_a_short_palette_begins_a_long_one() -> None:
    assert (distinct_palette(11) == distinct_palette(150)[:11]).all()
    assert len(distinct_palette(1)) == 1


def test_the_caller_may_change_its_palette() -> None:
    distinct_palette(3)[:] = 0
    assert distinct_palette(3).any()


@pytest.mark.parametrize("num_colors", [0, 1025])
def test_too_few_or_many_colors_are_refused(num_colors: int) -> None:
    with pytest.raises(ValueError, match=f"num_colors: expected 1 to 1024, got {num_colors}"):
        distinct_palette(num_colors)
