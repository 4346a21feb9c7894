"""The sizes of the encoders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

from cgspn_seg.errors import closest, require_positive_int


@dataclass(frozen=True)
class Architecture:
    """Widths and depth of a plain encoder, or of a stage of a hierarchical one; every mixer takes
    what it needs from it.

    Attributes:
        embed_dims: C, channels of a token.
        num_layers: number of blocks.
        num_heads: heads of the attention mixer.
        feedforward_channels: hidden channels of the MLP.
        latent_dims: channels of the mixers' latent: C_c, which C-GSPN propagates (its "compressed"
            channels), C_proxy, which GSPN-2 does, and s, which GSPN's coefficients are made of.
    """

    embed_dims: int
    num_layers: int
    num_heads: int
    feedforward_channels: int
    latent_dims: int

    def check(self) -> None:
        """Raises ValueError unless all fields are positive integers."""
        for field in fields(self):
            require_positive_int(f"arch[{field.name!r}]", getattr(self, field.name))


@dataclass(frozen=True)
class HierarchicalArchitecture:
    """Widths and depths of an encoder of four stages (GSPN, the table of its models).

    Attributes:
        embed_dims: C of the first stage; every stage has twice as many as the one before.
        depths: number of blocks of each of the four stages.
        latent_dims: as in :class:`Architecture`, the same in all stages.
        global_stages: stages, from 0 to 3, some of whose blocks propagate over the whole image.
        mlp_ratio: hidden channels of the MLP for each of C.
    """

    embed_dims: int
    depths: Sequence[int]
    latent_dims: int
    global_stages: Sequence[int] = (2, 3)
    mlp_ratio: int = 4

    def check(self) -> None:
        """Raises ValueError unless all fields are as described."""
        for name in ("embed_dims", "latent_dims", "mlp_ratio"):
            require_positive_int(f"arch[{name!r}]", getattr(self, name))
        if self.embed_dims % 2:
            raise ValueError(
                "arch['embed_dims'] must be even, since the stem's first convolution has half as "
                f"many channels; got {self.embed_dims}"
            )
        if not isinstance(self.depths, Sequence) or len(self.depths) != 4:
            raise ValueError(f"arch['depths'] must have four numbers; got {self.depths!r}")
        for i, depth in enumerate(self.depths):
            require_positive_int(f"arch['depths'][{i}]", depth)
        stages = self.global_stages
        if not isinstance(stages, Sequence) or not set(stages) <= {0, 1, 2, 3}:
            raise ValueError(f"arch['global_stages'] must be out of 0, 1, 2, 3; got {stages!r}")

    def stage(self, index: int) -> Architecture:
        """The sizes of a stage; heads have 32 channels, where something attends."""
        dims = self.embed_dims * 2**index
        heads = max(dims // 32, 1)
        return Architecture(
            dims, self.depths[index], heads, dims * self.mlp_ratio, self.latent_dims
        )


ARCHITECTURES = {
    "tiny": Architecture(192, 12, 3, 768, 32),
    "small": Architecture(384, 12, 6, 1536, 32),
    "base": Architecture(768, 12, 12, 3072, 48),
    "large": Architecture(1024, 24, 16, 4096, 64),
    "so400m": Architecture(1152, 27, 16, 4304, 64),
}
"""Sizes of the plain encoder by name: ViT-Ti, -S, -B, -L and SigLIP's SO400M."""

GSPN_ARCHITECTURES = {
    "tiny": HierarchicalArchitecture(96, (2, 2, 7, 2), 8),
    "small": HierarchicalArchitecture(108, (5, 5, 10, 2), 16, global_stages=(3,)),
    "base": HierarchicalArchitecture(120, (4, 4, 15, 4), 8),
}
"""Sizes of GSPN by name: those of its released configs."""

GSPN2_ARCHITECTURES = {
    "tiny": HierarchicalArchitecture(88, (3, 3, 11, 2), 8),
    "small": HierarchicalArchitecture(104, (3, 3, 23, 2), 8),
    "base": HierarchicalArchitecture(128, (3, 3, 22, 4), 8),
}
"""Sizes of GSPN-2 by name. Its widths and depths are not published; these meet its table's
parameters and multiply-accumulates. 8 latent channels are the most that cost its tiny model no
accuracy (GSPN-2, ablation of C_proxy)."""

Kind = TypeVar("Kind", Architecture, HierarchicalArchitecture)


def resolve_architecture(
    arch: str | Mapping[str, object] | Kind, named: Mapping[str, Kind] = ARCHITECTURES
) -> Kind:
    """The architecture that a config's ``arch`` means.

    Args:
        arch: a name in ``named``, the fields of its values' class, or one of that class. Fields
            with a default may be left out.
        named: architectures by name, all of one class.

    Raises:
        ValueError: the name is unknown, a field is missing or unknown, or has a value it cannot
            have.
        TypeError: it is an architecture of another class.
    """
    kind = type(next(iter(named.values())))
    if isinstance(arch, str):
        if arch not in named:
            raise ValueError(
                f"arch must be one of {list(named)} or a dict; got {arch!r}{closest(arch, named)}"
            )
        return named[arch]
    if isinstance(arch, Mapping):
        arch = kind(**_checked_fields(arch, kind))
    if not isinstance(arch, kind):
        raise TypeError(f"arch must be a name, a dict or a {kind.__name__}; got {arch!r}")
    arch.check()
    return arch


def _checked_fields(arch: Mapping[str, object], kind: type) -> dict[str, object]:
    names = [field.name for field in fields(kind)]
    unknown = [name for name in arch if name not in names]
    if unknown:
        raise ValueError(
            f"arch has the unknown key {unknown[0]!r}; expected {names}{closest(unknown[0], names)}"
        )
    # A dataclass keeps a field's default as an attribute of the class.
    missing = [name for name in names if name not in arch and not hasattr(kind, name)]
    if missing:
        raise ValueError(f"arch lacks {missing}; expected all of {names}")
    return dict(arch)
