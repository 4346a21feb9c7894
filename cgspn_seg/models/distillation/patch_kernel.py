"""A patch embedding's weight for patches of another size and images of another normalization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["fold_normalization", "resize_patch_kernel"]

Normalization = tuple[Sequence[float], Sequence[float]]


def resize_patch_kernel(weight: Tensor, side: int) -> Tensor:
    """Resizes a patch embedding's weight by the pseudo-inverse (PI-resize; FlexiViT, section 3.4).

    With B the bilinear resizing of a patch, the new weight minimizes the mean squared difference
    between the embedding of a patch x by the old weight and of B x by the new one. It is zero where
    patches grow, which loses nothing of them.

    Args:
        weight: (C, in_channels, old side, old side).
        side: of the new patches, pixels.

    Returns:
        (C, in_channels, side, side), in the dtype of `weight`.
    """
    old = weight.shape[-1]
    if weight.shape[-2:] == (side, side):
        return weight
    # Row i of the result is what pixel i becomes: the transpose of B, (old², side²).
    pixels = torch.eye(old * old, dtype=torch.float64, device=weight.device)
    resized = F.interpolate(
        pixels.view(-1, 1, old, old), size=(side, side), mode="bilinear", antialias=True
    )
    transposed = resized.flatten(1)
    new = weight.double().flatten(2) @ torch.linalg.pinv(transposed).T
    return new.unflatten(2, (side, side)).to(weight.dtype)


def fold_normalization(
    weight: Tensor, bias: Tensor, old: Normalization, new: Normalization
) -> tuple[Tensor, Tensor]:
    """A patch embedding for images that are normalized otherwise.

    Args:
        weight: (C, in_channels, side, side).
        bias: (C,).
        old: mean and std, a value per channel each, of the images that the weight was made for.
        new: those of the images that it is to take.

    Returns:
        Weight and bias that give the same embedding of the same picture.

    Raises:
        ValueError: a mean or std has not a value for each channel.
    """
    (old_mean, old_std), (new_mean, new_std) = (
        [torch.as_tensor(values, dtype=weight.dtype, device=weight.device) for values in pair]
        for pair in (old, new)
    )
    for name, values in (("mean", new_mean), ("std", new_std)):
        if values.shape != weight.shape[1:2]:
            raise ValueError(
                f"{name}: expected a value for each of {weight.shape[1]} channels, got "
                f"{values.tolist()}"
            )
    factor, offset = new_std / old_std, (new_mean - old_mean) / old_std
    return weight * factor.view(-1, 1, 1), bias + (weight.sum(dim=(2, 3)) * offset).sum(dim=1)
