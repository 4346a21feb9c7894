"""What `benchmark.py encoders` compares: encoders by name, ours and those of other libraries."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
from benchmark_rows import NotAvailable
from torch import nn

from cgspn_seg.errors import closest
from cgspn_seg.models import (
    ARCHITECTURES,
    CGSPN,
    GSPN,
    GSPN2,
    GSPN2_ARCHITECTURES,
    GSPN_ARCHITECTURES,
)

SWIN = {
    "tiny": dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "small": dict(embed_dims=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "base": dict(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}
"""The sizes of Swin that MMSegmentation's configs have with windows of 7."""

CONVNEXT_LIBRARIES = ("mmpretrain", "timm")
"""Where ConvNeXt is taken from: the first that is installed. MMSegmentation has none; its configs
name mmpretrain's."""


def plain(mixer: str) -> Callable[[str, int], nn.Module]:
    """The plain encoder as its UPerNet configs have it, with one mixer or another."""

    def build(arch: str, size: int) -> nn.Module:
        depth = ARCHITECTURES[arch].num_layers
        taps = [-(-i * depth // 4) - 1 for i in (1, 2, 3, 4)]
        return CGSPN(arch, 16, img_size=size, mixer=mixer, out_indices=taps)

    return build


def build_swin(arch: str, size: int) -> nn.Module:
    """MMSegmentation's Swin."""
    from mmseg.models import SwinTransformer

    return SwinTransformer(window_size=7, drop_path_rate=0.0, **SWIN[arch])


def build_convnext(arch: str, size: int) -> nn.Module:
    """ConvNeXt with the features of all four stages; timm's have no norms of their own."""
    if convnext_library() == "mmpretrain":
        from mmpretrain.models import ConvNeXt

        options = dict(gap_before_final_norm=False, layer_scale_init_value=1.0)
        return ConvNeXt(arch, out_indices=(0, 1, 2, 3), drop_path_rate=0.0, **options)
    from timm import create_model

    return create_model(f"convnext_{arch}", features_only=True, out_indices=(0, 1, 2, 3))


def convnext_library() -> str:
    """The first of `CONVNEXT_LIBRARIES` that is installed.

    Raises:
        NotAvailable: None is.
    """
    for library in CONVNEXT_LIBRARIES:
        if find_spec(library):
            return library
    raise NotAvailable("needs " + " or ".join(CONVNEXT_LIBRARIES))


@dataclass(frozen=True)
class Family:
    """Encoders that differ in their sizes.

    Attributes:
        archs: the names of the sizes.
        build: makes one of them out of a size's name and the side of the images in pixels; it has
            no drop path, which would make a training step cheaper by chance.
        library: the package it is from, or what says so.
    """

    archs: Sequence[str]
    build: Callable[[str, int], nn.Module]
    library: str | Callable[[], str] = "cgspn_seg"


FAMILIES = {
    "cgspn": Family([*ARCHITECTURES], plain("cgspn")),
    "cgspn-lean": Family([*ARCHITECTURES], plain("cgspn-lean")),
    "vit": Family([*ARCHITECTURES], plain("attention")),
    "gspn": Family([*GSPN_ARCHITECTURES], lambda arch, size: GSPN(arch)),
    "gspn2": Family([*GSPN2_ARCHITECTURES], lambda arch, size: GSPN2(arch)),
    "swin": Family([*SWIN], build_swin, "mmseg"),
    "convnext": Family(["tiny", "small", "base"], build_convnext, convnext_library),
}


@dataclass(frozen=True)
class NamedEncoder:
    """An encoder out of `FAMILIES`.

    Attributes:
        family: its key there.
        arch: one of the family's.
    """

    family: str
    arch: str

    @property
    def label(self) -> str:
        """Its name on the command line and in tables."""
        return f"{self.family}-{self.arch}"

    @property
    def attends(self) -> bool:
        """Whether it calls PyTorch's attention, of which there are backends."""
        return self.family == "vit"

    def library(self) -> str:
        """The package it is from.

        Raises:
            NotAvailable: None that has it is installed.
        """
        library = FAMILIES[self.family].library
        return library if isinstance(library, str) else library()

    def build(self, size: int) -> nn.Module:
        """Builds it on PyTorch's current default device.

        Args:
            size: side of the images in pixels, for the grid of a positional embedding.

        Raises:
            NotAvailable: None that has it is installed.
            RuntimeError: Its library cannot build it.
        """
        build, library = FAMILIES[self.family].build, self.library()
        if library == "cgspn_seg":
            return build(self.arch, size)
        device = torch.get_default_device()
        try:
            # Not on the meta device, since Swin reads drop path rates out of a tensor.
            with torch.device("cpu"):
                module = build(self.arch, size)
        except Exception as error:
            # What a library raises where it misses another, or does not know its version.
            said = f"{library} cannot build {self.label}: {type(error).__name__}: {error}"
            raise RuntimeError(said) from error
        return module.to(device)


def version_of(library: str) -> str:
    """Name and version of an installed package."""
    return f"{library} {import_module(library).__version__}"


def find_encoders(names: Sequence[str] | None) -> list[NamedEncoder]:
    """The encoders of these names, or all.

    Raises:
        ValueError: there is none of a name.
    """
    known = {}
    for family, described in FAMILIES.items():
        for encoder in (NamedEncoder(family, arch) for arch in described.archs):
            known[encoder.label] = encoder
    for name in names or ():
        if name not in known:
            raise ValueError(
                f"expected names out of {[*known]}; got {name!r}{closest(name, known)}"
            )
    return [known[name] for name in dict.fromkeys(names or known)]
