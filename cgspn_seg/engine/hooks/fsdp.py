"""What MMEngine's training under FSDP lacks: a hook, and a check."""

from functools import partial

from mmengine._strategy import FSDPStrategy
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from cgspn_seg.sharding import is_sharded

_CLIP_OPTIONS = ("max_norm", "norm_type")


def check_strategy(runner: Runner) -> None:
    """Refuse, before a training starts, what cannot be done under FSDP.

    Args:
        runner: A FlexibleRunner that has just been built.

    Raises:
        ValueError: The strategy is FSDP's, and its checkpoints would be in parts, there is an
            EMAHook (it would average and save one process's part), or gradients are to be clipped
            by norm with options that FSDP does not have.
    """
    strategy = getattr(runner, "strategy", None)
    if not isinstance(strategy, FSDPStrategy):
        return
    if not strategy._is_full_state_dict():
        raise ValueError(
            "strategy.state_dict_cfg: expected one for whole checkpoints, got one for "
            f"{strategy.state_dict_type.name}, whose parts cannot be resumed, tested or exported "
            "here; set strategy.state_dict_cfg='full'"
        )
    if any(isinstance(hook, EMAHook) for hook in runner.hooks):
        raise ValueError("custom_hooks: EMAHook does not work under FSDP; leave it out")
    clip = (runner.cfg.get("optim_wrapper") or {}).get("clip_grad") or {}
    unknown = sorted(clip.keys() - {"type", *_CLIP_OPTIONS})
    if clip.get("type", "norm") == "norm" and unknown:
        raise ValueError(
            f"optim_wrapper.clip_grad: FSDP clips by {' and '.join(_CLIP_OPTIONS)}; leave out "
            f"{', '.join(unknown)}"
        )


@HOOKS.register_module()
class FSDPHook(Hook):
    """Under FSDP, clip gradients by the norm of all of them.

    Each process has a part of every gradient, and MMEngine would clip it by the norm of that part.
    Without FSDP this does nothing.
    """

    def before_train(self, runner: Runner) -> None:
        """Replace what clips, if it clips by norm."""
        model, wrapper = runner.model, runner.optim_wrapper
        if not is_sharded(model) or not wrapper.clip_grad_kwargs:
            return
        if wrapper.clip_func is nn.utils.clip_grad_norm_:
            wrapper._clip_grad = partial(_clip_grad, wrapper, model)


def _clip_grad(wrapper: OptimWrapper, model: FullyShardedDataParallel) -> None:
    """As the wrapper's own method, in every process: one may have frozen parameters alone."""
    norm = model.clip_grad_norm_(**wrapper.clip_grad_kwargs)
    wrapper.message_hub.update_scalar(f"train/{wrapper.grad_name}", float(norm))
