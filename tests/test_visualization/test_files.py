"""Pictures are written whole or not at all."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cgspn_seg.visualization.files import write_bytes, write_png


def test_png_keeps_ids_and_colors(tmp_path: Path) -> None:
    ids = np.arange(256, dtype=np.uint8).reshape(16, 16)
    write_png(tmp_path / "a" / "ids.png", ids)
    stored = Image.open(tmp_path / "a" / "ids.png")
    assert stored.mode == "L" and (np.asarray(stored) == ids).all()
    write_png(tmp_path / "rgb.png", np.stack([ids] * 3, -1))
    assert Image.open(tmp_path / "rgb.png").mode == "RGB"


@pytest.mark.parametrize("pixels", [np.zeros((2, 2)), np.zeros((2, 2, 4), np.uint8), np.uint8([1])])
def test_other_arrays_are_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"pixels: expected uint8"):
        write_png(tmp_path / "x.png", pixels)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes(tmp_path / "x.png", b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match=r"disk full"):
        write_bytes(tmp_path / "x.png", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    assert (tmp_path / "x.png").read_bytes() == b"old"
