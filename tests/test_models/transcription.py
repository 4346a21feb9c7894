"""The equations of GSPN, GSPN-2 and their scan, written out in plain PyTorch, channels first."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cgspn_seg.models.mixers import GSPN2Mixer, GSPNMixer


def propagate(x: Tensor, logits: Tensor, gate: Tensor, segment_length: int | None) -> Tensor:
    """h_i = w_i h_{i-1} + λ_i x_i over the lines of (B, C, lines, positions).

    Args:
        x: (B, C, L, P).
        logits: (B, 3, C or 1, L, P), for the neighbours at -1, 0, +1.
        gate: (B, C, L, P), λ.
        segment_length: lines after which the state restarts.
    """
    states = []
    for i in range(x.shape[2]):
        line = gate[:, :, i] * x[:, :, i]
        if i % (segment_length or x.shape[2]):
            sigma, previous = logits[:, :, :, i].sigmoid(), states[-1]
            columns = []
            for j in range(x.shape[3]):
                near = [k for k in (-1, 0, 1) if 0 <= j + k < x.shape[3]]
                total = sum(sigma[:, k + 1, :, j] for k in near).clamp(min=1e-7)
                columns.append(
                    sum(sigma[:, k + 1, :, j] / total * previous[..., j + k] for k in near)
                )
            line = line + torch.stack(columns, -1)
        states.append(line)
    return torch.stack(states, 2)


def scan(
    x: Tensor, logits: Tensor, gate: Tensor, direction: str, segment_length: int | None
) -> Tensor:
    """`propagate` in a direction: image and coefficients are turned, and the result back."""

    def turn(t: Tensor) -> Tensor:
        t = t.mT if direction in ("right", "left") else t
        return t.flip(-2) if direction in ("up", "left") else t

    h = propagate(turn(x), turn(logits), turn(gate), segment_length)
    h = h.flip(-2) if direction in ("up", "left") else h
    return h.mT if direction in ("right", "left") else h


def original_scan(
    x: Tensor, logits: Tensor, gate: Tensor, direction: str, segment_length: int | None
) -> tuple[Tensor, Tensor]:
    """As in the original code: the image alone is turned, and always scanned to the right.

    Returns:
        The state where it was computed, and the turned image.
    """
    turned = dict(right=x, left=x.flip(-1), down=x.mT, up=x.mT.flip(-1))[direction]
    return propagate(turned.mT, logits.mT, gate.mT, segment_length).mT, turned


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution with the weight of a Linear."""
    return F.conv2d(x, weight[:, :, None, None], bias)


def gspn(mixer: GSPNMixer, x: Tensor) -> Tensor:
    """GSPN's mixer with a module's parameters and options, (B, H, W, C) to the same."""
    directions, dims = mixer.directions, mixer.conv.in_channels
    d = len(directions)
    x = product(x.permute(0, 3, 1, 2), mixer.in_proj.weight)
    x = F.conv2d(x, mixer.conv.weight, padding=3, groups=dims)
    z = product(x, mixer.proxy.weight)
    weights = mixer.coefficients.weight.split([3 * d * dims, *[d * dims] * 3])
    logits, lam, u, skip = (product(z, weight) for weight in weights)
    logits = logits.unflatten(1, (d, 3, dims))
    lam, u, skip = (t.unflatten(1, (d, dims)) for t in (lam, u, skip))
    merged = 0
    for i, direction in enumerate(directions):
        arguments = x, logits[:, i], lam[:, i], direction, mixer.segment_length
        h, seen = (scan(*arguments), x) if mixer.compat is None else original_scan(*arguments)
        merged = merged + mixer.merge[i] * (u[:, i] * h + skip[:, i] * seen)
    y = F.layer_norm(
        merged.permute(0, 2, 3, 1), (dims,), mixer.norm.weight, mixer.norm.bias, mixer.norm.eps
    )
    norms = y.square().sum((1, 2), keepdim=True).sqrt()
    response = norms / (norms.mean(-1, keepdim=True) + 1e-6)
    y = mixer.grn.weight * (y * response) + mixer.grn.bias + y
    return y @ mixer.out.weight.T


