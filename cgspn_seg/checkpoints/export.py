"""Backbone files: an encoder's weights alone, with their config, hash and provenance inside.

Such a file is a ``.safetensors`` whose header holds the facts as strings, or a ``.pth`` with the
same strings under `meta` and the tensors under `state_dict`. Either is what
`init_cfg=dict(type='Pretrained', checkpoint=...)` loads, without a prefix.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from cgspn_seg.checkpoints.fit import state_dict_of
from cgspn_seg.checkpoints.loading import CheckpointError, load_checkpoint
from cgspn_seg.version import __version__

__all__ = [
    "BACKBONE_SUFFIXES",
    "FILE_FORMAT",
    "BackboneFile",
    "backbone_config",
    "check_out",
    "choose_weights",
    "encode_backbone",
    "file_sha256",
    "read_backbone",
    "read_facts",
    "take_backbone",
    "tensors_sha256",
]

BACKBONE_SUFFIXES = (".safetensors", ".pth")
FILE_FORMAT, _FORMAT_VERSION = "cgspn_seg.backbone", 1
_REQUIRED = {"file_format", "file_format_version", "tensors_sha256"}
_WRAPPED = "module."  # before the keys of EMAHook's averaged model


@dataclass(frozen=True)
class BackboneFile:
    """What a backbone file holds.

    Attributes:
        tensors: The tensors, by the backbone's own names.
        facts: What is said of them, as strings by name.
        sha256: What the tensors hash to, as they were read.
    """

    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, str]
    sha256: str

    @property
    def is_intact(self) -> bool:
        """Whether the tensors are those that were exported."""
        return self.sha256 == self.facts["tensors_sha256"]


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash names, dtypes, shapes and bytes in the order of the names, whatever file holds them.

    Args:
        tensors: CPU tensors by name.

    Returns:
        The SHA-256 as hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        # A line of JSON ends where the bytes begin, so no two sets of tensors read the same.
        header = [name, _dtype(tensor), list(tensor.shape)]
        digest.update(json.dumps(header).encode() + b"\n")
        # Through bytes, since NumPy has no bfloat16.
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def choose_weights(
    checkpoint: Mapping[str, Any], filename: str, *, ema: bool = True
) -> tuple[Mapping[str, Any], str]:
    """Take a checkpoint's averaged weights, or those that were trained.

    MMEngine's `EMAHook` swaps the two as it saves: what was averaged is in `state_dict`, ready to
    be used, and what was trained in `ema_state_dict`, whatever the name says.

    Args:
        checkpoint: What the file holds.
        filename: Names it in messages.
        ema: Whether the averaged weights are preferred.

    Returns:
        The weights of the whole model, and in words which they are.

    Raises:
        CheckpointError: If there are no weights, or EMA weights that `EMAHook` has not written.
    """
    stored = state_dict_of(checkpoint)
    swapped = checkpoint.get("ema_state_dict")
    if swapped is None:
        return stored, "state_dict (the checkpoint has no second, EMA or not)"
    trained = {
        key.removeprefix(_WRAPPED): value
        for key, value in swapped.items()
        if key.startswith(_WRAPPED)
    }
    if not trained:
        raise CheckpointError(
            f"{filename}: its ema_state_dict has no key that begins with {_WRAPPED!r}, so it is "
            "not by MMEngine's EMAHook, and which of the file's weights are averaged is not known"
        )
    if ema:
        return stored, "EMA (state_dict, where EMAHook puts the averages)"
    return trained, "as trained, not EMA (ema_state_dict, where EMAHook puts them)"


def take_backbone(
    weights: Mapping[str, Any], prefix: str, filename: str, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Take the tensors under a prefix out of a model's weights.

    Args:
        weights: The model's weights by name.
        prefix: What stands before the backbone's own names, with its dot.
        filename: Names the checkpoint in messages.
        dtype: What floating-point tensors are converted to; `None` keeps theirs.

    Returns:
        Contiguous CPU tensors with memory of their own, in the order of their names.

    Raises:
        CheckpointError: If there is nothing under the prefix, something that is no tensor, or a
            number that is not finite, be it by the conversion.
    """
    chosen = {key: value for key, value in weights.items() if key.startswith(prefix)}
    if not chosen:
        parts = Counter(key.split(".", 1)[0] for key in weights)
        found = ", ".join(f"{name} ({number})" for name, number in parts.most_common(8))
        raise CheckpointError(
            f"{filename}: no key begins with {prefix!r}; the file has, with their numbers of "
            f"tensors, {found}. "
            + (
                "It is of a distillation: pass its config, and --prefix student."
                if parts["student"] and not prefix.startswith("student.")
                else "Pass --prefix"
            )
        )
    tensors: dict[str, torch.Tensor] = {}
    for key in sorted(chosen):
        value = chosen[key]
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise CheckpointError(f"{filename}: {key}: expected a dense tensor, got {type(value)}")
        wanted = dtype if value.is_floating_point() else None
        # Views would take the whole of what they look at into a .pth, and are refused by
        # safetensors; parts in another memory format as well.
        tensor = value.detach().to("cpu", wanted).clone(memory_format=torch.contiguous_format)
        if not torch.isfinite(tensor).all():
            cause = (
                f"does not fit into {_dtype(tensor)}"
                if torch.isfinite(value).all()
                else "the training diverged"
            )
            raise CheckpointError(f"{filename}: {key} has numbers that are not finite: {cause}")
        tensors[key.removeprefix(prefix)] = tensor
    return tensors


