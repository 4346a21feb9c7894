"""Distillation with the tools: teacher, stage 1, stage 2, export, fine-tuning, test."""

import re
from pathlib import Path

import pytest
import torch

from cgspn_seg.visualization.training_log import read_training_log
from tests.test_tools.conftest import Workshop

pytestmark = pytest.mark.slow

CONFIG = "configs/demo/cgspn-demo_upernet_1xb8-0.5k_maze-64x64.py"
ATTENTION = ("model.backbone.mixer=attention",)
SHORT = (
    "train_cfg.max_iters=4",
    "train_cfg.val_interval=2",
    "param_scheduler.0.end=1",
    "param_scheduler.1.begin=1",
    "param_scheduler.1.end=4",
    "default_hooks.checkpoint.interval=2",
)

# Beside the demo's own config, as a user's would be.
STAGE = """
_base_ = [
    "{configs}/models/distiller_cgspn.py",
    "{configs}/datasets/camvid_images.py",
    "{configs}/schedules/schedule_distill_2.5k.py",
    "{configs}/default_runtime.py",
]
arch = dict(embed_dims=64, num_layers=4, num_heads=4, feedforward_channels=128, latent_dims=32)
model = dict(
    type="{stage}",
    data_preprocessor=dict(size=(64, 64)),
    teacher=dict(
        type="EncoderTeacher",
        encoder=dict(type="CGSPN", arch=arch, patch_size=4, mixer="attention", img_size=64),
        checkpoint="{teacher}",
    ),
    student=dict(arch=arch, patch_size=4),
)
data_root = "{data}"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [dict(type="LoadImageFromFile"), dict(type="PackSegInputs")]
loader = dict(batch_size=2, num_workers=0, persistent_workers=False)
train_dataloader = dict(dataset=dict(data_root=data_root, pipeline=train_pipeline), **loader)
val_dataloader = dict(dataset=dict(data_root=data_root, pipeline=test_pipeline), **loader)
test_dataloader = val_dataloader
param_scheduler = [dict(type="PolyLR", power=1.0, begin=0, end=4, by_epoch=False)]
train_cfg = dict(max_iters=4, val_interval=2)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
custom_hooks = [dict(type="CheckDataHook"), dict(type="SaveSubsetHook"){hooks}]
"""


@pytest.fixture
def mazes(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A few of the demo's mazes."""
    monkeypatch.syspath_prepend(str(repository / "tools"))
    import draw_mazes

    draw_mazes.draw_set(draw_mazes.MazeSet(training=8, validation=3), tmp_path / "mazes")
    monkeypatch.setenv("CGSPN_DATA", str(tmp_path))
    return tmp_path / "mazes"


def write_stage(workshop: Workshop, data: Path, stage: str, teacher: Path, hooks: str = ""):
    config = data.parent / f"{stage}.py"
    config.write_text(
        STAGE.format(
            configs=workshop.tools.parent / "configs" / "_base_",
            stage=stage,
            teacher=teacher,
            data=data / "images",
            hooks=hooks,
        )
    )
    return config


def errors_of(work_dir: Path) -> list[float]:
    return read_training_log(work_dir).validations[-1].per_layer["mixer/error"]


def test_from_a_teacher_to_a_tested_segmentor(workshop: Workshop, mazes: Path) -> None:
    demo = workshop.tools.parent / CONFIG

    def folder(name: str) -> Path:
        return mazes.parent / name

    # A teacher that attends, and its encoder.
    options = ("--cfg-options", *ATTENTION)
    workshop.run("train.py", demo, "--work-dir", folder("vit"), *options, *SHORT)
    teacher = folder("teacher.safetensors")
    workshop.run("export_backbone.py", demo, folder("vit") / "iter_4.pth", teacher, *options)

    # Stage 1, resumed halfway.
    ema = ', dict(type="EMAHook")'
    first = write_stage(workshop, mazes, "ModulewiseDistiller", teacher, ema)
    said = workshop.run("train.py", first, "--work-dir", folder("one"))
    assert re.search(r"Student from teacher: 34 of 34 tensors", said)
    assert "Student against teacher, 3 images" in said
    saved = torch.load(folder("one") / "iter_4.pth", weights_only=False)
    assert not any("teacher" in key for key in saved["state_dict"])
    assert not any("teacher" in key for key in saved["ema_state_dict"])
    assert len(errors_of(folder("one"))) == 4
    half = folder("one") / "iter_2.pth"
    said = workshop.run("train.py", first, "--work-dir", folder("again"), "--resume", half)
    assert "iter: 2" in said and (folder("again") / "iter_4.pth").is_file()
    workshop.run("plot_log.py", folder("one"), "--out", folder("curves.png"))

    # Stage 2, from there.
    second = write_stage(workshop, mazes, "EndToEndDistiller", teacher)
    start = f"load_from={folder('one') / 'iter_4.pth'}"
    said = workshop.run(
        "train.py", second, "--work-dir", folder("two"), "--cfg-options", start,
        "optim_wrapper.accumulative_counts=2", "train_dataloader.dataset.fraction=0.5",
    )  # fmt: skip
    assert "fills the model but for its 32 tensors of adapters, which start as the id" in said
    for name in ("mixer_mse", "mixer_kl", "block_mse", "block_kl"):
        assert f"loss_{name}" in said
    assert len(list(folder("two").glob("*/train_subset.txt"))) == 1

    # Its student, in a segmentor.
    student = folder("student.safetensors")
    checkpoint = folder("two") / "iter_4.pth"
    workshop.run("export_backbone.py", second, checkpoint, student, "--prefix", "student.")
    said = workshop.run(
        "train.py", demo, "--work-dir", folder("tuned"), "--cfg-options", *SHORT,
        "model.backbone.init_cfg.type=Pretrained", f"model.backbone.init_cfg.checkpoint={student}",
    )  # fmt: skip
    number = re.search(r"Pretrained: loaded (\d+) of (\d+) tensors of CGSPN", said)
    assert number and number[1] == number[2]
    said = workshop.run("test.py", demo, folder("tuned") / "iter_4.pth")
    assert "mIoU" in said
