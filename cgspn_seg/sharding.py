"""What a model under FSDP is as a whole, while each process has a part of every tensor."""

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

__all__ = ["is_sharded", "num_axes", "own_name", "whole_state_dicts"]

_PREFIX = "_fsdp_wrapped_module."


def is_sharded(model: nn.Module) -> bool:
    """Whether a model is under FSDP."""
    return isinstance(model, FullyShardedDataParallel)


def own_name(name: str) -> str:
    """A tensor's name in the model itself."""
    return name.replace(_PREFIX, "")


def whole_state_dicts(model: nn.Module) -> AbstractContextManager:
    """Lets ``state_dict`` and ``load_state_dict`` of a model, FSDP or not, be of whole tensors.

    Under FSDP every process has to take part.
    """
    if not is_sharded(model):
        return nullcontext()
    full = StateDictType.FULL_STATE_DICT, FullStateDictConfig()
    return FullyShardedDataParallel.state_dict_type(model, *full)


def num_axes(model: nn.Module) -> dict[str, int]:
    """The number of axes of every parameter, by its own name.

    Under FSDP, where parameters are flat parts, every process has to take part.
    """
    whole = (
        FullyShardedDataParallel.summon_full_params(model, writeback=False)
        if is_sharded(model)
        else nullcontext()
    )
    with whole:
        return {own_name(name): parameter.ndim for name, parameter in model.named_parameters()}
