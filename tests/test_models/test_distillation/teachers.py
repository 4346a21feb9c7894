"""Tiny teachers of every family with random weights, written as their library writes them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cgspn_seg.models.distillation import EncoderTeacher, Teacher, TimmTeacher, TransformersTeacher

PATCH, GRID = 4, 4  # pixels a side; patches a side that the positional embeddings are made for
SIZES = [(16, 16), (12, 20)]  # pixels; the first is that of the grid
WIDTHS = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, patch_size=PATCH)
_SIZE, _MLP = dict(image_size=PATCH * GRID), dict(intermediate_size=48)

# Class, config and model_type of transformers, and options.
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTModel", "ViTConfig", _SIZE | _MLP),
    "deit": ("DeiTModel", "DeiTConfig", _SIZE | _MLP),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", _SIZE | _MLP),
    "siglip2-naflex": (
        "Siglip2VisionModel",
        "Siglip2VisionConfig",
        _MLP | {"num_patches": GRID**2},
    ),
    "dinov2": ("Dinov2Model", "Dinov2Config", _SIZE | {"mlp_ratio": 2}),
    "dinov2-registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        _SIZE | {"mlp_ratio": 2, "num_register_tokens": 3},
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", _SIZE | _MLP | {"num_register_tokens": 3}),
}  # fmt: skip
TIMM = {
    "timm-vit": "vit_tiny_patch16_224",
    "timm-deit": "deit_tiny_distilled_patch16_224",
    "timm-siglip": "vit_base_patch16_siglip_224",
    "timm-dinov2-registers": "vit_small_patch14_reg4_dinov2",
    "timm-dinov3": "vit_small_patch16_dinov3",
}
TIMM_OPTIONS = dict(img_size=PATCH * GRID, patch_size=PATCH, embed_dim=32, depth=3, num_heads=2)
ENCODER = dict(
    type="CGSPN",
    arch=dict(
        embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=48, latent_dims=8
    ),
    patch_size=PATCH,
    img_size=PATCH * GRID,
    mixer="attention",
)  # fmt: skip
FAMILIES = [*TRANSFORMERS, *TIMM, "encoder"]


def library(name: str) -> ModuleType:
    """An optional dependency; the test is skipped where it cannot be imported."""
    try:
        return __import__(name)
    except Exception as error:  # timm fails in torchvision's own ways
        pytest.skip(f"needs {name}, which cannot be imported: {error}")


def random_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter with an effect that shows, biases and layer scales too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
    return model.eval()


def save_transformers(family: str, folder: Path, **options: Any) -> nn.Module:
    """Writes a model of transformers with save_pretrained and gives it."""
    transformers = library("transformers")
    name, config, defaults = TRANSFORMERS[family]
    config = getattr(transformers, config)(**(WIDTHS | defaults | options))
    pooler = dict(add_pooling_layer=False) if family in ("vit", "deit") else {}
    model = random_weights(getattr(transformers, name)(config, **pooler))
    model.save_pretrained(folder)
    return model


def make_teacher(family: str, folder: Path) -> Teacher:
    """A teacher of a family, read from files in `folder`."""
    if family in TRANSFORMERS:
        save_transformers(family, folder)
        (folder / "preprocessor_config.json").write_text(
            json.dumps(dict(image_mean=[0.5, 0.4, 0.3], image_std=[0.25, 0.5, 0.125]))
        )
        return TransformersTeacher(folder)
    if family in TIMM:
        timm = library("timm")
        from safetensors.torch import save_file

        model = timm.create_model(TIMM[family], **TIMM_OPTIONS)
        save_file(random_weights(model).state_dict(), folder / "model.safetensors")
        return TimmTeacher(TIMM[family], folder / "model.safetensors", **TIMM_OPTIONS)
    teacher = EncoderTeacher(ENCODER)
    torch.save(random_weights(teacher.model).state_dict(), folder / "encoder.pth")
    return EncoderTeacher(ENCODER, folder / "encoder.pth", mean=[10, 20, 30], std=[50, 60, 70])


MakeTeacher = Callable[[str], Teacher]


def picture(size: tuple[int, int], batch: int = 2) -> Tensor:
    """Pixels from 0 to 255, (B, 3, H, W), float64."""
    generator = torch.Generator().manual_seed(1)
    return 255 * torch.rand(batch, 3, *size, generator=generator, dtype=torch.float64)


def normalized(pixels: Tensor, mean: Any, std: Any) -> Tensor:
    mean, std = (pixels.new_tensor(values).view(-1, 1, 1) for values in (mean, std))
    return (pixels - mean) / std
