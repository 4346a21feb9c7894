"""Under FSDP a distillation is what it is in one process, and checkpoints are judged whole."""

import copy
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine import DefaultScope
from mmengine._strategy import FSDPStrategy
from mmengine.hooks import EMAHook
from mmengine.model import MMFullyShardedDataParallel
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmseg.registry import MODELS
from torch import distributed, nn

from cgspn_seg import models  # noqa: F401
from cgspn_seg.checkpoints import load_weights
from cgspn_seg.engine.hooks import FSDPHook, check_strategy
from cgspn_seg.sharding import whole_state_dicts

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
OPTIMIZER = dict(
    optimizer=dict(type="AdamW", lr=0.01, weight_decay=0.5),
    constructor="LayerDecayOptimWrapperConstructor",
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(custom_keys={"blocks.1": dict(lr_mult=0.1)}),
)


def in_two_processes(check: Callable[..., None], folder: Path, *args: object) -> None:
    """Runs check(*args) in both, which talk to each other."""
    # As in conftest.py, the stub of mmcv's operators has to be there before mmseg.
    stub = dict(initializer=import_module, initargs=("cgspn_seg.compat",))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), **stub) as pool:
        ranks = [pool.submit(in_group, check, r, folder / "store", *args) for r in range(2)]
        for rank in ranks:
            rank.result()


def in_group(check: Callable[..., None], rank: int, store: Path, *args: object) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    with DefaultScope.overwrite_default_scope("mmseg"):
        check(*args)


def shard(model: nn.Module) -> MMFullyShardedDataParallel:
    return MMFullyShardedDataParallel(copy.deepcopy(model), device_id=torch.device("cpu"))


def step(model: nn.Module, wrapper: OptimWrapper, loss: torch.Tensor) -> tuple[float, float]:
    """Takes a step; returns the loss and the gradients' norm before clipping."""
    FSDPHook().before_train(SimpleNamespace(model=model, optim_wrapper=wrapper))
    wrapper.update_params(loss)
    (norm,) = wrapper.message_hub.get_scalar("train/grad_norm")._log_history[-1:]
    return loss.item(), float(norm)


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    with whole_state_dicts(model):
        return model.state_dict()


def compare(stage: str) -> None:
    """Both processes have the same images, so that the mean of their gradients is that of one."""
    plain = MODELS.build(dict(DISTILLER, type=stage))
    plain.init_weights()
    sharded = shard(plain)
    whole = sum(p.numel() for p in plain.parameters())
    assert sum(p.numel() for p in sharded.parameters()) < 0.6 * whole

    image = torch.randn(2, 3, 16, 16)
    steps = []
    for model in (plain, sharded):
        wrapper = build_optim_wrapper(model, copy.deepcopy(OPTIMIZER))
        groups = wrapper.optimizer.param_groups
        sizes = [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups]
        loss = sum(model(image, mode="loss").values())
        steps.append((*step(model, wrapper, loss), sizes))
    (*expected, groups), (*got, sharded_groups) = steps
    assert expected[1] > 1
    assert len(groups) == 4
    assert sharded_groups == groups
    assert got == pytest.approx(expected, rel=1e-3)
    stepped, found = plain.state_dict(), states(sharded)
    assert found.keys() == stepped.keys()
    for key, value in stepped.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)

    changed = {key: value + 1 for key, value in stepped.items()}
    fit = load_weights(sharded, changed)
    assert fit.is_perfect
    assert fit.num_tensors == len(changed)
    assert "student" in fit.children
    for key, value in states(sharded).items():
        torch.testing.assert_close(value, changed[key])

    name = "student.patch_embed.projection.bias"
    changed[name], changed["other"] = torch.zeros(3), torch.zeros(3)
    del changed["student.blocks.0.norm1.weight"]
    fit = load_weights(sharded, changed)
    assert fit.mismatched == {name: ((16,), (3,))}
    assert (fit.missing, fit.unexpected) == (("student.blocks.0.norm1.weight",), ("other",))


@pytest.mark.parametrize("stage", ["ModulewiseDistiller", "EndToEndDistiller"])
def test_two_processes_are_as_one(stage: str, tmp_path: Path) -> None:
    in_two_processes(compare, tmp_path, stage)


def freeze() -> None:
    plain = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    plain[0].requires_grad_(False)
    sharded = shard(plain)
    image = torch.randn(4, 8)
    steps = []
    for model in (plain, sharded):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wrapper = OptimWrapper(optimizer, clip_grad=dict(max_norm=0.01))
        steps.append(step(model, wrapper, model(image).square().sum()))
    assert steps[1] == pytest.approx(steps[0])
    found = states(sharded)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(found[key], value)


def test_a_process_with_frozen_parameters_alone_takes_part(tmp_path: Path) -> None:
    in_two_processes(freeze, tmp_path)


def test_without_fsdp_nothing_changes() -> None:
    model = nn.Linear(2, 2)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), 0.1), clip_grad=dict(max_norm=1.0))
    FSDPHook().before_train(SimpleNamespace(model=model, optim_wrapper=wrapper))
    assert wrapper._clip_grad.__func__ is OptimWrapper._clip_grad


@pytest.mark.parametrize(
    ("kind", "hooks", "clip", "said"),
    [
        ("local", [], None, r"got one for LOCAL_STATE_DICT.*state_dict_cfg='full'"),
        ("full", [EMAHook()], None, r"EMAHook does not work under FSDP"),
        ("full", [], dict(max_norm=1.0, error_if_nonfinite=True), r"leave out error_if_nonfinite"),
    ],
)
def test_what_cannot_be_done_is_refused(kind: str, hooks: list, clip: dict, said: str) -> None:
    strategy = FSDPStrategy(state_dict_cfg=kind)
    runner = SimpleNamespace(
        strategy=strategy, hooks=hooks, cfg=dict(optim_wrapper=dict(clip_grad=clip))
    )
    with pytest.raises(ValueError, match=said):
        check_strategy(runner)


def test_the_rest_may_be_done() -> None:
    for clip in (None, dict(max_norm=1.0, norm_type=2), dict(type="value", clip_value=1.0)):
        cfg = dict(optim_wrapper=dict(clip_grad=clip))
        strategy = FSDPStrategy(state_dict_cfg="full")
        check_strategy(SimpleNamespace(strategy=strategy, hooks=[], cfg=cfg))
        check_strategy(SimpleNamespace(hooks=[EMAHook()], cfg=cfg))
