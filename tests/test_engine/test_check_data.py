"""The hook stops a run before its first iteration where the data are not as they should be."""

import logging
import socket
from pathlib import Path
from types import SimpleNamespace

from cgspn_seg import compat  # noqa: F401  (before mmseg: processes import this file on their own)

# isort: split
import pytest
import torch
from mmengine.registry import DefaultScope, init_default_scope
from mmengine.runner import Runner
from mmseg.datasets import BaseSegDataset
from mmseg.registry import HOOKS
from PIL import Image
from torch import nn

from cgspn_seg.datasets import DataError
from cgspn_seg.engine import CheckDataHook
from cgspn_seg.engine.hooks import check_data

PIPELINE = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]
CLASSES = ("a", "b", "c", "d")


def dataset(root: Path, split: str) -> BaseSegDataset:
    return BaseSegDataset(
        data_root=str(root),
        data_prefix=dict(img_path=f"images/{split}", seg_map_path=f"annotations/{split}"),
        metainfo=dict(classes=CLASSES),
        pipeline=PIPELINE,
    )


def fake_runner(root: Path, num_classes: int = 4) -> SimpleNamespace:
    """What the hook sees of a runner."""
    model = nn.Module()
    model.decode_head = nn.Identity()
    model.decode_head.num_classes = num_classes
    return SimpleNamespace(
        train_dataloader=SimpleNamespace(dataset=dataset(root, "training")),
        val_dataloader=SimpleNamespace(dataset=dataset(root, "validation")),
        test_dataloader=SimpleNamespace(dataset=dataset(root, "validation")),
        val_loop=object(),
        model=model,
        logger=logging.getLogger("test_check_data"),
    )


def spoil(root: Path, split: str) -> None:
    Image.new("L", (64, 48), 200).save(root / f"annotations/{split}/0001.png")


@pytest.mark.usefixtures("mmseg_scope")
class TestWhenItLooks:
    def test_training_checks_both_datasets_once(self, tiny_ade_root, caplog):
        runner, hook = fake_runner(tiny_ade_root()), CheckDataHook()
        with caplog.at_level(logging.INFO):
            hook.before_train(runner)
            hook.before_val(runner)
            hook.before_val(runner)
        checked = [r.message.split(" in ")[0] for r in caplog.records if "Checked" in r.message]
        assert checked == [
            "Checked 4 of the 4 labels of the train dataset and decoded 4 of its 4 images",
            "Checked 2 of the 2 labels of the val dataset and decoded 2 of its 2 images",
        ]

    def test_training_without_validation_checks_its_own_data_only(self, tiny_ade_root):
        root = tiny_ade_root()
        spoil(root, "validation")
        runner = fake_runner(root)
        runner.val_loop = None
        CheckDataHook().before_train(runner)

    @pytest.mark.parametrize("method", ["before_train", "before_val", "before_test"])
    def test_a_bad_validation_label_stops_each_kind_of_run(self, tiny_ade_root, method):
        root = tiny_ade_root()
        spoil(root, "validation")
        with pytest.raises(DataError, match=r"validation/0001\.png holds the id 200"):
            getattr(CheckDataHook(), method)(fake_runner(root))

    def test_the_heads_are_compared_with_the_classes(self, tiny_ade_root):
        with pytest.raises(DataError, match=r"decode_head\.num_classes=19: set num_classes=4"):
            CheckDataHook().before_test(fake_runner(tiny_ade_root(), num_classes=19))

    def test_an_image_without_label_stops_the_run(self, tiny_ade_root):
        root = tiny_ade_root()
        (root / "annotations/training/0003.png").unlink()
        with pytest.raises(DataError, match=r"1 of the 4 labels .*training/0003\.png"):
            CheckDataHook().before_train(fake_runner(root))

    def test_the_parts_of_the_model_are_compared_and_sizes_warned_of_once(
        self, tiny_ade_root, monkeypatch
    ):
        runner, seen = fake_runner(tiny_ade_root()), []
        bare, runner.model = runner.model, nn.DataParallel(runner.model)
        monkeypatch.setattr(check_data, "check_channels", lambda model: seen.append(model))
        monkeypatch.setattr(check_data, "check_sizes", lambda model, logger: seen.append(logger))
        hook = CheckDataHook()
        hook.before_train(runner)
        hook.before_val(runner)
        assert seen == [bare, runner.logger]

    def test_no_seconds_means_that_no_label_is_read(self, tiny_ade_root):
        root = tiny_ade_root()
        spoil(root, "training")
        CheckDataHook(max_seconds=0).before_train(fake_runner(root))


def test_a_real_run_stops_before_its_first_iteration(
    tiny_ade_root, shrunken, repository, tmp_path, monkeypatch
):
    root = tiny_ade_root(ids=(0, 1, 150), name="data/ade/ADEChallengeData2016")
    monkeypatch.setenv("CGSPN_DATA", str(tmp_path / "data"))
    cfg = shrunken(repository / "configs/cgspn/cgspn-tiny_upernet_8xb2-80k_ade20k-512x512.py")
    spoil(root, "training")
    cfg.work_dir = str(tmp_path / "work")
    steps = []
    monkeypatch.setattr(Runner, "call_hook", _recording(Runner.call_hook, steps))
    with pytest.raises(DataError, match=r"training/0001\.png holds the id 200"):
        Runner.from_cfg(cfg).train()
    assert "before_train" in steps
    assert "before_train_iter" not in steps


def test_a_real_run_with_another_encoder_stops_before_its_first_iteration(
    tiny_ade_root, shrunken, repository, tmp_path, monkeypatch
):
    tiny_ade_root(ids=(0, 1, 150), name="data/ade/ADEChallengeData2016")
    monkeypatch.setenv("CGSPN_DATA", str(tmp_path / "data"))
    cfg = shrunken(repository / "configs/cgspn/cgspn-tiny_upernet_8xb2-80k_ade20k-512x512.py")
    cfg.model.backbone.arch.embed_dims = 24
    cfg.work_dir = str(tmp_path / "work")
    with pytest.raises(ValueError, match=r"model\.neck\.embed_dim=16, .*set .*embed_dim=24, "):
        Runner.from_cfg(cfg).train()


def _recording(call_hook, steps: list[str]):
    def call(self, fn_name: str, **kwargs) -> None:
        steps.append(fn_name)
        call_hook(self, fn_name, **kwargs)

    return call


def test_it_is_registered_and_comes_before_other_hooks():
    with DefaultScope.overwrite_default_scope("mmseg"):
        hook = HOOKS.build(dict(type="CheckDataHook", max_seconds=None))
    assert isinstance(hook, CheckDataHook)
    assert hook.priority == "VERY_HIGH"


def _check_in_process(rank: int, root: str, port: int, out: str) -> None:
    init_default_scope("mmseg")
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    try:
        CheckDataHook().before_train(fake_runner(Path(root)))
    except DataError as error:
        Path(out, str(rank)).write_text(str(error))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_processes_of_a_distributed_run_stop(tiny_ade_root, tmp_path, unused_port):
    root = tiny_ade_root()
    spoil(root, "training")
    torch.multiprocessing.spawn(
        _check_in_process, (str(root), unused_port, str(tmp_path)), nprocs=2
    )
    messages = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert "holds the id 200" in messages[0]
    assert messages[0] == messages[1]


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
