"""`benchmark.py encoders`: whole encoders side by side, by resolution and batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from benchmark_named import NamedEncoder, version_of
from benchmark_rows import (
    OUT_OF_MEMORY,
    Setting,
    announced,
    cases_in_order,
    lacks_memory,
    measured,
    reason,
)
from torch import Tensor, nn

from cgspn_seg.ops.flops import count_flops


@dataclass(frozen=True)
class EncoderSetting(Setting):
    """What all rows of a run have in common: parameters and images in float32 and channels_last,
    computed under autocast, since not every encoder runs in half precision by itself.

    Attributes:
        attention: PyTorch's backend of attention, a key of `ATTENTION`; None for its own choice.
    """

    attention: str | None

    def build(self, encoder: NamedEncoder, mode: str, size: int) -> nn.Module:
        """The encoder as a mode needs it."""
        module = encoder.build(size).to(memory_format=torch.channels_last)
        module.train(mode == "train")  # Swin's returns nothing
        return module

    def make_input(self, mode: str, size: int, batch: int) -> Tensor:
        """Random images."""
        images = torch.randn(batch, 3, size, size)
        return images.contiguous(memory_format=torch.channels_last)


@cache
def count(encoder: NamedEncoder, size: int) -> dict:
    """The library, parameters, and the multiply-accumulates of one image, forward.

    Raises:
        RuntimeError: it cannot be built.
    """
    with torch.device("meta"):
        module, image = encoder.build(size), torch.empty(1, 3, size, size)
    module.eval()
    return dict(
        library=version_of(encoder.library()),
        parameters=sum(p.numel() for p in module.parameters()),
        macs_per_image=count_flops(module, image, train=False) // 2,
    )


def counted(encoder: NamedEncoder, size: int) -> dict:
    """What :func:`count` says, or `error`, why it cannot."""
    try:
        return count(encoder, size)
    except RuntimeError as error:
        return dict(error=reason(error))


def count_encoders(encoders: Sequence[NamedEncoder], sizes: Sequence[int]) -> Iterator[list[dict]]:
    """The rows of :func:`benchmark_encoders` without their times; nothing is computed.

    Args:
        encoders: what is compared.
        sizes: sides of the images, pixels.

    Yields:
        The rows so far, after each.
    """
    rows: list[dict] = []
    for size in sorted(sizes):
        for encoder in encoders:
            row = dict(size=size, contender=encoder.label, family=encoder.family)
            rows.append(row | counted(encoder, size))
            yield rows


def benchmark_encoders(
    setting: EncoderSetting,
    encoders: Sequence[NamedEncoder],
    *,
    modes: Sequence[str],
    sizes: Sequence[int],
    batches: Sequence[int],
) -> Iterator[list[dict]]:
    """Measures every encoder in every mode, at every size and batch, and says so on stderr.

    A batch of images that are both more and larger than what an encoder had no memory for is not
    tried.

    Args:
        setting: what the rows have in common.
        encoders: what is compared.
        modes: out of "forward" and "train".
        sizes: sides of the images, pixels.
        batches: images in a batch.

    Yields:
        The rows so far, after each. `ms` is the median time of a call, `peak_gib` the most memory
        that is in use during one; where there are none, `error` says why.
    """
    rows: list[dict] = []
    for case, encoder in announced(cases_in_order(modes, sizes, batches), encoders):
        row = dict(case, contender=encoder.label, family=encoder.family)
        row |= counted(encoder, case["size"])
        if "error" not in row:
            if lacks_memory(rows, row):
                row |= dict(error=OUT_OF_MEMORY, tried=False)
            else:
                attention = setting.attention if encoder.attends else None
                row |= measured(setting, encoder, case, attention)
        rows.append(row)
        yield rows
