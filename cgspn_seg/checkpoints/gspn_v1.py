"""Checkpoints of GSPN's original code: where its tensors go in our encoder.

That code names and lays out its parameters in its own way, channels first, and keeps the weights
under `model`, their averages under `model_ema`. Its function is that of
``GSPN(arch, mixer_options=dict(compat="gspn-v1"))``, and its classifier's norm the last of our
`out_norms`.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cgspn_seg.checkpoints.fit import CheckpointFit, state_dict_of
from cgspn_seg.checkpoints.loading import CheckpointError, load_checkpoint

if TYPE_CHECKING:
    from cgspn_seg.models import GSPN, HierarchicalArchitecture

__all__ = ["Conversion", "choose_arch", "convert_gspn_v1", "read_gspn_v1"]

DIRECTIONS = ("right", "down", "left", "up")
"""The order of the directions in the original's tensors."""

_STEM = {
    "downsamplings.0.first.conv": "patch_embed.0",
    "downsamplings.0.first.norm": "patch_embed.2",
    "downsamplings.0.second.conv": "patch_embed.5",
    "downsamplings.0.second.norm": "patch_embed.7",
}
_BLOCK = {
    "norm1": "norm",
    "mixer.in_proj": "op.in_proj",
    "mixer.conv": "op.conv2d",
    "mixer.proxy": "op.x_conv_down",
    "mixer.norm": "op.out_norm",
    "mixer.out": "op.out_proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
# Those of a block that are not a layer's weight or bias; in the order of our joint product.
_PARAMETERS = {
    "mixer.coefficients.weight": tuple(f"op.{name}.weight" for name in (
        "w_conv_up", "l_conv_up", "u_conv_up", "d_conv"
    )),
    "mixer.merge": ("op.m_conv.weight",),
    "mixer.grn.weight": ("op.grn.gamma",),
    "mixer.grn.bias": ("op.grn.beta",),
}  # fmt: skip
_CLASSIFIER = ("classifier.head.weight", "classifier.head.bias")
_WIDTH = "patch_embed.7.weight"  # has the channels of the first stage


@dataclass(frozen=True)
class Conversion:
    """What became of an original checkpoint.

    Attributes:
        tensors: all of our encoder's, by its names.
        sources: the original's names for each of ours; none for the norms of the first three
            outputs, which the original lacks and which start as a LayerNorm does.
        unused: the original's tensors that an encoder has no use for: the classifier.
    """

    tensors: Mapping[str, Tensor]
    sources: Mapping[str, tuple[str, ...]]
    unused: tuple[str, ...]

    @property
    def num_converted(self) -> int:
        """Number of our tensors that the checkpoint gave."""
        return sum(map(bool, self.sources.values()))

    def rows(self) -> Iterator[tuple[str, str, int, str]]:
        """(kind, names, number of tensors, remark), the layers of a name in one row."""
        groups: dict[tuple[str, str], list[str]] = {}
        for name, sources in self.sources.items():
            starred = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
            origin = " + ".join(re.sub(r"\b(layers|blocks)\.\d+", r"\1.*", s) for s in sources)
            groups.setdefault((starred, origin), []).append(name)
        for (name, origin), names in sorted(groups.items(), key=lambda group: not group[0][1]):
            if origin:
                yield "converted", name, len(names), origin
            else:
                yield "missing", name, len(names), "of an output's norm: 1 or 0, as it starts"
        for name in self.unused:
            yield "unused", name, 1, "of the original's classifier"


def read_gspn_v1(path: str, *, ema: bool = True) -> tuple[dict[str, Tensor], str]:
    """Read a checkpoint of the original code, its settings as data.

    Args:
        path: What its training saved, or a file with its state dict alone.
        ema: Whether the averaged weights are preferred.

    Returns:
        The weights by the original's names, and in words which they are.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is unreadable, has no weights, or would run code and that is not
            allowed.
    """
    # The settings beside the weights are of a class of yacs, a dict; nothing here reads them.
    with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
        content = load_checkpoint(path)
    taken = "the file's only weights"
    for key in ("model_ema", "model") if ema else ("model",):
        if isinstance(content.get(key), Mapping):
            taken = f"{key} ({'EMA' if key == 'model_ema' else 'as trained'})"
            content = content[key]
            break
    return state_dict_of(content), taken


def choose_arch(
    weights: Mapping[str, Any], named: Mapping[str, HierarchicalArchitecture], filename: str
) -> str:
    """The name of the architecture whose first stage is as wide as the checkpoint's.

    Raises:
        CheckpointError: If there is none, or the checkpoint is not of the original code.
    """
    if _WIDTH not in weights:
        raise CheckpointError(
            f"{filename}: not a checkpoint of GSPN's original classification code, which has "
            f"{_WIDTH!r}; this one begins with {', '.join(list(weights)[:3])}"
        )
    dims = weights[_WIDTH].numel()
    for name, arch in named.items():
        if arch.embed_dims == dims:
            return name
    known = ", ".join(f"{name} {arch.embed_dims}" for name, arch in named.items())
    raise CheckpointError(f"{filename}: its first stage has {dims} channels; known are {known}")


def convert_gspn_v1(weights: Mapping[str, Any], encoder: GSPN, filename: str) -> Conversion:
    """Convert the weights of the original code, every one of them accounted for.

    Args:
        weights: By the original's names.
        encoder: Names our tensors and their shapes, and gives the values of the norms that the
            original lacks. Needs all four directions and the last stage's norm.
        filename: Names the checkpoint in messages.

    Raises:
        CheckpointError: If the original would have another tensor, or not have one that is there.
    """
    own = encoder.state_dict()
    sources = {name: _sources(name, encoder.out_indices) for name in own}
    needed = {origin for origins in sources.values() for origin in origins}
    present = [name for name in weights if name in needed]
    missing = [name for origins in sources.values() for name in origins if name not in weights]
    unknown = [name for name in weights if name not in needed and name not in _CLASSIFIER]
    expected: dict[str, Sequence[int]] = {}
    for name, origins in sources.items():
        expected.update(zip(origins, _shapes(name, own[name]), strict=False))
    # Both code bases have products as matrices and as 1x1 convolutions.
    mismatched = {
        name: (tuple(expected[name]), tuple(weights[name].shape))
        for name in present
        if _long(weights[name].shape) != _long(expected[name])
    }
    fit = CheckpointFit(len(needed), tuple(missing), tuple(unknown), mismatched)
    if not fit.is_perfect:
        raise CheckpointError(
            f"{filename} does not fit GSPN's original code with channels from "
            f"{encoder.arch.embed_dims} on, depths {tuple(encoder.arch.depths)} and a proxy of "
            f"{encoder.arch.latent_dims} channels: {fit.describe()}\nA file of one of its image "
            "classifiers is expected: pass the --arch it was trained with"
        )
    order = [DIRECTIONS.index(name) for name in encoder.stages[0][0].mixer.directions]
    tensors = {
        name: _convert(name, [weights[origin] for origin in sources[name]], order, own[name])
        for name in own
    }
    unused = tuple(name for name in _CLASSIFIER if name in weights)
    return Conversion(tensors, sources, unused)


def _sources(name: str, out_indices: Sequence[int]) -> tuple[str, ...]:
    """The original's names of what makes up one of our tensors; none for an additional norm."""
    layer, _, kind = name.rpartition(".")
    part, index, *rest = layer.split(".")
    if layer in _STEM:
        return (f"{_STEM[layer]}.{kind}",)
    if part == "downsamplings":  # at the end of a stage there, at the start of the next one here
        return (f"layers.{int(index) - 1}.downsample.{dict(conv=1, norm=3)[rest[0]]}.{kind}",)
    if part == "out_norms":
        return (f"classifier.norm.{kind}",) if out_indices[int(index)] == 3 else ()
    _, stage, block, inner = name.split(".", 3)
    origins = _PARAMETERS.get(inner) or (f"{_BLOCK[inner.rpartition('.')[0]]}.{kind}",)
    return tuple(f"layers.{stage}.blocks.{block}.{origin}" for origin in origins)


def _shapes(name: str, tensor: Tensor) -> list[Sequence[int]]:
    """Shapes of what one of our tensors is made of, as matrices where they are products."""
    if not name.endswith("mixer.coefficients.weight"):
        return [tensor.shape]
    rows, proxy = tensor.shape
    return [(rows // 2, proxy), *[(rows // 6, proxy)] * 3]


def _long(shape: Sequence[int]) -> list[int]:
    """A shape without its axes of length 1."""
    return [length for length in shape if length != 1]


def _convert(name: str, parts: Sequence[Tensor], order: Sequence[int], own: Tensor) -> Tensor:
    """One of our tensors out of the original's, whose directions are put into our order."""
    if not parts:
        return own
    if name.endswith("mixer.merge"):
        return parts[0].reshape(-1)[order]
    if name.endswith("mixer.coefficients.weight"):
        d, proxy = len(order), own.shape[1]
        # Neighbours lie outside of the directions there, and inside here.
        logits = parts[0].reshape(3, d, -1, proxy)[:, order].transpose(0, 1)
        gates = [part.reshape(d, -1, proxy)[order] for part in parts[1:]]
        return torch.cat([part.reshape(-1, proxy) for part in (logits, *gates)])
    return parts[0].reshape(own.shape)
