"""`init_cfg=dict(type='Pretrained', ...)` that says what it loaded, and fails if it was not all."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mmengine.logging import print_log
from mmengine.model import PretrainedInit, update_init_info
from mmseg.registry import WEIGHT_INITIALIZERS
from torch import nn

from cgspn_seg.checkpoints.fit import (
    CheckpointFit,
    find_prefix,
    load_weights,
    patch_sizes,
    state_dict_of,
)
from cgspn_seg.checkpoints.loading import CheckpointError, load_checkpoint
from cgspn_seg.checkpoints.stored_config import require_same_function, stored_config

__all__ = ["CheckedPretrainedInit"]

# The norms of an encoder's outputs depend on what reads them, and start as norms do.
_OUTPUT_NORMS = ".out_norms."


@WEIGHT_INITIALIZERS.register_module(name="Pretrained")
class CheckedPretrainedInit(PretrainedInit):
    """Initialize a module from a checkpoint file; takes the place of MMEngine's `Pretrained`.

    All of the module's tensors must be there but the norms of its outputs (`out_norms`); positional
    embeddings are resized. Where a backbone file has the encoder's config inside, its options must
    be the module's (:func:`~cgspn_seg.checkpoints.stored_config.require_same_function`).

    Args:
        checkpoint (str): Path (``.pth`` or ``.safetensors``) or URL.
        prefix (str, optional): Take only the keys that begin with it, such as `backbone.`, and
            strip it. Default: the keys as they are.
        map_location (str): As in `torch.load`. Default: `cpu`.
        allow_partial (bool): Let tensors that the file lacks, or has in another shape, stay at
            their random start, with a warning. Default: False.

    Raises:
        CheckpointError: If not one tensor of the module is in the checkpoint, or not all are and
            `allow_partial` is not set; MMEngine would let both pass with a warning.
        ValueError: If the config inside the file is of an encoder that computes something else.
    """

    def __init__(
        self,
        checkpoint: str,
        prefix: str | None = None,
        map_location: str = "cpu",
        allow_partial: bool = False,
    ) -> None:
        super().__init__(checkpoint, prefix, map_location)
        self.allow_partial = allow_partial

    def __call__(self, module: nn.Module) -> None:
        content = load_checkpoint(self.checkpoint, self.map_location)
        weights = state_dict_of(content)
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
        config = stored_config(self.checkpoint, content)
        random = [k for k in (*fit.missing, *fit.mismatched) if _OUTPUT_NORMS not in f".{k}"]
        if random and not self.allow_partial:
            raise CheckpointError(
                f"init_cfg of {name}: {len(random)} of its {fit.num_tensors} tensors would stay "
                f"random, since {self.checkpoint} lacks them or has them in another shape: "
                f"{fit.describe()}\n{self._way_out(fit, module, weights, config)} To begin with "
                "what fits and the rest at random, pass allow_partial=True in init_cfg."
            )
        require_same_function(module, config, self.checkpoint, f"the config of {name}")
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

    def _way_out(
        self, fit: CheckpointFit, module: nn.Module, weights: Mapping, config: dict | None
    ) -> str:
        """What to do about a file that fits in part."""
        sides = patch_sizes(fit)
        if sides is not None and all(_OUTPUT_NORMS in f".{key}" for key in fit.missing):
            first = "" if config else "make a backbone file with tools/export_backbone.py, then "
            mixer = (config or {}).get("mixer", "cgspn")
            return (
                f"Patches are of {sides[0]} pixels a side in the config, of {sides[1]} in the "
                f"file: set patch_size={sides[1]}, or resize them: {first}"
                f"python tools/convert_checkpoint.py {self.checkpoint} OUT --patch-size {sides[0]} "
                f"--mixer {mixer if isinstance(mixer, str) else 'MIXER'} (or OUT CONFIG, for the "
                "encoder of a config)."
            )
        if find_prefix(module.state_dict(), weights)[1] > fit.num_matched:
            return _prefix_hint(module, weights)
        text = (
            "It is the file of another architecture or mixer: set the encoder's options as in the "
            "config it was trained with"
        )
        if config is None:
            return f"{text}."
        return (
            f"{text}, which python tools/export_backbone.py --info {self.checkpoint} shows. To "
            "start an encoder of other mixers from it, make a file for that: python "
            f"tools/convert_checkpoint.py {self.checkpoint} OUT CONFIG."
        )


def _some(keys: Mapping[str, Any]) -> str:
    return ", ".join(list(keys)[:3])


def _prefix_hint(module: nn.Module, weights: Mapping[str, Any]) -> str:
    prefix, number = find_prefix(module.state_dict(), weights)
    if number:
        return f"{number} would fit with prefix='{prefix}' in init_cfg."
    return "It is the checkpoint of another architecture, or needs a conversion of its key names."
