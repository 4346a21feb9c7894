"""The sizes of the plain encoder."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from cgspn_seg.errors import closest, require_positive_int


@dataclass(frozen=True)
class Architecture:
    """Widths and depth of a plain encoder; every mixer takes what it needs from it.

    Attributes:
        embed_dims: C, channels of a token.
        num_layers: number of blocks.
        num_heads: heads of the attention mixer.
        feedforward_channels: hidden channels of the MLP.
        latent_dims: C_c, channels of the latent that the C-GSPN mixer propagates (C-GSPN,
            "compressed" channels).
    """

    embed_dims: int
    num_layers: int
    num_heads: int
    feedforward_channels: int
    latent_dims: int


ARCHITECTURES = {
    "tiny": Architecture(192, 12, 3, 768, 32),
    "small": Architecture(384, 12, 6, 1536, 32),
    "base": Architecture(768, 12, 12, 3072, 48),
    "large": Architecture(1024, 24, 16, 4096, 64),
    "so400m": Architecture(1152, 27, 16, 4304, 64),
}
"""Sizes by name: ViT-Ti, -S, -B, -L and SigLIP's SO400M."""


def resolve_architecture(arch: str | Mapping[str, int] | Architecture) -> Architecture:
    """The :class:`Architecture` that a config's ``arch`` means.

    Args:
        arch: a name in ``ARCHITECTURES``, or all fields of :class:`Architecture`.

    Raises:
        ValueError: the name is unknown, a field is missing or unknown, or not a positive integer.
    """
    if isinstance(arch, Architecture):
        return arch
    if isinstance(arch, str):
        if arch not in ARCHITECTURES:
            raise ValueError(
                f"arch must be one of {list(ARCHITECTURES)} or a dict; got {arch!r}"
                f"{closest(arch, ARCHITECTURES)}"
            )
        return ARCHITECTURES[arch]
    names = [field.name for field in fields(Architecture)]
    unknown = [name for name in arch if name not in names]
    if unknown:
        raise ValueError(
            f"arch has the unknown key {unknown[0]!r}; expected {names}{closest(unknown[0], names)}"
        )
    missing = [name for name in names if name not in arch]
    if missing:
        raise ValueError(f"arch lacks {missing}; expected all of {names}")
    for name, value in arch.items():
        require_positive_int(f"arch[{name!r}]", value)
    return Architecture(**arch)
