"""Finds out, before the first image, whether the parts of a segmentor fit one another."""

from collections.abc import Iterator, Sequence
from logging import Logger

from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.necks import Feature2Pyramid
from torch import nn

from cgspn_seg.models.backbones import CGSPN
from cgspn_seg.models.backbones.base import Encoder


def check_channels(model: nn.Module) -> None:
    """Check that neck and heads take as many channels, and feature maps, as the encoder gives.

    Args:
        model: The segmentor, bare. One with a backbone or a neck that is not known here is passed
            over, as are heads that do not derive from MMSegmentation's BaseDecodeHead.

    Raises:
        ValueError: They do not; the message has all keys of the config that are to be set.
    """
    encoder, neck = getattr(model, "backbone", None), getattr(model, "neck", None)
    if not isinstance(encoder, Encoder) or not isinstance(neck, Feature2Pyramid | None):
        return
    given = list(encoder.out_channels)
    problems = [] if neck is None else _problems_of_neck(neck, given)
    for key, head in _heads(model):
        problems += _problems_of_head(key, head, given)
    if problems:
        found, wanted = zip(*problems, strict=True)
        raise ValueError(
            f"config: model.backbone ({type(encoder).__name__}) gives feature maps of "
            f"{_listed(given)} channels (its arch and out_indices), but the config says "
            f"{', '.join(found)}: set {', '.join(wanted)}."
        )


def _problems_of_neck(neck: Feature2Pyramid, given: list[int]) -> list[tuple[str, str]]:
    """What the config says, and should say."""
    problems = []
    rescales = list(neck.rescales)
    if len(rescales) != len(given):
        said = f"model.neck.rescales={_listed(rescales)}"
        problems.append((said, f"model.neck.rescales to {len(given)} factors, one for each map"))
    found = next(m.in_channels for m in neck.modules() if isinstance(m, nn.ConvTranspose2d))
    if set(given) != {found}:
        same = len(set(given)) == 1
        # Feature maps of different widths come from stages, which are a pyramid already.
        wanted = f"model.neck.embed_dim={given[0]}" if same else "model.neck=None"
        problems.append((f"model.neck.embed_dim={found}", wanted))
    return problems


def _problems_of_head(key: str, head: BaseDecodeHead, given: list[int]) -> list[tuple[str, str]]:
    """What the config says, and should say."""
    several = not isinstance(head.in_index, int)
    indices = list(head.in_index) if several else [head.in_index]
    if not all(-len(given) <= index < len(given) for index in indices):
        said = f"{key}.in_index={_listed(indices) if several else indices[0]}"
        return [(said, f"{key}.in_index to numbers from 0 to {len(given) - 1}")]
    wanted = [given[index] for index in indices]
    found = head.in_channels
    if head.input_transform == "resize_concat":  # of which the head keeps the sum
        fits, found = found == sum(wanted), f"{found} in all"
    elif several:
        fits, found = list(found) == wanted, _listed(found)
    else:
        fits = found == wanted[0]
    if fits:
        return []
    said = f"{key}.in_channels={found}"
    return [(said, f"{key}.in_channels={_listed(wanted) if several else wanted[0]}")]


def _heads(model: nn.Module) -> Iterator[tuple[str, BaseDecodeHead]]:
    """The heads of a segmentor, with their keys in its config."""
    for name in ("decode_head", "auxiliary_head"):
        head = getattr(model, name, None)
        parts = enumerate(head) if isinstance(head, nn.ModuleList) else [(None, head)]
        for i, part in parts:
            if isinstance(part, BaseDecodeHead):
                yield f"model.{name}{'' if i is None else f'.{i}'}", part


def _listed(values: Sequence[float]) -> str:
    """As `--cfg-options` takes it."""
    return str(list(values)).replace(" ", "")


def check_sizes(model: nn.Module, logger: Logger) -> None:
    """Warn where batches are padded to sizes that the plain encoder's feature maps do not divide.

    Its patches then reach beyond the image, or the neck's coarsest map leaves out the last of them.
    Each map is resized to another's or the image's size, as if both showed the same, so logits lie
    beside their place, the more the farther right and down, by up to a patch.

    Args:
        model: The segmentor, bare. One without a plain encoder is passed over.
        logger: Takes the warning, one line.
    """
    encoder, neck = getattr(model, "backbone", None), getattr(model, "neck", None)
    if not isinstance(encoder, CGSPN):
        return
    unit, origin = encoder.patch_size, f"model.backbone.patch_size={encoder.patch_size}"
    if isinstance(neck, Feature2Pyramid) and (coarsest := min(neck.rescales)) < 1:
        unit = round(unit / coarsest)
        origin += f", divided by the least of model.neck.rescales, {coarsest:g}"
    found, wanted = [], []
    for key, value in _padded_sizes(model):
        sides = [value] if isinstance(value, int) else list(value)
        if any(side % unit for side in sides):
            # A divisor may as well be the smallest that fits.
            fitting = unit if isinstance(value, int) else [-(-s // unit) * unit for s in sides]
            found.append(f"{key}={value if isinstance(value, int) else _listed(value)}")
            wanted.append(f"{key}={fitting if isinstance(value, int) else _listed(fitting)}")
    if found:
        logger.warning(
            f"{', '.join(found)}: expected multiples of {unit} ({origin}); with others, "
            "predictions lie beside their place towards the right and the bottom. Set "
            f"{', '.join(wanted)}"
        )


def _padded_sizes(model: nn.Module) -> Iterator[tuple[str, int | Sequence[int]]]:
    """Sizes and divisors of what the encoder gets, with their keys in the config."""
    preprocessor = getattr(model, "data_preprocessor", None)
    own = {key: getattr(preprocessor, key, None) for key in ("size", "size_divisor", "test_cfg")}
    testing = own.pop("test_cfg") or {}
    own |= {f"test_cfg.{key}": testing.get(key) for key in ("size", "size_divisor")}
    sizes = {f"model.data_preprocessor.{key}": value for key, value in own.items()}
    options = getattr(model, "test_cfg", None) or {}
    if options.get("mode") == "slide":
        sizes["model.test_cfg.crop_size"] = options.get("crop_size")
    yield from ((key, value) for key, value in sizes.items() if value)
