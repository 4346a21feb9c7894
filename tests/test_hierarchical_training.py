"""GSPN and GSPN-2 are trained and scored by MMEngine: the demo's mazes, and CamVid."""

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.runner import Runner

pytestmark = pytest.mark.usefixtures("mmseg_scope")


@pytest.fixture
def mazes(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight of the demo's images to train on and two to score."""
    monkeypatch.syspath_prepend(str(repository / "tools"))
    import draw_mazes

    draw_mazes.draw_set(draw_mazes.MazeSet(training=8, validation=2), tmp_path / "mazes")
    return tmp_path / "mazes"


def train(cfg: Config, work_dir: Path) -> None:
    """Two iterations and a validation."""
    # Workers forked from a process that has computed with threads can wait for them for ever.
    cfg.train_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)
    cfg.val_dataloader.update(batch_size=1, num_workers=0, persistent_workers=False)
    cfg.train_cfg.update(max_iters=2, val_interval=2)
    # In so few steps it can leave a branch out of all of them.
    cfg.model.backbone.drop_path_rate = 0.0
    cfg.work_dir = str(work_dir)
    runner = Runner.from_cfg(cfg)
    before = {name: p.detach().clone() for name, p in runner.model.named_parameters()}
    runner.train()
    assert 0 <= runner.message_hub.get_scalar("val/mIoU").current() <= 100
    still = [n for n, p in runner.model.named_parameters() if p.equal(before[n])]
    assert not still


@pytest.mark.parametrize("family", ["gspn", "gspn2"])
@pytest.mark.parametrize("arch", ["tiny", "small", "base"])
def test_each_of_the_six_trains_on_the_demo_set(
    family, arch, shrunken, repository, mazes, tmp_path
):
    configs = repository / "configs"
    cfg = Config.fromfile(configs / "demo/cgspn-demo_upernet_1xb8-0.5k_maze-64x64.py")
    cfg.model = shrunken(
        configs / family / f"{family}-{arch}_upernet_8xb2-160k_ade20k-512x512.py"
    ).model
    cfg.model.data_preprocessor.size = (64, 64)
    for head in ("decode_head", "auxiliary_head"):
        cfg.model[head].num_classes = 4
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = str(mazes)
    train(cfg, tmp_path / "work")


@pytest.mark.parametrize("family", ["gspn", "gspn2"])
def test_the_tiny_ones_train_on_camvid(family, shrunken, repository, camvid_root, tmp_path):
    name = f"{family}/{family}-tiny_upernet_1xb16-2.5k_camvid-360x480.py"
    cfg = shrunken(repository / "configs" / name)
    for loader, split in (
        (cfg.train_dataloader, "train"),
        (cfg.val_dataloader, "val"),
        (cfg.test_dataloader, "val"),
    ):
        loader.dataset.update(
            data_root=str(camvid_root),
            data_prefix=dict(img_path=split, seg_map_path=f"{split}annot"),
            indices=2,
        )
    train(cfg, tmp_path)
