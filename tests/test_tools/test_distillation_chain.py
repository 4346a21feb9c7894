"""Distillation with the tools: teacher, stage 1, stage 2, export, fine-tuning, test."""

import re
from pathlib import Path

import pytest
import torch

from cgspn_seg.visualization.training_log import read_training_log
from tests.test_tools.conftest import Workshop

pytestmark = pytest.mark.slow

ATTENTION = ("model.backbone.mixer=attention", "model.backbone.img_size=32")

STAGE = """
_base_ = [
    "{configs}/models/distiller_cgspn.py",
    "{configs}/datasets/camvid_images.py",
    "{configs}/schedules/schedule_distill_2.5k.py",
    "{configs}/default_runtime.py",
]
arch = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32, latent_dims=8)
model = dict(
    type="{stage}",
    data_preprocessor=dict(mean=[127.5] * 3, std=[60.0] * 3, size=(32, 32)),
    teacher=dict(
        type="EncoderTeacher",
        encoder=dict(type="CGSPN", arch=arch, patch_size=4, mixer="attention", img_size=32),
        checkpoint="{teacher}", mean=[127.5] * 3, std=[60.0] * 3,
    ),
    student=dict(arch=arch, patch_size=4),
)
data_root = "{data}"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomCrop", crop_size=(32, 32)),
    dict(type="PackSegInputs"),
]
test_pipeline = [dict(type="LoadImageFromFile"), dict(type="PackSegInputs")]
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(
    batch_size=2, dataset=dict(data_root=data_root, pipeline=train_pipeline), **loader
)
val_dataloader = dict(
    batch_size=1, dataset=dict(data_root=data_root, pipeline=test_pipeline), **loader
)
test_dataloader = val_dataloader
param_scheduler = [dict(type="PolyLR", power=1.0, begin=0, end=4, by_epoch=False)]
train_cfg = dict(max_iters=4, val_interval=2)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
custom_hooks = [dict(type="CheckDataHook"), dict(type="SaveSubsetHook"){hooks}]
"""


def write_stage(workshop: Workshop, folder: Path, stage: str, teacher: Path, hooks: str = ""):
    config = folder / f"{stage}.py"
    config.write_text(
        STAGE.format(
            configs=workshop.tools.parent / "configs" / "_base_",
            stage=stage,
            teacher=teacher,
            data=workshop.images.parent,
            hooks=hooks,
        )
    )
    return config


def errors_of(work_dir: Path) -> list[float]:
    return read_training_log(work_dir).validations[-1].per_layer["mixer/error"]


def test_from_a_teacher_to_a_tested_segmentor(workshop: Workshop, tmp_path: Path) -> None:
    def folder(name: str) -> Path:
        return tmp_path / name

    # A teacher that attends, and its encoder.
    options = ("--cfg-options", *ATTENTION)
    workshop.run("train.py", workshop.config, "--work-dir", folder("vit"), *options)
    teacher = folder("teacher.safetensors")
    checkpoint = folder("vit") / "iter_8.pth"
    workshop.run("export_backbone.py", workshop.config, checkpoint, teacher, *options)

    # Stage 1, resumed halfway.
    first = write_stage(
        workshop, tmp_path, "ModulewiseDistiller", teacher, ', dict(type="EMAHook")'
    )
    said = workshop.run("train.py", first, "--work-dir", folder("one"))
    assert re.search(r"Student from teacher: 18 of 18 tensors", said)
    assert "Student against teacher, 3 images" in said
    saved = torch.load(folder("one") / "iter_4.pth", weights_only=False)
    assert not any("teacher" in key for key in saved["state_dict"])
    assert not any("teacher" in key for key in saved["ema_state_dict"])
    assert len(errors_of(folder("one"))) == 2
    half = folder("one") / "iter_2.pth"
    said = workshop.run("train.py", first, "--work-dir", folder("again"), "--resume", half)
    assert "iter: 2" in said and (folder("again") / "iter_4.pth").is_file()
    workshop.run("plot_log.py", folder("one"), "--out", folder("curves.png"))

    # Stage 2, from there.
    second = write_stage(workshop, tmp_path, "EndToEndDistiller", teacher)
    start = f"load_from={folder('one') / 'iter_4.pth'}"
    said = workshop.run(
        "train.py", second, "--work-dir", folder("two"), "--cfg-options", start,
        "optim_wrapper.accumulative_counts=2", "train_dataloader.dataset.fraction=0.5",
    )  # fmt: skip
    for name in ("mixer_mse", "mixer_kl", "block_mse", "block_kl"):
        assert f"loss_{name}" in said
    assert len(list(folder("two").glob("*/train_subset.txt"))) == 1

    # Its student, in a segmentor.
    student = folder("student.safetensors")
    checkpoint = folder("two") / "iter_4.pth"
    workshop.run("export_backbone.py", second, checkpoint, student, "--prefix", "student.")
    said = workshop.run(
        "train.py", workshop.config, "--work-dir", folder("tuned"), "--cfg-options",
        "model.backbone.init_cfg.type=Pretrained", f"model.backbone.init_cfg.checkpoint={student}",
    )  # fmt: skip
    number = re.search(r"Pretrained: loaded (\d+) of (\d+) tensors of CGSPN", said)
    assert number and number[1] == number[2]
    said = workshop.run("test.py", workshop.config, folder("tuned") / "iter_8.pth")
    assert "mIoU" in said
