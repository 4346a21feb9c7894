"""Checkpoints with random weights, in the names and shapes of GSPN's original code."""

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from cgspn_seg.models import HierarchicalArchitecture

DEEP = HierarchicalArchitecture(8, (1, 1, 15, 1), 3)
"""A few channels, and a stage with global blocks, local ones and a global one again."""


def shapes(arch: HierarchicalArchitecture, classes: int = 1000) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters by their names, in the order of the original."""
    c, s = arch.embed_dims, arch.latent_dims
    found = {}

    def layer(name: str, *shape: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]

    layer("patch_embed.0", c // 2, 3, 3, 3)
    layer("patch_embed.2", c // 2)
    layer("patch_embed.5", c, c // 2, 3, 3)
    layer("patch_embed.7", c)
    for i, depth in enumerate(arch.depths):
        c = arch.embed_dims * 2**i
        d = c * 3 // 2
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            layer(f"{block}.norm", c)
            found |= {
                f"{block}.op.in_proj.weight": (d, c),
                f"{block}.op.conv2d.weight": (d, 1, 7, 7),
                f"{block}.op.x_conv_down.weight": (s, d, 1, 1),
                f"{block}.op.w_conv_up.weight": (12 * d, s, 1, 1),
                f"{block}.op.l_conv_up.weight": (4 * d, s, 1, 1),
                f"{block}.op.u_conv_up.weight": (4 * d, s, 1, 1),
                f"{block}.op.d_conv.weight": (4 * d, s, 1, 1),
                f"{block}.op.m_conv.weight": (1, 4, 1, 1),
                f"{block}.op.grn.gamma": (1, d, 1, 1),
                f"{block}.op.grn.beta": (1, d, 1, 1),
            }
            layer(f"{block}.op.out_norm", d)
            found[f"{block}.op.out_proj.weight"] = (c, d)
            layer(f"{block}.norm2", c)
            layer(f"{block}.mlp.fc1", 4 * c, c)
            layer(f"{block}.mlp.fc2", c, 4 * c)
        if i < 3:
            layer(f"layers.{i}.downsample.1", 2 * c, c, 3, 3)
            layer(f"layers.{i}.downsample.3", 2 * c)
    layer("classifier.norm", c)
    layer("classifier.head", classes, c)
    return found


def random_weights(arch: HierarchicalArchitecture, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of which none is without effect; products keep the scale of what they multiply."""
    torch.manual_seed(0)
    weights = {}
    for name, shape in shapes(arch, 5).items():
        scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 and shape[0] > 1 else 0.5
        weights[name] = scale * torch.randn(shape, dtype=dtype)
    return weights


@contextmanager
def _yacs() -> Iterator[type]:
    """The class of the settings in such checkpoints, where pickles look for it."""
    package, module = ModuleType("yacs"), ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    before = {name: sys.modules.get(name) for name in ("yacs", "yacs.config")}
    sys.modules |= {"yacs": package, "yacs.config": module}
    try:
        yield module.CfgNode
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old


def save(path: Path, weights: Mapping[str, Tensor], averages: Mapping[str, Tensor] | None) -> None:
    """Write what the original's training saves."""
    with _yacs() as settings:
        model = settings(NAME="gspn_tiny", GSPN=settings(DEPTHS=[2, 2, 7, 2]))
        # As CfgNode keeps whether it may be changed.
        model.__dict__.update(__immutable__=True, __deprecated_keys__=set())
        content = dict(model=weights, epoch=3, max_accuracy=0.1, config=settings(MODEL=model))
        if averages is not None:
            content["model_ema"] = averages
        torch.save(content, path)
