"""Teachers that Hugging Face transformers runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from mmseg.registry import MODELS
from torch import Tensor, nn

from cgspn_seg.checkpoints.loading import CheckpointError, load_checkpoint
from cgspn_seg.errors import closest
from cgspn_seg.models.distillation.teachers.base import IMAGENET_MEAN, IMAGENET_STD, Family, Teacher

__all__ = ["TransformersTeacher"]

_MINIMUM = (5, 18)  # older versions name the parts of DINOv2, ViT and others differently
_HALF = (127.5,) * 3

_VIT = Family(
    patch_projection="embeddings.patch_embeddings.projection",
    blocks="layers",
    prefix_tokens=("embeddings.cls_token",),
    branch="attention",
    norm1="layernorm_before",
    norm2="layernorm_after",
    fc1="mlp.fc1",
    activation="mlp.activation_fn",
    fc2="mlp.fc2",
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    proj="attention.o_proj",
    heads="attention.num_attention_heads",
    positions="embeddings.position_embeddings",
)
_DEIT = replace(_VIT, prefix_tokens=("embeddings.cls_token", "embeddings.distillation_token"))
_DINOV2 = replace(
    _VIT,
    blocks="encoder.layer",
    prefix_tokens=("embeddings.cls_token", "embeddings.register_tokens"),
    branch="layer_scale1",
    norm1="norm1",
    norm2="norm2",
    attention_scale="layer_scale1.lambda1",
    mlp_scale="layer_scale2.lambda1",
)
_DINOV3 = replace(
    _DINOV2,
    patch_projection="embeddings.patch_embeddings",
    blocks="model.layer",
    fc1="mlp.up_proj",
    activation="mlp.act_fn",
    fc2="mlp.down_proj",
    heads="attention.num_heads",
    positions=None,
    rotary=True,
    other_mlp_parts=("mlp.gate_proj",),
)
_SIGLIP = Family(
    patch_projection="embeddings.patch_embedding",
    blocks="encoder.layers",
    branch="self_attn",
    norm1="layer_norm1",
    norm2="layer_norm2",
    fc1="mlp.fc1",
    activation="mlp.activation_fn",
    fc2="mlp.fc2",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    proj="self_attn.out_proj",
    heads="self_attn.num_heads",
    positions="embeddings.position_embedding.weight",
)


@dataclass(frozen=True)
class _Model:
    """How transformers has a family.

    Attributes:
        name: of the class.
        family: where its parts are.
        mean: of its images, where its folder does not say.
        std: likewise.
        build: options of the class.
        call: options of its forward, for images of any size.
    """

    name: str
    family: Family
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    build: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)


_NO_POOLER, _ANY_SIZE = dict(add_pooling_layer=False), dict(interpolate_pos_encoding=True)
_SIGLIP_MODEL = _Model("SiglipVisionModel", _SIGLIP, _HALF, _HALF, call=_ANY_SIZE)
_NAFLEX_MODEL = _Model("Siglip2VisionModel", _SIGLIP, _HALF, _HALF)
# By the model_type in config.json. SigLIP2 has two: checkpoints of a fixed resolution are "siglip",
# those that keep the aspect ratio (NaFlex) "siglip2".
_MODELS = {
    "vit": _Model("ViTModel", _VIT, _HALF, _HALF, _NO_POOLER, _ANY_SIZE),
    "deit": _Model("DeiTModel", _DEIT, build=_NO_POOLER, call=_ANY_SIZE),
    "dinov2": _Model("Dinov2Model", _DINOV2),
    "dinov2_with_registers": _Model("Dinov2WithRegistersModel", _DINOV2),
    "dinov3_vit": _Model("DINOv3ViTModel", _DINOV3),
    "siglip": _SIGLIP_MODEL,
    "siglip_vision_model": _SIGLIP_MODEL,
    "siglip2": _NAFLEX_MODEL,
    "siglip2_vision_model": _NAFLEX_MODEL,
}


@MODELS.register_module()
class TransformersTeacher(Teacher):
    """A ViT, DeiT, SigLIP, SigLIP2, DINOv2 or DINOv3 (ViT) in a folder as transformers writes it.

    Nothing is downloaded. Weights are read from `model.safetensors`, in one file or several, else
    from a `pytorch_model.bin` of tensors only; all of the encoder's must be there.

    Args:
        path: the folder, with config.json; a preprocessor_config.json gives mean and std.
        config: instead of a folder, the contents of a config.json, for random weights.
        mean: of the images, in 0..255 units; None for what the folder says, or the family's.
        std: likewise.

    Raises:
        ImportError: transformers is not installed, or too old.
        FileNotFoundError: the folder or a file in it does not exist, or it is a file.
        CheckpointError: weights are unreadable, missing or of another shape.
        ValueError: not one of path and config is given, or the model is of another family.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        config: Mapping[str, Any] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        transformers = _import()
        if (path is None) == (config is None):
            raise ValueError(
                "TransformersTeacher: pass either path, a folder with config.json and "
                f"model.safetensors, or config; got path={path!r} and config={config!r}"
            )
        folder = None if path is None else Path(path).expanduser()
        name = "config" if folder is None else str(folder)
        config = dict(_read_json(folder, "config.json") if folder else config)
        kind = str(config.get("model_type"))
        if kind not in _MODELS:
            raise ValueError(
                f"{name}: model_type: expected one of {', '.join(_MODELS)}, got {kind!r}"
                f"{closest(kind, _MODELS)}"
            )
        chosen = _MODELS[kind]
        cls = getattr(transformers, chosen.name)
        model = _load(cls, folder, config, chosen) if folder else _random(cls, config, chosen)
        said = _normalization(folder) if folder else None
        if said is None and folder and (mean is None or std is None):
            print_log(
                f"{name}: no preprocessor_config.json says how images are normalized; assuming "
                f"what {kind} models are trained with, mean={chosen.mean} and std={chosen.std}",
                logger="current",
            )
        default_mean, default_std = said or (chosen.mean, chosen.std)
        self._options = dict(chosen.call)
        super().__init__(
            model,
            chosen.family,
            default_mean if mean is None else mean,
            default_std if std is None else std,
            name=name,
            library=f"transformers {transformers.__version__}",
            image_size=_image_size(model.config),
        )

    def patch_kernel(self) -> tuple[Tensor, Tensor | None]:
        projection = self.find(self.family.patch_projection)
        if not isinstance(projection, nn.Linear):
            return super().patch_kernel()
        # Over pixels (row, column, channel) of patches that were cut out before.
        side = self.model.config.patch_size
        weight = projection.weight.unflatten(1, (side, side, -1))
        return weight.permute(0, 3, 1, 2), projection.bias

    def _run(self, image: Tensor) -> None:
        if not isinstance(self.find(self.family.patch_projection), nn.Linear):
            self.model(image, **self._options)
            return
        side = self.patch_size
        patches = image.unfold(2, side, side).unfold(3, side, side)  # (B, C, h, w, side, side)
        grid = image.new_tensor(patches.shape[2:4], dtype=torch.int64).expand(len(image), 2)
        pixels = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        mask = torch.ones(pixels.shape[:2], dtype=torch.int64, device=image.device)
        self.model(pixels, pixel_attention_mask=mask, spatial_shapes=grid)


