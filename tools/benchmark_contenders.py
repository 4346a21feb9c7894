"""What `benchmark.py block` and `model` compare: mixers as the command line names them."""

import ast
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import nn

from cgspn_seg.errors import closest
from cgspn_seg.models import CGSPN, MIXERS, Architecture
from cgspn_seg.models.backbones.block import Block
from cgspn_seg.models.mixers import build_mixer

HYBRID = "hybrid"
"""The name of the mixture that :func:`hybrid_layers` describes; it is a model, not a mixer."""

HYBRID_ATTENTION_LAYERS = 3


@dataclass(frozen=True)
class Contender:
    """A row's model: what `--mixers` names, and the backend of its attention.

    Attributes:
        spec: a mixer's name, or "hybrid", with options after a colon, as :func:`parse_spec` reads
            it.
        backend: a key of `benchmark_rows.ATTENTION`; None where there is no attention, or where the
            hybrid's is yet to be chosen.
    """

    spec: str
    backend: str | None = None

    @property
    def mixer(self) -> str:
        return self.spec.partition(":")[0]

    @property
    def eager(self) -> bool:
        """Whether it runs without fused kernels, as the option `eager=True` says."""
        return bool(parse_spec(self.spec)[1].get("eager", False))

    @property
    def label(self) -> str:
        """Its name in tables; the hybrid's does not change with the backend it gets."""
        return f"{self.spec} ({self.backend})" if self.mixer == "attention" else self.spec


@cache
def parse_spec(spec: str) -> tuple[str, dict]:
    """Splits `name:key=value,...` into the name and the options.

    Values are Python literals, so commas may stand inside brackets; what is none is a string.

    Raises:
        ValueError: the options are not of this form.
    """
    name, colon, text = spec.partition(":")
    if not colon:
        return name, {}
    source = f"f({text})"
    try:
        call = ast.parse(source, mode="eval").body
    except SyntaxError:
        call = None
    options = {} if not isinstance(call, ast.Call) or call.args else call.keywords
    if not options or any(option.arg is None for option in options):
        raise ValueError(f"expected {name}:key=value,key=value; got {spec!r}")

    def value(node: ast.expr) -> object:
        try:
            return ast.literal_eval(node)
        except ValueError:
            return ast.get_source_segment(source, node)

    return name, {option.arg: value(option.value) for option in options}


def make_contenders(
    part: str, specs: Sequence[str], backends: Sequence[str], arch: Architecture
) -> list[Contender]:
    """The contenders that the command line names, attention once for each backend.

    Args:
        part: "block" or "model"; the hybrid is a model only.
        specs: what `--mixers` says.
        backends: what `--attention` says.
        arch: what they will be built with, once here too, for mistakes to come out now.

    Raises:
        ValueError: a spec cannot be read, names no mixer, or an option has no such value; or the
            encoder is too shallow for a hybrid.
        TypeError: a mixer does not have an option.
    """
    known = [*sorted(MIXERS.module_dict), *([HYBRID] if part == "model" else [])]
    contenders = []
    for spec in dict.fromkeys(specs):
        name, _ = parse_spec(spec)
        if name not in known:
            raise ValueError(f"expected names out of {known}; got {name!r}{closest(name, known)}")
        if name == HYBRID and arch.num_layers <= HYBRID_ATTENTION_LAYERS:
            raise ValueError(
                f"{HYBRID!r} attends in {HYBRID_ATTENTION_LAYERS} layers, and the encoder has "
                f"{arch.num_layers}"
            )
        with torch.device("meta"):
            # The encoder checks more than the block does; a hybrid of 4 layers has both kinds.
            few = replace(arch, num_layers=HYBRID_ATTENTION_LAYERS + 1)
            build_contender("model", Contender(spec), few, 1, 1)
        if name == "attention":
            contenders += [Contender(spec, backend) for backend in backends]
        else:
            contenders.append(Contender(spec))
    return contenders


def build_contender(
    part: str, contender: Contender, arch: Architecture, patch_size: int, size: int
) -> nn.Module:
    """Builds the block or the encoder, on PyTorch's current default device.

    Args:
        part: "block" or "model".
        contender: which one.
        arch: its sizes.
        patch_size: side of a patch in pixels; only the model has patches.
        size: side of the images in pixels, for the grid of a positional embedding.
    """
    name, options = parse_spec(contender.spec)
    mixer_options = {k: v for k, v in options.items() if k not in ("local_perception", "eager")}
    places = options.get("local_perception")
    places = (places,) if isinstance(places, str) else places
    if part == "block":
        mixer = build_mixer(dict(mixer_options, type=name), arch)
        return Block(arch, mixer, mixer.local_perception if places is None else places)
    # The options of a hybrid are those of its cgspn layers.
    layer = dict(mixer_options, type="cgspn" if name == HYBRID else name)
    mixers = [layer] * arch.num_layers
    if name == HYBRID:
        for i in hybrid_layers(arch.num_layers):
            mixers[i] = "attention"
    return CGSPN(arch, patch_size, img_size=size, mixer=mixers, local_perception=places)


def hybrid_layers(num_layers: int) -> list[int]:
    """The layers of the hybrid that attend: three, evenly spaced, the last one included."""
    count = min(HYBRID_ATTENTION_LAYERS, num_layers)
    return [(i + 1) * num_layers // count - 1 for i in range(count)]