def gspn_v1(
    weights: Mapping[str, Tensor],
    image: Tensor,
    depths: Sequence[int],
    global_stages: Sequence[int],
    maps: Sequence[int] = (56, 28, 14, 7),
) -> list[Tensor]:
    """GSPN's encoder as its original code computes it, with that code's names of parameters.

    Args:
        weights: by the original's names, in its shapes.
        image: (B, 3, H, W).
        depths: number of blocks of each stage.
        global_stages: stages, from 0, whose first seven and every seventh blocks are global.
        maps: lines after which the state restarts in global blocks of each stage: the sides of the
            feature maps of 224 pixels.

    Returns:
        The outputs of the four stages, (B, C 2^i, H / 2^(i+2), W / 2^(i+2)), the last normalized.
    """

    def convolve(x: Tensor, name: str, **options) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), **options)

    def project(x: Tensor, name: str) -> Tensor:
        return product(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
        scale, shift = (weights[f"{name}.{kind}"][:, None, None] for kind in ("weight", "bias"))
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    def mix(x: Tensor, op: str, segment_length: int) -> Tensor:
        x = project(x, f"{op}.in_proj")
        dims = x.shape[1]
        x = convolve(x, f"{op}.conv2d", padding=3, groups=dims)
        proxy = convolve(x, f"{op}.x_conv_down")
        # The neighbours first, then the directions, then the channels.
        logits = convolve(proxy, f"{op}.w_conv_up").unflatten(1, (3, 4, dims))
        lam, u, skip = (
            convolve(proxy, f"{op}.{name}").unflatten(1, (4, dims))
            for name in ("l_conv_up", "u_conv_up", "d_conv")
        )
        merged = 0
        for i, direction in enumerate(("right", "down", "left", "up")):
            h, turned = original_scan(x, logits[:, :, i], lam[:, i], direction, segment_length)
            y = u[:, i] * h + skip[:, i] * turned
            merged = merged + weights[f"{op}.m_conv.weight"][0, i, 0, 0] * y
        y = norm(merged, f"{op}.out_norm")
        norms = y.square().sum((2, 3), keepdim=True).sqrt()
        response = norms / (norms.mean(1, keepdim=True) + 1e-6)
        y = weights[f"{op}.grn.gamma"] * (y * response) + weights[f"{op}.grn.beta"] + y
        return project(y, f"{op}.out_proj")

    half = dict(stride=2, padding=1)
    x = F.gelu(norm(convolve(image, "patch_embed.0", **half), "patch_embed.2"))
    x = norm(convolve(x, "patch_embed.5", **half), "patch_embed.7")
    outputs = []
    for i, depth in enumerate(depths):
        for k in range(depth):
            block = f"layers.{i}.blocks.{k}"
            everything = i in global_stages and (k < 7 or k % 7 == 6)
            x = x + mix(norm(x, f"{block}.norm"), f"{block}.op", maps[i] if everything else 2)
            hidden = F.gelu(project(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
            x = x + project(hidden, f"{block}.mlp.fc2")
        outputs.append(norm(x, "classifier.norm") if i == 3 else x)
        if i < 3:
            x = convolve(x, f"layers.{i}.downsample.1", **half)
            x = norm(x, f"layers.{i}.downsample.3")
    return outputs


def gspn2(mixer: GSPN2Mixer, x: Tensor) -> Tensor:
    """GSPN-2's mixer with a module's parameters and options, (B, H, W, C) to the same."""
    d, proxy = len(mixer.directions), mixer.up.in_features
    z = product(x.permute(0, 3, 1, 2), mixer.in_proj.weight, mixer.in_proj.bias)
    coefficients = product(z, mixer.coefficients.weight, mixer.coefficients.bias)
    logits, lam, u = coefficients.split([3 * d, d * proxy, d * proxy], dim=1)
    logits = logits.unflatten(1, (d, 3, 1))
    lam, u = (t.unflatten(1, (d, proxy)) for t in (lam, u))
    merged = 0
    for i, direction in enumerate(mixer.directions):
        h = scan(z, logits[:, i], lam[:, i], direction, mixer.segment_length)
        if mixer.state_norm is not None:
            norm = mixer.state_norm
            h = F.layer_norm(h.permute(0, 2, 3, 1), (proxy,), norm.weight, norm.bias, norm.eps)
            h = h.permute(0, 3, 1, 2)
        merged = merged + u[:, i] * h
    return product(merged, mixer.up.weight, mixer.up.bias).permute(0, 2, 3, 1)
