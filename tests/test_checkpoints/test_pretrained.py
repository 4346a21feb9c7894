"""`init_cfg=dict(type='Pretrained', ...)`: what is loaded, and what is said where nothing is."""

from pathlib import Path

import pytest
import torch
from mmengine.model import BaseModule
from safetensors.torch import save_file
from torch import nn

from cgspn_seg.checkpoints import CheckpointError, pretrained, protect_checkpoint_loading

pytestmark = pytest.mark.usefixtures("mmseg_scope")


class Backbone(BaseModule):
    def __init__(self, init_cfg: dict | None = None, width: int = 4) -> None:
        super().__init__(init_cfg)
        self.stem = nn.Conv2d(3, width, 1)
        self.norm = nn.LayerNorm(width)


def from_file(path: Path, **kwargs: str) -> dict:
    return dict(type="Pretrained", checkpoint=str(path), **kwargs)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_init_cfg_loads_every_tensor(tmp_path: Path, suffix: str) -> None:
    protect_checkpoint_loading()
    source, path = Backbone(), tmp_path / f"weights{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(source.state_dict(), path)
    target = Backbone(from_file(path))
    target.init_weights()
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)


def test_prefix_takes_a_part_of_a_model(tmp_path: Path) -> None:
    source, path = Backbone(), tmp_path / "model.pth"
    weights = {f"backbone.{key}": value for key, value in source.state_dict().items()}
    torch.save({"state_dict": weights | {"decode_head.bias": torch.ones(3)}}, path)
    target = Backbone(from_file(path, prefix="backbone"))
    target.init_weights()
    assert torch.equal(target.stem.weight, source.stem.weight)


def test_nothing_that_fits_is_an_error_that_proposes_the_prefix(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({f"backbone.{k}": v for k, v in Backbone().state_dict().items()}, path)
    with pytest.raises(CheckpointError, match=r"init_cfg of Backbone: no tensor of .*model.pth"):
        Backbone(from_file(path)).init_weights()
    with pytest.raises(CheckpointError, match=r"4 would fit with prefix='backbone.' in init_cfg"):
        Backbone(from_file(path)).init_weights()


def test_a_foreign_checkpoint_is_an_error(tmp_path: Path) -> None:
    torch.save({"layer1.weight": torch.ones(2)}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"the file with layer1.weight.*another architecture"):
        Backbone(from_file(tmp_path / "resnet.pth")).init_weights()


def test_a_part_that_does_not_fit_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(pretrained, "print_log", lambda message, **_: said.append(message))
    weights = Backbone().state_dict()
    weights["norm.weight"] = torch.ones(9)
    torch.save(weights, tmp_path / "part.pth")
    Backbone(from_file(tmp_path / "part.pth")).init_weights()
    assert "loaded 3 of 4 tensors of Backbone" in said[0]
    assert "norm.weight: expected (4,), got (9,)" in said[0]


def test_init_cfg_refuses_code_as_well(tmp_path: Path) -> None:
    protect_checkpoint_loading()
    torch.save({"stem.weight": nn.Conv2d(3, 4, 1)}, tmp_path / "module.pth")
    with pytest.raises(CheckpointError, match=r"module.pth: refused.*Conv2d"):
        Backbone(from_file(tmp_path / "module.pth")).init_weights()
