"""`init_cfg=dict(type='Pretrained', ...)` that says what it loaded, and fails if it was nothing."""

from __future__ import annotations

import logging

from mmengine.logging import print_log
from mmengine.model import PretrainedInit, update_init_info
from mmseg.registry import WEIGHT_INITIALIZERS
from torch import nn

from cgspn_seg.checkpoints.fit import load_weights, state_dict_of
from cgspn_seg.checkpoints.loading import CheckpointError, load_checkpoint

__all__ = ["CheckedPretrainedInit"]


@WEIGHT_INITIALIZERS.register_module(name="Pretrained")
class CheckedPretrainedInit(PretrainedInit):
    """Initialize a module from a checkpoint file; takes the place of MMEngine's `Pretrained`.

    Args:
        checkpoint (str): Path (``.pth`` or ``.safetensors``) or URL.
        prefix (str, optional): Take only the keys that begin with it, such as `backbone.`, and
            strip it. Default: the keys as they are.
        map_location (str): As in `torch.load`. Default: `cpu`.

    Raises:
        CheckpointError: If not one tensor of the module is in the checkpoint, which MMEngine
            would let pass with a warning.
    """

    def __call__(self, module: nn.Module) -> None:
        weights = state_dict_of(load_checkpoint(self.checkpoint, self.map_location))
        prefix = f"{self.prefix.rstrip('.')}." if self.prefix else ""
        chosen = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        fit = load_weights(module, chosen)
        name = type(module).__name__
        if fit.num_matched == 0:
            raise CheckpointError(
                f"init_cfg of {name}: no tensor of {self.checkpoint} fits it"
                f"{f' under the prefix {prefix!r}' if prefix else ''}; the model begins with "
                f"{_some(module.state_dict())}, the file with {_some(weights)}. "
                f"{_prefix_hint(module, weights)}"
            )
        loaded = f"{fit.num_matched} of {fit.num_tensors} tensors of {name} from {self.checkpoint}"
        if fit.is_perfect:
            print_log(f"Pretrained: loaded {loaded}", logger="current")
        else:
            print_log(
                f"Pretrained: loaded {loaded}, the rest stays as it was initialized: "
                f"{fit.describe()}",
                logger="current",
                level=logging.WARNING,
            )
        if hasattr(module, "_params_init_info"):
            update_init_info(module, init_info=self._get_init_info())


def _some(keys: dict) -> str:
    return ", ".join(list(keys)[:3])


def _prefix_hint(module: nn.Module, weights: dict) -> str:
    """Find the prefix under which the most keys of the file would fit the module."""
    own = module.state_dict().keys()
    hits: dict[str, int] = {}
    for key in weights:
        _, dot, tail = key.partition(".")
        while dot:
            if tail in own:
                prefix = key[: len(key) - len(tail)]
                hits[prefix] = hits.get(prefix, 0) + 1
            _, dot, tail = tail.partition(".")
    if hits:
        best = max(hits, key=hits.__getitem__)
        return f"{hits[best]} would fit with prefix='{best}' in init_cfg."
    return "It is the checkpoint of another architecture, or needs a conversion of its key names."
