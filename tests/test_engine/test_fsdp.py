"""Under FSDP a distillation is what it is in one process, and checkpoints are judged whole."""

import copy
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine import DefaultScope
from mmengine.model import MMFullyShardedDataParallel
from mmengine.optim import OptimWrapper
from mmseg.registry import MODELS
from torch import Tensor, distributed
from torch.distributed.fsdp import (
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)

from cgspn_seg import models  # noqa: F401
from cgspn_seg.checkpoints import load_weights
from cgspn_seg.engine.hooks import FSDPHook

ARCH = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32, latent_dims=8)
ENCODER = dict(type="CGSPN", arch=ARCH, patch_size=4)
TEACHER = dict(ENCODER, img_size=16, mixer="attention")
DISTILLER = dict(
    teacher=dict(type="EncoderTeacher", encoder=TEACHER),
    student=ENCODER,
    data_preprocessor=dict(
        type="SegDataPreProcessor", mean=[120.0] * 3, std=[60.0] * 3, size=(16, 16)
    ),
)


def optimizer(model: torch.nn.Module) -> OptimWrapper:
    weights = [p for p in model.parameters() if p.requires_grad]
    return OptimWrapper(torch.optim.SGD(weights, lr=0.0), clip_grad=dict(max_norm=1.0))


def gradient_norm(model: torch.nn.Module, wrapper: OptimWrapper, image: Tensor) -> tuple:
    loss = sum(model(image, mode="loss").values())
    loss.backward()
    wrapper._clip_grad()
    (norm,) = wrapper.message_hub.get_scalar("train/grad_norm")._log_history[-1:]
    return loss.item(), float(norm)


def whole(model: FullyShardedDataParallel, config: FullStateDictConfig) -> dict[str, Tensor]:
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, config):
        return model.state_dict()


def compare(stage: str, rank: int, store: str) -> None:
    """What each of two processes finds; both have the same images, so the mean changes nothing."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmseg"):
        plain = MODELS.build(dict(DISTILLER, type=stage))
    plain.init_weights()
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    sharded = MMFullyShardedDataParallel(copy.deepcopy(plain), device_id=torch.device("cpu"))
    parts = sum(p.numel() for p in sharded.parameters())
    assert parts < 0.6 * sum(p.numel() for p in plain.parameters())

    wrapper = optimizer(sharded)
    runner = SimpleNamespace(model=sharded, optim_wrapper=wrapper)
    with (
        FullyShardedDataParallel.state_dict_type(sharded, StateDictType.LOCAL_STATE_DICT),
        pytest.raises(ValueError, match=r"LOCAL_STATE_DICT.*state_dict_cfg='full'"),
    ):
        FSDPHook().before_train(runner)
    FSDPHook().before_train(runner)
    image = torch.randn(2, 3, 16, 16)
    expected = gradient_norm(plain, optimizer(plain), image)
    assert expected[1] > 1
    assert gradient_norm(sharded, wrapper, image) == pytest.approx(expected, rel=1e-3)

    changed = {key: value + 1 for key, value in plain.state_dict().items()}
    fit = load_weights(sharded, changed)
    assert fit.is_perfect
    assert fit.num_tensors == len(changed)
    assert "student" in fit.children
    found = whole(sharded, FullStateDictConfig())
    assert found.keys() == changed.keys()
    for key, value in changed.items():
        torch.testing.assert_close(found[key], value)

    name = "student.patch_embed.projection.bias"
    changed[name], changed["other"] = torch.zeros(3), torch.zeros(3)
    del changed["student.blocks.0.norm1.weight"]
    fit = load_weights(sharded, changed)
    assert fit.mismatched == {name: ((16,), (3,))}
    assert (fit.missing, fit.unexpected) == (("student.blocks.0.norm1.weight",), ("other",))


@pytest.mark.parametrize("stage", ["ModulewiseDistiller", "EndToEndDistiller"])
def test_two_processes_are_as_one(stage: str, tmp_path: Path) -> None:
    # As in conftest.py, the stub of mmcv's operators has to be there before mmseg.
    stub = dict(initializer=import_module, initargs=("cgspn_seg.compat",))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), **stub) as pool:
        ranks = [pool.submit(compare, stage, rank, str(tmp_path / "store")) for rank in range(2)]
        for rank in ranks:
            rank.result()


def test_without_fsdp_nothing_changes() -> None:
    model = torch.nn.Linear(2, 2)
    wrapper = optimizer(model)
    FSDPHook().before_train(SimpleNamespace(model=model, optim_wrapper=wrapper))
    assert wrapper.clip_func is torch.nn.utils.clip_grad_norm_
