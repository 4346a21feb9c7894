"""The registry of token mixers, and how a config names them."""

import inspect
from collections.abc import Mapping, Sequence

from mmengine.registry import Registry
from torch import nn

from cgspn_seg.errors import closest
from cgspn_seg.models.arch import Architecture

MIXERS = Registry("token mixer")
"""Mixer classes by the name configs use.

A class takes an :class:`~cgspn_seg.models.arch.Architecture` and keyword options. Two class
attributes tell the encoder what it needs around it: ``needs_pos_embed`` (a positional embedding at
the input) and ``local_perception`` (the places, out of "mixer" and "mlp", that a block has a local
perception unit by default). A method ``reset_parameters()``, where a mixer has one, runs after the
encoder's own initialization, which gives all products a standard deviation of 0.02.
"""

MixerConfig = str | Mapping


def mixer_configs(mixer: MixerConfig | Sequence[MixerConfig], num_layers: int) -> list[dict]:
    """One ``dict(type=..., **options)`` per layer out of what a config gives: one mixer, or a list
    with one per layer.

    Raises:
        ValueError: a name is not registered, or the list's length is not ``num_layers``.
    """
    if isinstance(mixer, str | Mapping):
        mixers = [mixer] * num_layers
    else:
        mixers = list(mixer)
        if len(mixers) != num_layers:
            raise ValueError(
                f"mixer must be one name or a list of {num_layers}, one per layer; "
                f"got {len(mixers)}"
            )
    configs = [dict(type=m) if isinstance(m, str) else dict(m) for m in mixers]
    for config in configs:
        name = config.get("type")
        if MIXERS.get(str(name)) is None:
            known = sorted(MIXERS.module_dict)
            raise ValueError(
                f"mixer must be out of {known}; got {name!r}{closest(str(name), known)}"
            )
    return configs


def build_mixer(config: Mapping, arch: Architecture) -> nn.Module:
    """Builds a mixer from ``dict(type=..., **options)``; an unknown option raises TypeError."""
    options = dict(config)
    name = options.pop("type")
    cls = MIXERS.get(name)
    known = list(inspect.signature(cls).parameters)[1:]
    for option in options:
        if option not in known:
            raise TypeError(
                f"mixer {name!r} has no option {option!r}; it takes {known}{closest(option, known)}"
            )
    return cls(arch, **options)
