"""Does a checkpoint fit a model? Loading weights, and saying in one message what did not match."""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import nn

from cgspn_seg.checkpoints.loading import CheckpointError
from cgspn_seg.sharding import is_sharded, own_name, whole_state_dicts

__all__ = [
    "CheckpointFit",
    "find_prefix",
    "load_weights",
    "patch_sizes",
    "require_complete",
    "require_usable",
    "state_dict_of",
]

_SHOWN = 4  # keys listed of each kind; a mismatch repeats itself in every layer
# Runs in training only, so its absence does not change a prediction.
_TRAINING_ONLY = ("auxiliary_head",)
# Do nothing until they are trained, so their absence changes nothing.
_IDENTITY = ("adapters",)
# Of batch norms; checkpoints before PyTorch 0.4.1 lack it, and nothing here depends on it.
_COUNTER = "num_batches_tracked"
# How PyTorch names a tensor that it does not load for its shape.
_REFUSED = re.compile(r"^\s*size mismatch for (\S+): ", re.MULTILINE)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class CheckpointFit:
    """How the tensors of a checkpoint and of a model correspond.

    Attributes:
        num_tensors: Number of tensors of the model.
        missing: Tensors of the model that the checkpoint lacks.
        unexpected: Tensors of the checkpoint that the model lacks.
        mismatched: Shapes in the model and in the checkpoint, of tensors that differ in shape.
        children: Names of the model's direct children, such as `backbone`.
        counts: Number of matched and of all tensors, by child.
    """

    num_tensors: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)
    children: frozenset[str] = frozenset()
    counts: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def num_matched(self) -> int:
        """Number of tensors of the model that were loaded."""
        return self.num_tensors - len(self.missing) - len(self.mismatched)

    @property
    def is_perfect(self) -> bool:
        """Whether both sides hold the same tensors."""
        return not (self.missing or self.unexpected or self.mismatched)

    @property
    def is_complete_for_prediction(self) -> bool:
        """Whether all differences are in parts that do not take part in a prediction.

        These are the auxiliary head, and whole parts of the checkpoint that the model does not
        have, such as a distillation's teacher.
        """
        used = self.children - set(_TRAINING_ONLY)
        differing = (*self.missing, *self.unexpected, *self.mismatched)
        return self.num_matched > 0 and not any(_child(key) in used for key in differing)

    @property
    def is_complete_but_for_adapters(self) -> bool:
        """Whether all that differs are missing adapters (distillation), which begin as identity."""
        return bool(self.missing) and not (
            self.unexpected or self.mismatched or {*map(_child, self.missing)} - {*_IDENTITY}
        )

    @property
    def differing_parts(self) -> tuple[set[str], set[str]] | None:
        """Whole parts that the file lacks, and those that the model lacks; None if some differ."""
        lacking, unknown = {*map(_child, self.missing)}, {*map(_child, self.unexpected)}
        whole = all(self.counts[name][0] == 0 for name in lacking) and not unknown & self.children
        return (lacking, unknown) if whole and not self.mismatched else None

    def describe(self) -> str:
        """List how much matches and the first keys that do not, over a few indented lines."""
        lines = [f"{self.num_matched} of the model's {self.num_tensors} tensors match"]
        if len(self.counts) > 1:
            parts = (f"{name} {got}/{total}" for name, (got, total) in self.counts.items())
            lines[0] += f" ({', '.join(parts)})"
        shapes = (
            f"{key}: expected {expected}, got {got}"
            for key, (expected, got) in self.mismatched.items()
        )
        for title, keys, number, separator in (
            ("missing in the file", self.missing, len(self.missing), ", "),
            ("unexpected in the file", self.unexpected, len(self.unexpected), ", "),
            ("of another shape", shapes, len(self.mismatched), "; "),
        ):
            if number:
                lines.append(f"  {number} {title}: {_first(keys, number, separator)}")
        return "\n".join(lines)


def _child(key: str) -> str:
    return key.split(".", 1)[0]


