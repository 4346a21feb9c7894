"""Fixtures that several areas share."""

import os

# Two cores are shared by data loaders and kernels; has to stand before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmengine.registry import DefaultScope
from PIL import Image

from cgspn_seg import compat  # noqa: F401  (before mmseg, which tests import first)

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds configs/, tools/ and docs/."""
    return REPOSITORY


def _shared(name: str) -> Path:
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip(f"needs {name} in {SHARED_DATA}, which does not exist")
    return folder


@pytest.fixture(scope="session")
def camvid_root() -> Path:
    """CamVid as SegNet published it: train/, trainannot/, val/, valannot/."""
    return _shared("camvid")


@pytest.fixture(scope="session")
def ade20k_sample_root() -> Path:
    """Three real ADE20K validation images: images/, annotations/."""
    return _shared("ade20k_sample")


@pytest.fixture(autouse=True)
def default_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets the scope that a test's Runner leaves behind: it changes what names mean later on."""
    monkeypatch.setattr(DefaultScope, "_instance_dict", OrderedDict())


@pytest.fixture
def mmseg_scope(default_scope: None) -> Iterator[None]:
    """Lets names in configs mean MMSegmentation's parts, as inside a run."""
    with DefaultScope.overwrite_default_scope("mmseg"):
        yield


TinyAde = Callable[..., Path]


@pytest.fixture
def tiny_ade_root(tmp_path: Path) -> TinyAde:
    """Makes small data sets in ADE20K's layout.

    Each label is made of vertical stripes of ids, and each image shows it in shades of gray. Call
    it with ``num_train``, ``num_val``, ``size`` (height, width), ``ids`` (those the labels hold)
    and ``name``; it returns the data root.
    """

    def make(
        num_train: int = 4,
        num_val: int = 2,
        size: tuple[int, int] = (48, 64),
        ids: tuple[int, ...] = (0, 1, 2, 3),
        name: str = "tiny_ade",
    ) -> Path:
        root = tmp_path / name
        for split, count in (("training", num_train), ("validation", num_val)):
            for kind in ("images", "annotations"):
                (root / kind / split).mkdir(parents=True)
            for i in range(count):
                columns = (np.arange(size[1]) // 8 + i) % len(ids)
                label = np.broadcast_to(np.array(ids, np.uint8)[columns], size)
                shade = np.broadcast_to((columns * 255 // len(ids)).astype(np.uint8), size)
                Image.fromarray(label).save(root / "annotations" / split / f"{i:04d}.png")
                Image.fromarray(np.stack([shade] * 3, -1)).save(
                    root / "images" / split / f"{i:04d}.jpg"
                )
        return root

    return make


@pytest.fixture
def shrunken() -> Callable[[Path], Any]:
    """Reads a shipped config and shrinks its model and its loaders, to run on a CPU in seconds."""

    def read(path: Path) -> Any:
        from mmengine.config import Config

        cfg = Config.fromfile(path)
        if cfg.model.backbone.type == "CGSPN":
            arch = dict(
                embed_dims=16,
                num_layers=4,
                num_heads=2,
                feedforward_channels=32,
                latent_dims=8,
            )
            cfg.model.neck.embed_dim = 16
            in_channels = [16] * 4
        else:
            arch = dict(embed_dims=8, depths=[1, 1, 1, 1], latent_dims=4)
            in_channels = [8, 16, 32, 64]
        cfg.model.backbone.update(arch=arch, out_indices=(0, 1, 2, 3))
        cfg.model.decode_head.update(in_channels=in_channels, channels=16)
        cfg.model.auxiliary_head.update(in_channels=in_channels[2], channels=16)
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            loader.update(num_workers=0, persistent_workers=False)
        return cfg

    return read
