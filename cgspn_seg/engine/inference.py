"""From a config and a checkpoint to label maps of image files."""

from __future__ import annotations

import inspect
import os

from cgspn_seg import compat  # noqa: F401  (before mmseg)

# isort: split
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.device import get_device
from mmseg.apis import init_model
from mmseg.models import BaseSegmentor
from mmseg.registry import DATASETS, MODELS

from cgspn_seg.checkpoints import load_checkpoint, load_weights, require_complete, state_dict_of
from cgspn_seg.engine.options import dataset_to_test
from cgspn_seg.models.distillation import Distiller
from cgspn_seg.visualization import distinct_palette

__all__ = ["Predictor"]


class Predictor:
    """A trained segmentor, ready for image files; infers whole or by slides as `test_cfg` says.

    Args:
        cfg: The config the checkpoint was trained with.
        checkpoint: Path or URL.
        device: Such as `cpu` or `cuda:1`. Default: a GPU where there is one.

    Attributes:
        device: Where the model is.
        classes: Names of the classes; from the checkpoint, else from the config's data set, else
            numbered.
        palette: RGB uint8 colors of shape (num_classes, 3), from the same place.

    Raises:
        CheckpointError: If the checkpoint does not fill the model.
        ValueError: If there is no such device, or the config has no test pipeline or no segmentor.
    """

    def __init__(self, cfg: Config, checkpoint: str, device: str | None = None) -> None:
        device = _usable(device or get_device())
        _require_segmentor(cfg)
        content = load_checkpoint(checkpoint)
        meta = content.get("meta", {})
        self.model = init_model(cfg, None, device="cpu")
        fit = load_weights(self.model, state_dict_of(content))
        require_complete(fit, checkpoint, meta.get("experiment_name"), for_prediction=True)
        self.model.to(device)
        self.device = torch.device(device)
        self.num_classes: int = self.model.num_classes
        self.classes, self.palette = _classes_and_palette(cfg, meta, self.num_classes)
        # Images to predict have no labels.
        pipeline = [step for step in _pipeline(cfg) if step["type"] != "LoadAnnotations"]
        self._pipeline = Compose(pipeline)

    def __call__(self, image: str | os.PathLike[str]) -> np.ndarray:
        """Predict the class ids of an image file, integers of shape (H, W)."""
        data = self._pipeline({"img_path": os.fspath(image)})
        batch = {"inputs": [data["inputs"]], "data_samples": [data["data_samples"]]}
        with torch.inference_mode():
            sample = self.model.test_step(batch)[0]
        return sample.pred_sem_seg.data[0].cpu().numpy()


def _require_segmentor(cfg: Config) -> None:
    kind = (cfg.get("model") or {}).get("type")
    kind = MODELS.get(kind) if isinstance(kind, str) else kind
    if not inspect.isclass(kind) or issubclass(kind, BaseSegmentor):
        return  # what is not registered is for the registry to say
    way_out = "pass the config of a segmentor, such as an EncoderDecoder"
    if issubclass(kind, Distiller):
        way_out = (
            "it distills an encoder, which has no classes yet: fine-tune that with heads first "
            "(docs/distillation.md), and pass the config and the checkpoint of that training"
        )
    raise ValueError(
        f"config: model.type={cfg.model.type!r} is no segmentor, so there is nothing to predict "
        f"with; {way_out}"
    )


def _pipeline(cfg: Config) -> list[dict]:
    """The steps of the test data, so that images are predicted as they are scored."""
    pipeline = dataset_to_test(cfg).get("pipeline") or cfg.get("test_pipeline")
    if not pipeline:
        raise ValueError(
            "config: it has neither test_dataloader.dataset.pipeline nor test_pipeline, which say "
            "how images are loaded"
        )
    return pipeline


def _usable(device: str) -> str:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {device!r} cannot be used here ({reason}); try cpu") from error
    return device


def _classes_and_palette(cfg: Config, meta: dict, num_classes: int) -> tuple[list[str], np.ndarray]:
    known = meta.get("dataset_meta") or {}
    if not known and "CLASSES" in meta:  # MMSegmentation 0.x
        known = {"classes": meta["CLASSES"], "palette": meta.get("PALETTE")}
    if not known.get("classes") and dataset_to_test(cfg):
        # Without its pipeline and its list of files, a data set needs no data.
        dataset = {**dataset_to_test(cfg), "pipeline": [], "lazy_init": True}
        known = DATASETS.build(dataset).metainfo
    classes = list(known.get("classes") or [])
    if len(classes) != num_classes:
        classes = [f"class {index}" for index in range(num_classes)]
    palette = known.get("palette")
    if palette is None or len(palette) < num_classes:
        palette = distinct_palette(num_classes)
    return classes, np.asarray(palette, np.uint8)[:num_classes]