def _first(keys: Iterable[str], number: int, separator: str = ", ") -> str:
    shown = separator.join(islice(keys, _SHOWN))
    return shown + (f"{separator}… and {number - _SHOWN} more" if number > _SHOWN else "")


def state_dict_of(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Take the weights out of a checkpoint, without the `module.` that DDP puts before the keys.

    Raises:
        CheckpointError: If there is no tensor among them.
    """
    stored = checkpoint.get("state_dict", checkpoint)
    weights = _like(stored, {key.removeprefix("module."): stored[key] for key in stored})
    if not any(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CheckpointError(
            "no weights found: expected a dict of tensors, or one under `state_dict`, got the keys "
            f"{_first(map(str, checkpoint), len(checkpoint))}"
        )
    return weights


def load_weights(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> CheckpointFit:
    """Load what fits into a model and report the rest; the caller decides whether that will do.

    Args:
        model: The model; wrappers (DDP, FSDP, test-time augmentation) are looked through. Under
            FSDP every process has to call this, with all of `state_dict`.
        state_dict: Tensors by name, as the model names them.

    Returns:
        How the two correspond, but for the counters of batch norms.
    """
    while not is_sharded(model) and (is_model_wrapper(model) or isinstance(model, BaseTTAModel)):
        model = model.module
    with whole_state_dicts(model):
        return _load(model, state_dict)


def _load(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> CheckpointFit:
    expected = {
        key: tuple(value.shape)
        for key, value in _tensors(model.state_dict()).items()
        if not key.endswith(_COUNTER)
    }
    mismatched: dict[str, tuple[Shape, Shape]] = {}
    try:
        keys = model.load_state_dict(state_dict, strict=False)
    except RuntimeError as error:
        # Modules may adapt what they load, such as positional embeddings: only what they refuse is
        # a mismatch, and PyTorch reports that as text only.
        refused = set(map(own_name, _REFUSED.findall(str(error))))
        mismatched = {
            key: (expected[key], tuple(value.shape))
            for key, value in _tensors(state_dict).items()
            if key in expected and key in refused
        }
        if not mismatched:
            raise
        fitting = {key: value for key, value in state_dict.items() if key not in mismatched}
        keys = model.load_state_dict(_like(state_dict, fitting), strict=False)
    missing, unexpected = (
        tuple(map(own_name, kind)) for kind in (keys.missing_keys, keys.unexpected_keys)
    )
    missing = tuple(k for k in missing if k not in mismatched and not k.endswith(_COUNTER))
    absent = {*missing, *mismatched}
    counts: dict[str, tuple[int, int]] = {}
    for key in expected:
        got, total = counts.get(_child(key), (0, 0))
        counts[_child(key)] = (got + (key not in absent), total + 1)
    own = model.module if is_sharded(model) else model
    children = frozenset(name for name, _ in own.named_children())
    return CheckpointFit(len(expected), missing, unexpected, mismatched, children, counts)


def _like(state_dict: Mapping[str, Any], chosen: dict[str, Any]) -> OrderedDict[str, Any]:
    """A state dict of `chosen`, with the module versions that PyTorch attached to `state_dict`."""
    weights = OrderedDict(chosen)
    if hasattr(state_dict, "_metadata"):
        weights._metadata = state_dict._metadata
    return weights


def _tensors(state_dict: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state_dict.items() if isinstance(value, torch.Tensor)}


def find_prefix(names: Collection[str], keys: Iterable[str]) -> tuple[str, int]:
    """Find the prefix under which the most keys are names.

    Args:
        names: Names of tensors, such as a model's.
        keys: Such names with something before them, such as a file's.

    Returns:
        The prefix with its dot, and how many keys are names behind it; "" and 0 if there is none.
    """
    hits: Counter[str] = Counter()
    for key in keys:
        _, dot, tail = key.partition(".")
        while dot:
            if tail in names:
                hits[key[: len(key) - len(tail)]] += 1
            _, dot, tail = tail.partition(".")
    return max(hits.items(), key=lambda hit: hit[1], default=("", 0))


def patch_sizes(fit: CheckpointFit) -> tuple[int, int] | None:
    """The sides of the model's and the file's patches, if no other shape differs; else None."""
    if len(fit.mismatched) != 1:
        return None
    ((key, (expected, got)),) = fit.mismatched.items()
    is_kernel = f".{key}".endswith(".patch_embed.projection.weight")
    return (expected[-1], got[-1]) if is_kernel and expected[:2] == got[:2] else None


def _cause(fit: CheckpointFit, filename: str, resuming: bool = False) -> str:
    """Guess why a checkpoint does not fit, and say what to do."""
    classes = {
        (expected[0], got[0])
        for key, (expected, got) in fit.mismatched.items()
        if ".conv_seg." in f".{key}" and expected[1:] == got[1:]
    }
    if classes and all(".conv_seg." in f".{key}" for key in fit.mismatched):
        expected, got = classes.pop()
        return (
            f"The heads differ in their number of classes: {expected} in the config, {got} in the "
            "file. Set `num_classes` and the data set to what the file was trained for."
        )
    if fit.num_matched == 0:
        prefix, number = find_prefix({*fit.unexpected}, fit.missing)
        if number > len(fit.unexpected) // 2:
            part = prefix.rstrip(".")
            return (
                f"The file holds an encoder alone, the model's `{part}`: to start a training from "
                f"it, pass --cfg-options model.{part}.init_cfg.type=Pretrained "
                f"model.{part}.init_cfg.checkpoint={filename} instead of load_from. To test or to "
                "resume, pass a checkpoint of the whole model."
            )
        return "Nothing matches: the file holds another model, or only a part of one."
    if fit.differing_parts is not None:
        lacking, unknown = (", ".join(sorted(names)) for names in fit.differing_parts)
        said = [f"lacks the model's {lacking}"] * bool(lacking)
        said += [f"has {unknown}, which the model lacks"] * bool(unknown)
        return f"The file {' and '.join(said)}: it is of another training or stage. " + (
            "To start a new training or stage from its weights, pass --cfg-options "
            f"load_from={filename} instead of --resume."
            if resuming
            else "Use the config it was trained with; MMEngine leaves a copy in its work_dir."
        )
    if (sides := patch_sizes(fit)) is not None:
        return (
            f"Patches are of {sides[0]} pixels a side in the config, of {sides[1]} in the file: "
            f"set patch_size={sides[1]} in the encoder's config."
        )
    return (
        "The file was trained with another architecture (`arch`, `mixer`, `patch_size`, head "
        "channels): use the config it was trained with; MMEngine leaves a copy in its work_dir."
    )


def require_complete(
    fit: CheckpointFit,
    filename: str,
    trained_as: str | None = None,
    *,
    for_prediction: bool,
    resuming: bool = False,
) -> None:
    """Refuse a checkpoint that leaves tensors of the model at their random start.

    Args:
        fit: What :func:`load_weights` found.
        filename: Names the checkpoint in the message.
        trained_as: The experiment's name that MMEngine keeps in a checkpoint's meta, if known.
        for_prediction: Let pass what only training uses (the auxiliary head).
        resuming: Whether a training is to go on from it.

    Raises:
        CheckpointError: If something is missing, unexpected or of another shape.
    """
    if not (fit.is_complete_for_prediction if for_prediction else fit.is_perfect):
        origin = f" (trained as {trained_as})" if trained_as else ""
        raise CheckpointError(
            f"{filename}{origin} does not fit the model: {fit.describe()}\n"
            f"{_cause(fit, filename, resuming)}"
        )


def require_usable(fit: CheckpointFit, filename: str) -> None:
    """Refuse a checkpoint from which a model, or its backbone, gets nothing.

    Fine-tuning may replace heads, so other differences pass.

    Raises:
        CheckpointError: If no tensor matches, or none of the backbone's.
    """
    backbone, total = fit.counts.get("backbone", (0, 0))
    if fit.num_matched == 0 or (total and not backbone):
        raise CheckpointError(
            f"{filename} leaves the {'backbone' if fit.num_matched else 'model'} at its random "
            f"start: {fit.describe()}\n{_cause(fit, filename)}"
        )
