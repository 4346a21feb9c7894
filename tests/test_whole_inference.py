"""Whole images of any size are predicted where they are, at full resolution."""

import argparse
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from PIL import Image
from torch.nn import functional as F

from cgspn_seg.engine.options import Options, merge_options

CONFIGS = sorted((Path(__file__).parent.parent / "configs/cgspn").glob("cgspn-small*.py"))

pytestmark = pytest.mark.usefixtures("mmseg_scope")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("width", [31, 513, 683, 768])
def test_an_edge_is_predicted_where_it_is(path, width, monkeypatch):
    cfg = Config.fromfile(path)
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    model.data_preprocessor = MODELS.build(cfg.model.data_preprocessor)
    patch = model.backbone.patch_size

    def means_of_patches(image: torch.Tensor) -> torch.Tensor:
        pad = [-image.shape[-1] % patch, -image.shape[-2] % patch]
        return F.avg_pool2d(F.pad(image, (0, pad[0], 0, pad[1])), patch).mean(1, keepdim=True)

    # In place of encoder and head: the mean color of a patch tells the class.
    monkeypatch.setattr(model, "extract_feat", means_of_patches)
    monkeypatch.setattr(
        model.decode_head, "forward", lambda means: torch.cat([-means, means], dim=1)
    )
    edge = int(width * 0.92)
    image = torch.zeros(3, 40, width, dtype=torch.uint8)
    image[..., edge:] = 255
    sample = SegDataSample(metainfo=dict(img_shape=(40, width), ori_shape=(40, width)))
    (result,) = model.test_step(dict(inputs=[image], data_samples=[sample]))
    predicted = result.pred_sem_seg.data[0, 20]
    assert predicted.shape == (width,)
    assert abs(int((predicted == 0).sum()) - edge) <= patch // 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_readmes_options_keep_every_pixel(path, repository, tmp_path):
    readme = " ".join((repository / "README.md").read_text(encoding="utf-8").split())
    options = re.findall(r"test_dataloader\.dataset\.pipeline\.\d\S+", readme)
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=Options)
    cfg = Config.fromfile(path)
    merge_options(cfg, parser.parse_args(["--cfg-options", *options]).cfg_options)
    Image.fromarray(np.zeros((1080, 2048, 3), np.uint8)).save(tmp_path / "image.png")
    steps = [s for s in cfg.test_dataloader.dataset.pipeline if s["type"] != "LoadAnnotations"]
    inputs = Compose(steps)({"img_path": str(tmp_path / "image.png")})["inputs"]
    assert inputs.shape == (3, 1080, 2048)
