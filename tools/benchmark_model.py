"""`benchmark.py block` and `model`: mixers side by side, by resolution and batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from benchmark_contenders import HYBRID, Contender, build_contender
from benchmark_rows import (
    OUT_OF_MEMORY,
    Setting,
    announced,
    cases_in_order,
    lacks_memory,
    measured,
)
from torch import Tensor, nn

from cgspn_seg.models import Architecture
from cgspn_seg.ops.flops import count_flops


@dataclass(frozen=True)
class MixerSetting(Setting):
    """What all rows of a run have in common; `dtype` is that of everything in the forward mode, and
    of autocast in the training mode.

    Attributes:
        part: "block" or "model".
        arch: sizes of the encoder.
        patch_size: side of a patch, pixels.
    """

    part: str
    arch: Architecture
    patch_size: int

    @property
    def rotated(self) -> bool:
        """A block's parameters are not in the cache: in an encoder, the other layers' come in
        between; the tokens are still there."""
        return self.part == "block"

    def build(self, contender: Contender, mode: str, size: int) -> nn.Module:
        """The module as a mode needs it: in the dtype, or in float32 for autocast."""
        module = build_contender(self.part, contender, self.arch, self.patch_size, size)
        return module.train() if mode == "train" else module.eval().to(self.dtype)

    def make_input(self, mode: str, size: int, batch: int) -> Tensor:
        """Random tokens for a block, which has a gradient to hand on, or images for a model."""
        side, block = size // self.patch_size, self.part == "block"
        shape = (side, side, self.arch.embed_dims) if block else (3, size, size)
        dtype = torch.float32 if mode == "train" else self.dtype
        return torch.randn(batch, *shape, dtype=dtype, requires_grad=block and mode == "train")


@cache
def count(setting: MixerSetting, contender: Contender, mode: str, size: int) -> dict:
    """Parameters, and FLOPs of one image."""
    with torch.device("meta"):
        module = build_contender(setting.part, contender, setting.arch, setting.patch_size, size)
        x = setting.make_input(mode, size, batch=1).float().detach()
    x.requires_grad_(setting.part == "block")
    return dict(
        parameters=sum(p.numel() for p in module.parameters()),
        flops_per_image=count_flops(module, x, train=mode == "train"),
    )


def fastest_attention(rows: Sequence[dict], like: dict) -> dict | None:
    """The row with the least time out of attention's at the same mode, size and batch."""
    same = [
        row
        for row in rows
        if row["mixer"] == "attention"
        and "ms" in row
        and all(row[key] == like[key] for key in ("mode", "size", "batch"))
    ]
    return min(same, key=lambda row: row["ms"], default=None)


def add_ratios(rows: list[dict]) -> None:
    """Gives the rows what the fastest attention takes as a multiple of theirs."""
    for row in rows:
        other = fastest_attention(rows, row)
        for key, ratio in (("ms", "vs_attention"), ("peak_gib", "memory_vs_attention")):
            if other and key in row:
                row[ratio] = other[key] / row[key]


def benchmark_model(
    setting: MixerSetting,
    contenders: Sequence[Contender],
    *,
    modes: Sequence[str],
    sizes: Sequence[int],
    batches: Sequence[int],
) -> Iterator[list[dict]]:
    """Measures every contender in every mode, at every size and batch, and says so on stderr.

    A batch of images that are both more and larger than what a contender had no memory for is not
    tried.

    Args:
        setting: what the rows have in common.
        contenders: what is compared; a hybrid takes the attention that was fastest.
        modes: out of "forward" and "train".
        sizes: sides of the images, pixels.
        batches: images in a batch.

    Yields:
        The rows so far, after each. `ms` is the median time of a call, `peak_gib` the most memory
        that is in use during one.
    """
    # Hybrids come last, where the backends of attention have been measured.
    contenders = sorted(contenders, key=lambda c: c.mixer == HYBRID)
    rows: list[dict] = []
    for case, contender in announced(cases_in_order(modes, sizes, batches), contenders):
        if contender.mixer == HYBRID:
            best = fastest_attention(rows, case)
            default = "cudnn" if setting.device.type == "cuda" else "flash"
            contender = replace(contender, backend=best["attention"] if best else default)
        row = dict(case, contender=contender.label, mixer=contender.mixer)
        row |= dict(attention=contender.backend)
        row |= count(setting, replace(contender, backend=None), case["mode"], case["size"])
        if lacks_memory(rows, row):
            row |= dict(error=OUT_OF_MEMORY, tried=False)
        else:
            row |= measured(setting, contender, case, contender.backend, not contender.eager)
        rows.append(row)
        add_ratios(rows)
        yield rows
