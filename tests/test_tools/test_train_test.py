"""tools/train.py and tools/test.py, as a user runs them."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import mmseg
import numpy as np
import pytest
import torch
from PIL import Image

from tests.test_tools.conftest import Workshop

pytestmark = pytest.mark.slow


def miou(output: str) -> float:
    return float(re.findall(r"mIoU: ([\d.]+)", output)[-1])


class CreatesFile:
    """Unpickling it makes a file, which shows whether code in a checkpoint has run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def test_training_leaves_checkpoints_logs_and_its_config(trained: Workshop) -> None:
    assert {path.name for path in trained.work_dir.iterdir() if path.is_file()} == {
        "boxes.py",
        "iter_4.pth",
        "iter_8.pth",
        "last_checkpoint",
    }
    (run,) = (path for path in trained.work_dir.iterdir() if path.is_dir())
    assert (run / "vis_data" / "scalars.json").is_file()


def test_weights_are_channels_last_as_the_config_says(trained: Workshop) -> None:
    weights = torch.load(trained.checkpoint, weights_only=False)["state_dict"]
    embedding = weights["backbone.patch_embed.projection.weight"]
    assert embedding.is_contiguous(memory_format=torch.channels_last)
    assert not embedding.is_contiguous()


def test_an_interrupted_run_says_how_to_resume_and_does(workshop: Workshop, tmp_path: Path) -> None:
    """In a folder of its own, through the very command that the message has."""
    command = workshop.command(
        "train.py", workshop.config, "--work-dir", "run", "--cfg-options",
        "train_cfg.max_iters=100000", "default_hooks.checkpoint.interval=2",
        "default_hooks.checkpoint.max_keep_ckpts=2", "param_scheduler.0.end=100000",
    )  # fmt: skip
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output)
        deadline = time.monotonic() + 100
        while not (tmp_path / "run" / "last_checkpoint").exists():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
    said = log.read_text()
    assert code == 130, said[-3000:]
    assert "Traceback" not in said
    found = re.search(
        r"\nInterrupted at iteration \d+; resume from iter_(\d+).pth with: (.*)\n", said
    )
    assert found, said[-500:]
    iteration, resume = int(found[1]), found[2]
    assert resume.startswith("python ") and resume.endswith(" --resume")

    stop = iteration + 3
    resume = f"{command[0]} {resume.removeprefix('python ')} --cfg-options"
    resume += f" train_cfg.max_iters={stop} param_scheduler.0.end=100000"
    done = subprocess.run(resume, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"resumed epoch: 0, iter: {iteration}" in done.stdout
    steps = [int(step) for step in re.findall(r"Iter\(train\) +\[ *(\d+)/", done.stdout)]
    assert steps == [iteration + 1, iteration + 2, iteration + 3]
    assert (tmp_path / "run" / f"iter_{stop}.pth").exists()


def test_resuming_a_complete_run_does_nothing_and_a_longer_one_is_an_error(
    trained: Workshop, tmp_path: Path
) -> None:
    work_dir = shutil.copytree(trained.work_dir, tmp_path / "run")
    common = (trained.config, "--work-dir", work_dir)
    said = trained.run("train.py", "--resume", *common)
    assert "Nothing to resume: the run is complete, 8 of 8 iterations are done." in said
    longer = ("--cfg-options", "train_cfg.max_iters=16", "param_scheduler.0.end=16")
    said = trained.run("train.py", *common, "--resume", *longer, code=2)
    assert "train.py: error: The learning rate schedule of the resumed run ends at iter" in said
    assert "Traceback" not in said


def test_the_score_is_that_of_training_from_any_folder(trained: Workshop, tmp_path: Path) -> None:
    said = trained.run(
        "test.py", trained.config, trained.checkpoint, "--work-dir", tmp_path / "test",
        "--out", tmp_path / "out", "--show-dir", tmp_path / "shown", "--cfg-options",
        "train_dataloader.dataset.data_root=gone", cwd=tmp_path,
    )  # fmt: skip
    (log,) = trained.work_dir.glob("*/*.log")
    assert miou(said) == miou(log.read_text())
    assert re.search(r"Peak memory of the (GPU|process) \d+\.\d\d GiB", said)
    label = np.asarray(Image.open(tmp_path / "out" / "2.png"))
    assert label.shape == (40, 48) and set(np.unique(label)) <= {0, 1, 2}
    assert len(list((tmp_path / "shown").rglob("*.png"))) == 3


def test_tta_scores_as_well(trained: Workshop, tmp_path: Path) -> None:
    said = trained.run(
        "test.py", trained.config, trained.checkpoint, "--tta", "--work-dir", tmp_path
    )
    assert "Iter(test) [3/3]" in said


def test_a_checkpoint_of_another_model_is_refused(trained: Workshop, tmp_path: Path) -> None:
    said = trained.run(
        "test.py", trained.config, trained.checkpoint, "--work-dir", tmp_path,
        "--cfg-options", "model.backbone.arch.embed_dims=24", "model.decode_head.in_channels=24",
        code=2,
    )  # fmt: skip
    error = said[said.index("test.py: error:") :]
    assert re.match(
        r"test.py: error: \S+iter_8.pth \(trained as boxes_\d+_\d+\) does not fit", error
    )
    assert "backbone 0/" not in error and "of another shape" in error
    assert "another architecture" in error and "Traceback" not in said


def test_fine_tuning_may_change_the_classes(trained: Workshop, tmp_path: Path) -> None:
    options = (
        "train_cfg.max_iters=1", "model.decode_head.num_classes=4", "custom_hooks=[]",
        f"load_from={trained.checkpoint}",
    )  # fmt: skip
    said = trained.run(
        "train.py", trained.config, "--work-dir", tmp_path, "--cfg-options", *options,
        "val_cfg=None", "val_dataloader=None", "val_evaluator=None",
    )  # fmt: skip
    assert "fits in part, the rest starts at random" in said
    assert "decode_head.conv_seg.bias: expected (4,), got (3,)" in said


def test_code_in_a_checkpoint_runs_only_if_it_is_trusted(trained: Workshop, tmp_path: Path) -> None:
    content = torch.load(trained.checkpoint, weights_only=False)
    witness, path = tmp_path / "witness", tmp_path / "evil.pth"
    torch.save(content | {"extra": CreatesFile(witness)}, path)
    common = (trained.config, "--work-dir", tmp_path / "run")
    for arguments in (
        ("test.py", *common, path),
        ("train.py", *common, "--resume", path),
        ("train.py", *common, "--cfg-options", "model.backbone.init_cfg.type=Pretrained",
         "model.backbone.init_cfg.prefix=backbone", f"model.backbone.init_cfg.checkpoint={path}"),
    ):  # fmt: skip
        said = trained.run(*arguments, code=2)
        assert re.search(r"error: \S*evil.pth: refused: .* it asks for posix.system", said)
        assert not witness.exists()
    said = trained.run("test.py", *common, path, "--trust-checkpoint")
    assert witness.exists() and "Iter(test) [3/3]" in said


def test_what_cannot_be_tested_is_one_message(trained: Workshop, tmp_path: Path) -> None:
    without = ("test_dataloader=None", "test_evaluator=None")
    for arguments in (("--tta",), ("--out", tmp_path / "out")):
        said = trained.run(
            "test.py", trained.config, trained.checkpoint, "--work-dir", tmp_path, *arguments,
            "--cfg-options", *without, code=2,
        )  # fmt: skip
        assert "test.py: error: config: test_dataloader, test_evaluator missing" in said
        assert "Traceback" not in said


def test_an_unknown_key_of_a_class_is_one_message(workshop: Workshop, tmp_path: Path) -> None:
    said = workshop.run(
        "train.py", workshop.config, "--work-dir", tmp_path, "--cfg-options",
        "custom_hooks.0.max_second=3", code=2,
    )  # fmt: skip
    assert "train.py: error: config: CheckDataHook has no key 'max_second'; it takes " in said
    assert "did you mean 'max_seconds'?" in said and "Traceback" not in said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_mixed_precision_trains_and_resumes_on_a_gpu(workshop: Workshop, tmp_path: Path) -> None:
    common = (workshop.config, "--work-dir", tmp_path, "--amp")
    workshop.run("train.py", *common, "--cfg-options", "train_cfg.max_iters=4")
    content = torch.load(tmp_path / "iter_4.pth", weights_only=False)
    assert content["optimizer"]["loss_scaler"] == {}, "bfloat16 needs no loss scaling"
    said = workshop.run("train.py", *common, "--resume")
    assert "resumed epoch: 0, iter: 4" in said and (tmp_path / "iter_8.pth").exists()


def test_mistakes_are_one_message_each(trained: Workshop, tmp_path: Path) -> None:
    for arguments, message in (
        ((tmp_path / "boxs.py",), "boxs.py does not exist"),
        ((trained.config, "--amp"), "--amp: mixed precision needs a GPU"),
        (
            (trained.config, "--cfg-options", f"train_dataloader.dataset.data_root={tmp_path}/no"),
            "train_dataloader.dataset.data_root",
        ),
    ):
        if "--amp" in arguments and torch.cuda.is_available():
            continue
        said = trained.run("train.py", *arguments, code=2, cwd=tmp_path)
        assert "train.py: error: " in said and message in said
        assert "Traceback" not in said
        assert not (tmp_path / "work_dirs").exists(), "nothing may be left of a refused run"


def test_mmsegmentations_own_tools_run_our_configs(workshop: Workshop, tmp_path: Path) -> None:
    """They know this package through `custom_imports` in the config alone."""
    tools = Path(mmseg.__file__).parent / ".mim" / "tools"
    if not tools.is_dir():
        pytest.skip("needs the tools that MMSegmentation's wheel carries")
    said = workshop.run(tools / "train.py", workshop.config, "--work-dir", tmp_path)
    trained_to = miou(said)
    said = workshop.run(
        tools / "test.py", workshop.config, tmp_path / "iter_8.pth", "--work-dir", tmp_path
    )
    assert miou(said) == trained_to
