"""The whole way of the guide on the real CamVid, with the shipped config and few iterations."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

NAME = "cgspn-small_upernet_1xb16-2.5k_camvid-360x480"
# Everything else is as shipped: model, augmentation, recipe. Fractions of it fit two cores.
SHORT = [
    "train_cfg.max_iters=5",
    "train_cfg.val_interval=5",
    "param_scheduler.0.end=1",
    "param_scheduler.1.begin=1",
    "param_scheduler.1.end=5",
    "train_dataloader.batch_size=2",
    "train_dataloader.num_workers=0",
    "train_dataloader.persistent_workers=False",
    "val_dataloader.dataset.indices=3",
    "test_dataloader.dataset.indices=3",
    "default_hooks.checkpoint.interval=2",
    "default_hooks.logger.interval=1",
    "custom_hooks.0.max_seconds=2",
]


@pytest.mark.slow
def test_camvid_is_converted_trained_interrupted_resumed_scored_and_drawn(
    camvid_root: Path, repository: Path, tmp_path: Path
) -> None:
    env = {**os.environ, "CGSPN_DATA": str(tmp_path / "data")}

    def command(tool: str, *arguments: object) -> list[str]:
        return [sys.executable, str(repository / "tools" / tool), *map(str, arguments)]

    def run(tool: str, *arguments: object) -> str:
        result = subprocess.run(
            command(tool, *arguments),
            cwd=tmp_path,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert result.returncode == 0, result.stdout[-4000:]
        return result.stdout

    run("dataset_converters/camvid.py", camvid_root, "--link")
    config = repository / f"configs/cgspn/{NAME}.py"
    training = ("train.py", config, "--cfg-options", *SHORT)

    process = subprocess.Popen(
        command(*training), cwd=tmp_path, env=env, text=True, stderr=subprocess.PIPE
    )
    work_dir = tmp_path / "work_dirs" / NAME
    deadline = time.monotonic() + 120
    # MMEngine writes this file once the checkpoint is whole.
    while not (work_dir / "last_checkpoint").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(r"Interrupted at iteration \d; resume from iter_\d.pth with: ", errors)

    log = run(*training, "--resume")
    assert re.search(r"resumed epoch: 0, iter: [24]", log)
    assert "Iter(train) [5/5]" in log
    checkpoint = work_dir / "best_mIoU_iter_5.pth"
    trained = float(re.findall(r"mIoU: ([\d.]+)", log)[-1])

    scores = run("test.py", config, checkpoint, "--cfg-options", *SHORT)
    assert float(re.findall(r"mIoU: ([\d.]+)", scores)[-1]) == trained
    assert "bicyclist" in scores and not re.search(r"\bvoid\b", scores)

    image = next((tmp_path / "data/camvid/images/validation").iterdir())
    run("predict.py", config, checkpoint, image, "--out-dir", "out")
    (label,) = (
        cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in (tmp_path / "out").rglob("labels/*")
    )
    (overlay,) = (cv2.imread(str(p)) for p in (tmp_path / "out").rglob("overlays/*"))
    assert label.shape == (360, 480) and label.dtype == np.uint8 and label.max() < 11
    assert overlay.shape[0] >= 360 and overlay.shape[1] > 480  # a legend beside the picture
