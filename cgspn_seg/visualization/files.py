"""Writing pictures so that a file of their name is always a whole one."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["write_bytes", "write_png"]


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file under a temporary name, then rename it; folders are made as needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        # mkstemp makes private files; this gives the permissions that open() would.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_png(path: str | os.PathLike[str], pixels: np.ndarray) -> None:
    """Write a PNG file.

    Args:
        path: Where to; folders are made as needed.
        pixels: RGB uint8 of shape (H, W, 3), or class ids, uint8 of shape (H, W).

    Raises:
        ValueError: If `pixels` is neither.
    """
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)):
        raise ValueError(
            "pixels: expected uint8 of shape (H, W) or (H, W, 3), got "
            f"{pixels.dtype} of shape {pixels.shape}"
        )
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())