def _import() -> Any:
    need = f"transformers>={'.'.join(map(str, _MINIMUM))}"
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"TransformersTeacher needs Hugging Face transformers, which cannot be imported "
            f"({error}): pip install '{need}', or 'cgspn_seg[distill]'"
        ) from error
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < _MINIMUM:
        raise ImportError(
            f"TransformersTeacher needs {need}, and {transformers.__version__} is installed: "
            f"pip install '{need}'"
        )
    return transformers


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    if folder.is_file():
        raise FileNotFoundError(
            f"TransformersTeacher: path: {folder} is a file; give its folder, with config.json and "
            f"model.safetensors: path={str(folder.parent)!r}"
        )
    if not file.is_file():
        what = "has no" if folder.is_dir() else "does not exist, so there is no"
        raise FileNotFoundError(
            f"TransformersTeacher: path: {folder} {what} {name}; expected a folder with "
            "config.json and model.safetensors, as save_pretrained writes it or as a model's page "
            "has it"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected an object, got {type(content).__name__}")
    return content


def _config_of(cls: Any, config: Mapping[str, Any]) -> Any:
    # SigLIP's checkpoints of image and text have one config for each.
    own = config.get("vision_config", config)
    return cls.config_class(**{k: v for k, v in own.items() if k != "model_type"})


def _random(cls: Any, config: Mapping[str, Any], chosen: _Model) -> nn.Module:
    return cls(_config_of(cls, config), **chosen.build)


def _load(cls: Any, folder: Path, config: Mapping[str, Any], chosen: _Model) -> nn.Module:
    """The model with the folder's weights, in float32."""
    options = dict(config=_config_of(cls, config), dtype=torch.float32, **chosen.build)
    options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)
    if any(folder.glob("model*.safetensors")):
        source = str(folder)
        options |= dict(local_files_only=True, use_safetensors=True)
    elif (folder / "pytorch_model.bin").is_file():
        source, options["state_dict"] = None, load_checkpoint(str(folder / "pytorch_model.bin"))
    else:
        raise FileNotFoundError(
            f"TransformersTeacher: path: {folder} has no model.safetensors, in one file or with "
            "model.safetensors.index.json in several, and no pytorch_model.bin; copy the weights "
            "there"
        )
    try:
        model, info = cls.from_pretrained(source, **options)
    except Exception as error:  # of the libraries that read the file; they name no file
        raise CheckpointError(f"{folder}: weights are not readable: {error}") from error
    # Heads (SigLIP's pooling) and the norm after the last block take no part in the taps.
    mismatched = [str(key[0]) for key in info["mismatched_keys"]]
    lacking = [
        key
        for key in [*sorted(info["missing_keys"]), *sorted(mismatched)]
        if key.startswith(("embeddings.", f"{chosen.family.blocks}."))
    ]
    if lacking:
        raise CheckpointError(
            f"{folder}: {len(lacking)} tensors of {cls.__name__} are missing in the weights or of "
            f"another shape than config.json says: {', '.join(lacking[:4])}"
            f"{', …' if len(lacking) > 4 else ''}. Copy both files of the same model"
        )
    return model


def _normalization(folder: Path) -> tuple[list[float], list[float]] | None:
    """Mean and std in 0..255 units, as the folder says; None if it does not."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if not (folder / name).is_file():
            continue
        said = _read_json(folder, name)
        said = said.get("image_processor", said)
        # Pixels are multiplied by the factor first, which is 1/255 unless a file says otherwise.
        factor = said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 1.0
        mean, std = said.get("image_mean"), said.get("image_std")
        if not said.get("do_normalize", True):
            mean, std = [0.0] * 3, [1.0] * 3
        if mean is not None and std is not None:
            return [m / factor for m in mean], [s / factor for s in std]
    return None


def _image_size(config: Any) -> tuple[int, int] | None:
    if (size := getattr(config, "image_size", None)) is not None:
        return (size, size) if isinstance(size, int) else tuple(size)
    side = round(config.num_patches**0.5) * config.patch_size  # NaFlex's grid
    return side, side
