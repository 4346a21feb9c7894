"""Checkpoints are data: what is read, what is refused, and that nothing of it runs."""

import os
import pickle
from pathlib import Path

import mmengine.runner.checkpoint
import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner import CheckpointLoader, save_checkpoint
from safetensors.torch import save_file

from cgspn_seg.checkpoints import CheckpointError, load_checkpoint, protect_checkpoint_loading


class CreatesFile:
    """Unpickling it makes a file, which shows whether code in a checkpoint has run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


class RunsCommand(CreatesFile):
    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


class Evaluates(CreatesFile):
    def __reduce__(self) -> tuple:
        return eval, (f"open({str(self.path)!r}, 'w')",)


class ReachesInside(CreatesFile):
    """`getattr` is needed for MMEngine's log histories, and must not open other doors."""

    def __reduce__(self) -> tuple:
        return getattr, (HistoryBuffer, "__init__")


def run_state() -> dict:
    """What MMEngine saves beside the weights."""
    hub = MessageHub("a run")
    hub.update_scalars({"train/loss": 0.5, "val/mIoU": 41.0})
    hub.update_info("best_score", np.float64(41.0))
    return {
        "meta": {
            "iter": 8,
            "cfg": "model = dict()",
            "dataset_meta": {"classes": ["a"], "palette": np.array([[1, 2, 3]])},
        },
        "state_dict": {"weight": torch.arange(3.0)},
        "message_hub": hub.state_dict(),
        "optimizer": {"state": {0: {"step": torch.tensor(8.0)}}, "param_groups": [{"lr": 1e-3}]},
        "param_schedulers": [{"last_step": 8, "_last_value": [np.float32(1e-3)]}],
    }


def test_mmengines_own_run_state_is_read(tmp_path: Path) -> None:
    protect_checkpoint_loading()
    save_checkpoint(run_state(), str(tmp_path / "iter_8.pth"))
    loaded = load_checkpoint(tmp_path / "iter_8.pth")
    history = loaded["message_hub"]["log_scalars"]["train/loss"]
    assert history.statistics("mean", 1) == 0.5
    assert loaded["message_hub"]["runtime_info"]["best_score"] == 41.0
    assert loaded["meta"]["dataset_meta"]["palette"].tolist() == [[1, 2, 3]]
    assert loaded["param_schedulers"][0]["_last_value"][0] == np.float32(1e-3)
    assert torch.equal(loaded["state_dict"]["weight"], torch.arange(3.0))


def test_numpy_values_written_under_numpy_1_are_read(tmp_path: Path) -> None:
    protect_checkpoint_loading()
    # The older file format is a plain pickle, in which a name can be changed.
    legacy = tmp_path / "legacy.pth"
    content = {"state_dict": {"w": torch.ones(1)}, "score": np.float64(2.0)}
    torch.save(content, legacy, _use_new_zipfile_serialization=False)
    assert b"numpy._core.multiarray\n" in legacy.read_bytes()
    legacy.write_bytes(
        legacy.read_bytes().replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
    )
    assert load_checkpoint(legacy)["score"] == 2.0


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("attack", "asks_for"),
    [
        (CreatesFile, "pathlib.Path"),
        (RunsCommand, "posix.system"),
        (Evaluates, "eval"),
        (ReachesInside, "getattr"),
    ],
)
def test_a_file_that_would_run_code_is_refused_and_does_not_run(
    tmp_path: Path, attack: type, asks_for: str, zipped: bool
) -> None:
    protect_checkpoint_loading()
    path, witness = tmp_path / "evil.pth", tmp_path / "witness"
    content = {"state_dict": {"w": torch.ones(1)}, "meta": attack(witness)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=f"evil.pth: refused.*({asks_for})") as caught:
        load_checkpoint(path)
    assert "--trust-checkpoint" in str(caught.value)
    assert not witness.exists()


def test_protection_covers_whatever_mmengine_or_torch_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, witness = tmp_path / "evil.pth", tmp_path / "witness"
    torch.save({"w": torch.ones(1), "x": RunsCommand(witness)}, path)
    protect_checkpoint_loading()

    def download(url: str, **kwargs: object) -> dict:
        return torch.load(path, weights_only=False)  # as torch.hub does

    monkeypatch.setattr(mmengine.runner.checkpoint, "load_url", download)
    with pytest.raises(CheckpointError, match=r"https://somewhere/evil.pth: refused"):
        load_checkpoint("https://somewhere/evil.pth")
    with pytest.raises(CheckpointError, match=r"refused"):
        mmengine.runner.load_checkpoint(torch.nn.Linear(1, 1), str(path))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=False)
    assert not witness.exists()


def test_a_trusted_file_is_loaded_with_all_it_does(tmp_path: Path) -> None:
    protect_checkpoint_loading(trust=True)
    path, witness = tmp_path / "mine.pth", tmp_path / "witness"
    torch.save({"state_dict": {"w": torch.ones(1)}, "meta": CreatesFile(witness)}, path)
    assert torch.equal(load_checkpoint(path)["state_dict"]["w"], torch.ones(1))
    assert witness.exists()


@pytest.mark.parametrize("trust", [False, True])
def test_safetensors_are_read(tmp_path: Path, trust: bool) -> None:
    protect_checkpoint_loading(trust=trust)
    save_file({"weight": torch.arange(4.0)}, tmp_path / "w.safetensors")
    assert torch.equal(load_checkpoint(tmp_path / "w.safetensors")["weight"], torch.arange(4.0))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.pth", b""),
        ("pointer.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ("empty.safetensors", b"xx"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    protect_checkpoint_loading()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: not readable as .*Copy or download"):
        load_checkpoint(tmp_path / name)


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    protect_checkpoint_loading()
    torch.save({"w": torch.ones(10_000)}, tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"cut.pth: not readable .*damaged, incomplete"):
        load_checkpoint(tmp_path / "cut.pth")


def test_programs_and_general_pickles_are_refused(tmp_path: Path) -> None:
    protect_checkpoint_loading()
    torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.ones(1)), tmp_path / "script.pth")
    with pytest.raises(CheckpointError, match=r"script.pth: refused: it is a TorchScript program"):
        load_checkpoint(tmp_path / "script.pth")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"w": [1.0]}, protocol=4))
    with pytest.raises(CheckpointError, match=r"refused: it is a pickle that torch.save did not"):
        load_checkpoint(tmp_path / "model.pkl")


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    protect_checkpoint_loading()
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    with pytest.raises(CheckpointError, match=r"tensor.pth: expected a checkpoint.*got Tensor"):
        load_checkpoint(tmp_path / "tensor.pth")


def test_a_missing_file_lists_its_neighbors(tmp_path: Path) -> None:
    protect_checkpoint_loading()
    (tmp_path / "iter_8.pth").touch()
    with pytest.raises(FileNotFoundError, match=r"iter_9.pth does not exist.* iter_8.pth"):
        load_checkpoint(tmp_path / "iter_9.pth")
    with pytest.raises(FileNotFoundError, match=r"is a folder"):
        load_checkpoint(tmp_path)


def test_protecting_twice_wraps_once() -> None:
    protect_checkpoint_loading()
    first = dict(CheckpointLoader._schemes)
    protect_checkpoint_loading()
    remote = {key: loader for key, loader in CheckpointLoader._schemes.items() if key}
    assert remote == {key: loader for key, loader in first.items() if key}
