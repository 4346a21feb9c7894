"""The hook that completes MMEngine's training under FSDP."""

from collections.abc import Iterable
from functools import partial

from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType


@HOOKS.register_module()
class FSDPHook(Hook):
    """Under FSDP, clip gradients by the norm of all of them, and ask for whole checkpoints.

    Each process has a part of every gradient, and MMEngine would clip it by the norm of that part.
    Without FSDP this does nothing.

    Raises:
        ValueError: before the training, if its checkpoints would be in parts.
    """

    def before_train(self, runner: Runner) -> None:
        """Check the kind of checkpoints, and replace what clips."""
        model, wrapper = runner.model, runner.optim_wrapper
        if not isinstance(model, FullyShardedDataParallel):
            return
        kind = FullyShardedDataParallel.get_state_dict_type(model).state_dict_type
        if kind is not StateDictType.FULL_STATE_DICT:
            raise ValueError(
                "strategy.state_dict_cfg: expected one for whole checkpoints, got one for "
                f"{kind.name}, which cannot be resumed, tested or exported here; set "
                "strategy.state_dict_cfg='full'"
            )
        if wrapper.clip_grad_kwargs and wrapper.clip_func is nn.utils.clip_grad_norm_:
            wrapper.clip_func = partial(_clip, model)


def _clip(
    model: FullyShardedDataParallel,
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    norm_type: float = 2.0,
) -> Tensor:
    """As ``torch.nn.utils.clip_grad_norm_``; the parameters are the model's."""
    return model.clip_grad_norm_(max_norm, norm_type)