def check_out(out: Path, source: Path, name: str, force: bool) -> None:
    """Refuse to write where that cannot be meant.

    Args:
        out: The file to write.
        source: The file or folder that is read.
        name: Of its argument, for messages.
        force: Whether another existing file may be replaced.

    Raises:
        ValueError: If the suffix is unknown, or the file exists.
    """
    if out.suffix not in BACKBONE_SUFFIXES:
        raise ValueError(f"OUT: expected a file that ends in .safetensors or .pth, got {out}")
    if out.is_dir() or (out.exists() and source.exists() and out.samefile(source)):
        raise ValueError(f"OUT: {out} is {'a folder' if out.is_dir() else f'{name} itself'}")
    if out.exists() and not force:
        raise ValueError(f"OUT: {out} exists; pass --force to replace it, or another name")


def backbone_config(cfg: Config, prefix: str) -> dict[str, Any]:
    """The config of the model's part that a prefix means, without where its weights came from.

    Args:
        cfg: The whole config.
        prefix: Such as "backbone." or "student.backbone.".

    Raises:
        ValueError: If the model has no such part, or it is a whole segmentor.
    """
    part = cfg.get("model") or {}
    for name in prefix.rstrip(".").split("."):
        child = part.get(name)
        if not isinstance(child, Mapping) or "type" not in child:
            parts = [
                k
                for k, v in part.items()
                if isinstance(v, Mapping) and "type" in v and k != "init_cfg"
            ]
            raise ValueError(
                f"--prefix {prefix}: the config's model has no {name!r} with a type; here it has "
                f"{', '.join(parts) or 'no parts'}{_proposal(cfg.get('model') or {}, prefix)}"
            )
        part = child
    if "backbone" in part:
        raise ValueError(
            f"--prefix {prefix}: a {part['type']} with a backbone of its own; pass --prefix "
            f"{prefix}backbone."
        )
    config = part.to_dict()
    config.pop("init_cfg", None)
    return config


def _proposal(model: Mapping[str, Any], prefix: str) -> str:
    """Where the encoder is in the config of a model, as advice; "" if that is not known."""
    names: list[str] = []
    while found := [k for k in ("student", "backbone") if isinstance(model.get(k), Mapping)]:
        names.append(found[0])
        model = model[found[0]]
    proposed = "".join(f"{name}." for name in names)
    return f"; pass --prefix {proposed}" if proposed not in ("", prefix) else ""


def encode_backbone(
    tensors: Mapping[str, torch.Tensor], facts: Mapping[str, str], suffix: str
) -> bytes:
    """The bytes of a backbone file.

    Args:
        tensors: What :func:`take_backbone` gave.
        facts: Provenance, and the backbone's `config` as JSON; the format's name, the versions of
            this project and of PyTorch and the tensors' hash are added.
        suffix: One of ``BACKBONE_SUFFIXES``.

    Raises:
        ValueError: If it is another suffix.
    """
    facts = {
        "file_format": FILE_FORMAT,
        "file_format_version": str(_FORMAT_VERSION),
        "cgspn_seg_version": __version__,
        "torch_version": str(torch.__version__),  # a class of its own, which is no data
        "tensors_sha256": tensors_sha256(tensors),
        **facts,
    }
    if suffix == ".safetensors":
        from safetensors.torch import save

        # "format" is what other readers of safetensors look for: which framework wrote it.
        return save(dict(tensors), {"format": "pt", **facts})
    if suffix == ".pth":
        buffer = io.BytesIO()
        torch.save({"meta": facts, "state_dict": dict(tensors)}, buffer)
        return buffer.getvalue()
    raise ValueError(f"suffix: expected one of {BACKBONE_SUFFIXES}, got {suffix!r}")


def read_backbone(path: str | Path) -> BackboneFile:
    """Read a backbone file and hash what is in it; the caller looks at `is_intact`.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is unreadable, no backbone file, or of another version.
    """
    content = load_checkpoint(str(path))
    facts = read_facts(path, content)
    tensors = content if Path(path).suffix == ".safetensors" else content.get("state_dict")
    if not _are(facts, str) or not _are(tensors, torch.Tensor) or _REQUIRED - facts.keys():
        raise CheckpointError(
            f"{path}: not a backbone file, which has {', '.join(sorted(_REQUIRED))} inside; make "
            "one out of a checkpoint with: python tools/export_backbone.py CONFIG CHECKPOINT OUT"
        )
    version = facts["file_format_version"]
    if (facts["file_format"], version) != (FILE_FORMAT, str(_FORMAT_VERSION)):
        raise CheckpointError(
            f"{path}: {facts['file_format']}, version {version}, made by cgspn_seg "
            f"{facts.get('cgspn_seg_version')}; this one ({__version__}) reads {FILE_FORMAT}, "
            f"version {_FORMAT_VERSION}"
        )
    return BackboneFile(tensors, facts, tensors_sha256(tensors))


def read_facts(path: str | Path, content: Mapping[str, Any]) -> Any:
    """What a file says of its tensors; of a backbone file, strings by name.

    Args:
        path: The file.
        content: What `load_checkpoint` read from it; the header of a ``.safetensors`` is not in it.
    """
    if Path(path).suffix != ".safetensors":
        return content.get("meta")
    from safetensors import safe_open

    with safe_open(Path(path).expanduser(), "pt") as file:
        return dict(file.metadata() or {})


def _are(values: Any, kind: type) -> bool:
    """Whether `values` is a dict from strings to objects of a kind."""
    return isinstance(values, dict) and all(
        isinstance(key, str) and isinstance(value, kind) for key, value in values.items()
    )


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
