"""A small model, trained once by tools/train.py, for the tests of the tools."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

CLASSES = ("floor", "box", "ball")

# A config outside the repository, on top of one inside.
CONFIG = """
_base_ = [{runtime!r}]
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor", mean=[127.5] * 3, std=[60.0] * 3, bgr_to_rgb=True,
        pad_val=0, seg_pad_val=255, size=(32, 32),
    ),
    backbone=dict(
        type="CGSPN", patch_size=4, out_indices=(1,),
        arch=dict(
            embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32, latent_dims=8
        ),
    ),
    decode_head=dict(
        type="FCNHead", in_channels=16, in_index=0, channels=16, num_convs=1, concat_input=False,
        num_classes=3, norm_cfg=dict(type="SyncBN"), loss_decode=dict(type="CrossEntropyLoss"),
    ),
    test_cfg=dict(mode="whole"),
)
metainfo = dict(classes={classes!r})
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomCrop", crop_size=(32, 32)),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")
]
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="RandomFlip", prob=p, direction="horizontal") for p in (0.0, 1.0)],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="BaseSegDataset", data_root={data!r}, img_suffix=".png", metainfo=metainfo,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="BaseSegDataset", data_root={data!r}, img_suffix=".png", metainfo=metainfo,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=0.01))
param_scheduler = [dict(type="PolyLR", power=1.0, begin=0, end=8, by_epoch=False)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=8, val_interval=4)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=1, log_metric_by_epoch=False),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=4),
    visualization=dict(type="SegVisualizationHook"),
)
"""


@dataclass(frozen=True)
class Workshop:
    """A folder with a data set, a config, and the way to run tools on them.

    Attributes:
        folder: Where tools run, unless told otherwise; outside the repository.
        config: The config.
        images: The folder of validation images.
        work_dir: Where `trained` has left logs and checkpoints.
        tools: The repository's tools.
    """

    folder: Path
    config: Path
    images: Path
    work_dir: Path
    tools: Path

    @property
    def checkpoint(self) -> Path:
        return self.work_dir / "iter_8.pth"

    def command(self, tool: str | Path, *arguments: object) -> list[str]:
        return [sys.executable, str(self.tools / tool), *map(str, arguments)]

    def run(self, tool: str | Path, *arguments: object, code: int = 0, cwd: Path | None = None):
        """Run a tool to its end and check its exit code; its output is the result."""
        done = subprocess.run(
            self.command(tool, *arguments),
            cwd=cwd or self.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, done.stdout[-3000:]
        return done.stdout


def _draw_data(root: Path) -> None:
    rng = np.random.default_rng(0)
    colors = np.array([[60, 60, 60], [200, 80, 40], [40, 80, 220]])
    for split, count in (("training", 6), ("validation", 3)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            label = np.zeros((40, 48), np.uint8)
            for class_id, side in ((1, 14), (2, 10)):
                top, left = rng.integers(2, (38 - side, 46 - side))
                label[top : top + side, left : left + side] = class_id
            image = (colors[label] + rng.integers(-20, 20, (40, 48, 3))).clip(0, 255)
            Image.fromarray(label).save(root / "annotations" / split / f"{index}.png")
            Image.fromarray(image.astype(np.uint8)).save(root / "images" / split / f"{index}.png")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Workshop:
    """The data and the config, with nothing trained."""
    folder = tmp_path_factory.mktemp("workshop")
    _draw_data(folder / "data")
    config = folder / "boxes.py"
    runtime = str(repository / "configs" / "_base_" / "default_runtime.py")
    config.write_text(CONFIG.format(runtime=runtime, data=str(folder / "data"), classes=CLASSES))
    images = folder / "data" / "images" / "validation"
    return Workshop(folder, config, images, folder / "work_dirs" / "boxes", repository / "tools")


@pytest.fixture(scope="session")
def trained(workshop: Workshop) -> Workshop:
    """The workshop after 8 iterations of training."""
    workshop.run("train.py", workshop.config)
    return workshop


@pytest.fixture
def benchmark_tool(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool as a module; the modules beside it can be imported too."""
    monkeypatch.syspath_prepend(str(repository / "tools"))
    import benchmark

    return benchmark
