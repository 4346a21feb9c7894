"""The encoder's config that a backbone file carries, against the encoder that the file fills.

Tensors that fit do not make the same function: GELU, heads or directions have no shape.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from mmseg.registry import MODELS
from torch import nn

from cgspn_seg.checkpoints.export import FILE_FORMAT, read_facts
from cgspn_seg.checkpoints.loading import CheckpointError

__all__ = ["require_same_function", "stored_config"]

_SHOWN = 4  # blocks listed of a difference


def stored_config(filename: str, content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The encoder's config inside a backbone file; None for a file without.

    Args:
        filename: The file.
        content: What `load_checkpoint` read from it.

    Raises:
        CheckpointError: If it is no config.
    """
    facts = read_facts(filename, content)
    if not isinstance(facts, Mapping) or facts.get("file_format") != FILE_FORMAT:
        return None
    if "config" not in facts:
        return None
    try:
        config = json.loads(facts["config"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{filename}: the config inside is not readable as JSON ({error}); export it again"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{filename}: the config inside: expected an object, got {type(config).__name__}; "
            "export it again"
        )
    return config


def require_same_function(
    encoder: nn.Module, config: Mapping[str, Any] | None, filename: str, name: str
) -> None:
    """Refuse weights that would fit an encoder but make it compute something else.

    Only what no tensor's name or shape tells is compared, in blocks that both have.

    Args:
        encoder: The encoder that the file fills; one that does not say its `function_options` (of
            another library) passes.
        config: What :func:`stored_config` gave; None passes.
        filename: Names the file in messages.
        name: Names the encoder's config in messages, such as "the config of CGSPN".

    Raises:
        ValueError: If an option differs, or the file's config cannot be built.
    """
    if config is None or not hasattr(encoder, "function_options"):
        return
    try:
        with torch.device("meta"):
            stored = MODELS.build({k: v for k, v in config.items() if k != "init_cfg"})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{filename}: the encoder's config inside cannot be built: {error}. It may be of "
            "another version of cgspn_seg, or need custom_imports"
        ) from error
    theirs = stored.function_options() if hasattr(stored, "function_options") else {}
    differences, wanted = [], []
    for option, values in encoder.function_options().items():
        found: dict[tuple[str, str], list[str]] = {}
        shared = [block for block in values if block in theirs.get(option, {})]
        for block in shared:
            pair = repr(theirs[option][block]), repr(values[block])
            if pair[0] != pair[1]:
                found.setdefault(pair, []).append(block)
        for (other, own), blocks in found.items():
            more = f" and {len(blocks) - _SHOWN} more" if len(blocks) > _SHOWN else ""
            where = "" if len(blocks) == len(shared) else f" ({', '.join(blocks[:_SHOWN])}{more})"
            differences.append(f"{option} is {other} in the file and {own} in {name}{where}")
            wanted.append(f"{option}={other}{where}")
    if differences:
        raise ValueError(
            f"{filename} was made with other options, so its weights would compute another "
            f"function: {'; '.join(differences)}. Set {', '.join(wanted)} in {name}; "
            f"python tools/export_backbone.py --info {filename} shows the file's config"
        )
