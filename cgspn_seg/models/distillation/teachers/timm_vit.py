"""Teachers that timm runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from mmseg.registry import MODELS
from torch import Tensor, nn

from cgspn_seg.checkpoints.fit import load_weights, state_dict_of
from cgspn_seg.checkpoints.loading import CheckpointError, load_checkpoint
from cgspn_seg.errors import closest
from cgspn_seg.models.distillation.teachers.base import Family, Teacher

__all__ = ["TimmTeacher"]

_VIT = Family(
    patch_projection="patch_embed.proj",
    blocks="blocks",
    prefix_tokens=("cls_token", "dist_token", "reg_token"),
    branch="drop_path1",  # the identity here, and the last on attention's way to the stream
    norm1="norm1",
    norm2="norm2",
    fc1="mlp.fc1",
    activation="mlp.act",
    fc2="mlp.fc2",
    qkv=("attn.qkv",),
    proj="attn.proj",
    heads="attn.num_heads",
    attention_scale="ls1.gamma",
    mlp_scale="ls2.gamma",
    positions="pos_embed",
    other_model_parts=("norm_pre", "patch_embed.norm"),
    other_attention_parts=("attn.q_norm", "attn.k_norm", "attn.norm", "attn.gate"),
    other_mlp_parts=("mlp.norm", "mlp.fc1_g"),
)
_EVA = replace(_VIT, attention_scale="gamma_1", mlp_scale="gamma_2", rotary=True)
# By the names of the model's and of its blocks' classes. Other blocks of timm's VisionTransformer
# have their norms elsewhere, or several branches side by side.
_FAMILIES = {
    ("VisionTransformer", "Block"): _VIT,
    ("VisionTransformerDistilled", "Block"): _VIT,
    ("Eva", "EvaBlock"): _EVA,
}


@MODELS.register_module()
class TimmTeacher(Teacher):
    """A VisionTransformer or Eva (also DINOv3) of timm, at any image size.

    Nothing is downloaded.

    Args:
        name: timm's name of the model, such as "vit_small_patch16_224"; with a tag, such as
            "vit_small_patch14_dinov2.lvd142m", mean and std are those of these weights.
        checkpoint: its weights, .safetensors or a .pth of tensors only; None for random ones.
        mean: of the images, in 0..255 units; None for what timm says of the model.
        std: likewise.
        options: more options of `timm.create_model`.

    Raises:
        ImportError: timm cannot be imported.
        FileNotFoundError: the checkpoint does not exist.
        CheckpointError: it is unreadable, or does not fill the model.
        ValueError: timm has no such model, or it is of another family.
    """

    def __init__(
        self,
        name: str,
        checkpoint: str | Path | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        timm = _import()
        base = name.split(".")[0]
        if not timm.is_model(base):
            raise ValueError(
                f"TimmTeacher: name: timm {timm.__version__} has no model {base!r}"
                f"{closest(base, timm.list_models())}"
            )
        fixed = dict(pretrained=False, num_classes=0, dynamic_img_size=True)
        if clash := sorted(fixed.keys() & options.keys()):
            raise ValueError(
                f"TimmTeacher: {clash[0]} is set by the teacher ({fixed[clash[0]]}); leave it out"
            )
        try:
            model = timm.create_model(name, **fixed, **options)
        except TypeError as error:
            raise ValueError(
                f"TimmTeacher: timm cannot build {name} for any image size and with "
                f"{options or 'no options'}: {error}"
            ) from error
        blocks = getattr(model, "blocks", None)
        kind = (type(model).__name__, type(blocks[0]).__name__ if blocks else "no blocks")
        if kind not in _FAMILIES:
            known = ", ".join(f"{model} of {block}" for model, block in _FAMILIES)
            raise ValueError(f"TimmTeacher: {name} is {' of '.join(kind)}; expected {known}")
        if checkpoint is not None:
            _fill(model, str(checkpoint), name)
        data = timm.data.resolve_model_data_config(model)
        if mean is None or std is None:
            print_log(
                f"{name}: images are normalized as timm says of it, mean={data['mean']} and "
                f"std={data['std']} of pixels from 0 to 1",
                logger="current",
            )
        super().__init__(
            model,
            _FAMILIES[kind],
            [255 * value for value in data["mean"]] if mean is None else mean,
            [255 * value for value in data["std"]] if std is None else std,
            name=name,
            library=f"timm {timm.__version__}",
            image_size=tuple(model.patch_embed.img_size) if model.patch_embed.img_size else None,
        )

    def _run(self, image: Tensor) -> None:
        self.model.forward_features(image)


def _import() -> Any:
    try:
        import timm
    except Exception as error:  # a torchvision of another PyTorch fails in its own ways
        raise ImportError(
            f"TimmTeacher needs timm and the torchvision that belongs to this PyTorch, which "
            f"cannot be imported ({error}): pip install 'timm>=1.0' torchvision, or "
            "'cgspn_seg[distill]'"
        ) from error
    return timm


def _fill(model: nn.Module, checkpoint: str, name: str) -> None:
    """Loads weights into a model; heads that the file has beyond it are left out."""
    fit = load_weights(model, state_dict_of(load_checkpoint(checkpoint)))
    if fit.missing or fit.mismatched:
        raise CheckpointError(
            f"{checkpoint} does not fit timm's {name}: {fit.describe()}\nPass the name that the "
            "file was saved under, and options such as img_size where it was not the default"
        )
