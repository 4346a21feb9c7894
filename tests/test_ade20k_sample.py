"""Three real ADE20K images go through the shipped ADE20K config, from file to mIoU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.structures import SegDataSample
from PIL import Image

CONFIG = "configs/cgspn/cgspn-small_upernet_8xb2-80k_ade20k-512x512.py"
NUM_CLASSES = 150


@pytest.fixture
def config(shrunken, repository, ade20k_sample_root, tmp_path) -> Config:
    """The shipped config with a tiny model, on the sample's folders."""
    cfg = shrunken(repository / CONFIG)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = str(ade20k_sample_root)
        loader.dataset.data_prefix = dict(img_path="images", seg_map_path="annotations")
    cfg.work_dir = str(tmp_path)
    cfg.randomness = dict(seed=0)
    return cfg


def true_label(root: Path, image: str) -> np.ndarray:
    """The label as the benchmark defines it: 1 to 150 are the classes, 0 is not scored."""
    label = np.array(Image.open(root / "annotations" / f"{Path(image).stem}.png")).astype(int)
    return np.where(label == 0, 255, label - 1)


def predict_a_few_classes(conv_seg: torch.nn.Conv2d) -> None:
    """Makes a random head choose between common classes, so that some of it is right."""
    common = [0, 1, 2, 3, 4, 6, 9, 12]  # wall, building, sky, floor, tree, road, grass, person
    torch.nn.init.normal_(conv_seg.weight, std=1.0)
    torch.nn.init.constant_(conv_seg.bias, -1e4)
    conv_seg.bias.data[common] = 0


def mean_iou(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean IoU, in percent, over the classes that are predicted or true somewhere."""
    predicted = np.concatenate([p[t != 255] for p, t in pairs])
    true = np.concatenate([t[t != 255] for _, t in pairs])
    ious = []
    for c in range(NUM_CLASSES):
        union = ((predicted == c) | (true == c)).sum()
        if union:
            ious.append(((predicted == c) & (true == c)).sum() / union)
    return 100 * float(np.mean(ious))


class Recorder(Hook):
    """Keeps the predictions, and the sizes of what the network sees."""

    def __init__(self) -> None:
        self.results: list[SegDataSample] = []
        self.windows: set[tuple[int, int]] = set()

    def before_test(self, runner: Runner) -> None:
        runner.model.backbone.register_forward_pre_hook(
            lambda _, args: self.windows.add(tuple(args[0].shape[2:]))
        )

    def after_test_iter(self, runner: Runner, batch_idx: int, outputs: list, **_: object) -> None:
        self.results += outputs


INFERENCE = dict(
    whole=dict(mode="whole"), slide=dict(mode="slide", crop_size=(512, 512), stride=(341, 341))
)


@pytest.mark.parametrize("mode", INFERENCE)
def test_inference_is_scored_against_the_original_labels(config, mode, ade20k_sample_root):
    config.model.test_cfg = INFERENCE[mode]
    runner = Runner.from_cfg(config)
    predict_a_few_classes(runner.model.decode_head.conv_seg)
    recorder = Recorder()
    runner.register_hook(recorder)
    metrics = runner.test()

    assert len(runner.test_dataloader.dataset.metainfo["classes"]) == NUM_CLASSES
    assert len(recorder.results) == 3
    pairs = []
    for result in recorder.results:
        true = true_label(ade20k_sample_root, result.img_path)
        np.testing.assert_array_equal(result.gt_sem_seg.data[0].numpy(), true)
        assert result.seg_logits.data.shape == (NUM_CLASSES, *true.shape)
        pairs.append((result.pred_sem_seg.data[0].numpy(), true))
    assert metrics["mIoU"] == pytest.approx(mean_iou(pairs), abs=0.006)  # it is rounded to 0.01
    # The short side of each image becomes 512; windows are crops of 512x512.
    assert {min(window) for window in recorder.windows} == {512}
    assert (recorder.windows == {(512, 512)}) == (mode == "slide")


def test_training_takes_crops_of_the_real_images(config, ade20k_sample_root):
    config.train_cfg = dict(type="IterBasedTrainLoop", max_iters=1)
    config.train_dataloader.batch_size = 2
    config.update(val_dataloader=None, val_cfg=None, val_evaluator=None)
    runner = Runner.from_cfg(config)
    runner.train()
    assert np.isfinite(runner.message_hub.get_scalar("train/loss").current())

    for sample in runner.train_dataloader.dataset:
        label = sample["data_samples"].gt_sem_seg.data[0].numpy()
        true = true_label(ade20k_sample_root, sample["data_samples"].img_path)
        assert label.shape == sample["inputs"].shape[1:]
        assert max(label.shape) <= 512
        assert set(np.unique(label)) <= set(np.unique(true))
