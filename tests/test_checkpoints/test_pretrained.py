"""`init_cfg=dict(type='Pretrained', ...)`: what is loaded, and what is said where nothing is."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from safetensors.torch import save_file
from torch import nn

from cgspn_seg import models  # noqa: F401  (registers the encoders)
from cgspn_seg.checkpoints import CheckpointError, pretrained, protect_checkpoint_loading
from cgspn_seg.checkpoints.export import encode_backbone

pytestmark = pytest.mark.usefixtures("mmseg_scope")


class Backbone(BaseModule):
    def __init__(self, init_cfg: dict | None = None, width: int = 4) -> None:
        super().__init__(init_cfg)
        self.stem = nn.Conv2d(3, width, 1)
        self.norm = nn.LayerNorm(width)


ARCH = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32, latent_dims=8)


def from_file(path: Path, **kwargs: object) -> dict:
    return dict(type="Pretrained", checkpoint=str(path), **kwargs)


def encoder(init_cfg: dict | None = None, **options: object) -> BaseModule:
    defaults = dict(type="CGSPN", arch=ARCH, patch_size=4, img_size=16)
    return MODELS.build(defaults | options | {"init_cfg": init_cfg})


def backbone_file(path: Path, **options: object) -> Path:
    """An encoder with some threes inside, as tools/export_backbone.py writes it."""
    model = encoder(**options)
    model.blocks[0].norm1.bias.data.fill_(3)
    config = dict(type="CGSPN", arch=ARCH, patch_size=4, img_size=16) | options
    facts = {"config": json.dumps(config)}
    path.write_bytes(encode_backbone(model.state_dict(), facts, path.suffix))
    return path


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


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged of loading."""
    said: list[str] = []
    monkeypatch.setattr(pretrained, "print_log", lambda message, **_: said.append(message))
    return said


@pytest.mark.parametrize("other", [{}, {"norm.weight": torch.ones(9)}], ids=["missing", "shape"])
def test_a_part_that_would_stay_random_is_refused_unless_allowed(
    tmp_path: Path, said: list[str], other: dict
) -> None:
    weights = Backbone().state_dict()
    del weights["norm.weight"]
    path = tmp_path / "part.pth"
    torch.save(weights | other, path)
    with pytest.raises(CheckpointError) as caught:
        Backbone(from_file(path)).init_weights()
    message = str(caught.value)
    assert f"init_cfg of Backbone: 1 of its 4 tensors would stay random, since {path}" in message
    expected = "norm.weight: expected (4,), got (9,)" if other else "missing in the file: norm.weig"
    assert expected in message and "another architecture or mixer: set" in message
    assert "pass allow_partial=True in init_cfg" in message and not said
    Backbone(from_file(path, allow_partial=True)).init_weights()
    assert "loaded 3 of 4 tensors of Backbone" in said[0] and expected in said[0]


def test_norms_of_outputs_may_be_absent(tmp_path: Path, said: list[str]) -> None:
    """They belong to what reads the features: a segmentor has some that a teacher has not."""
    torch.save(encoder().state_dict(), tmp_path / "encoder.pth")
    encoder(from_file(tmp_path / "encoder.pth"), out_norm=True, out_indices=(0, 1)).init_weights()
    assert "missing in the file: out_norms.0.weight" in said[0]


def test_an_encoder_of_another_architecture_is_refused(tmp_path: Path) -> None:
    torch.save(encoder(arch=ARCH | {"latent_dims": 4}).state_dict(), tmp_path / "narrow.pth")
    with pytest.raises(CheckpointError) as caught:
        encoder(from_file(tmp_path / "narrow.pth")).init_weights()
    assert "init_cfg of CGSPN: 14 of its" in str(caught.value)
    assert "blocks.0.mixer.in_proj.weight: expected (24, 16), got (20, 16)" in str(caught.value)


def test_an_encoder_of_other_mixers_is_a_teacher_to_start_from(tmp_path: Path) -> None:
    path = backbone_file(tmp_path / "vit.pth", mixer="attention")
    with pytest.raises(CheckpointError) as caught:
        encoder(from_file(path)).init_weights()
    assert f"python tools/export_backbone.py --info {path} shows" in str(caught.value)
    assert f"python tools/convert_checkpoint.py {path} OUT CONFIG" in str(caught.value)
    encoder(from_file(path, allow_partial=True)).init_weights()


def test_what_fits_in_part_and_better_with_a_prefix_gets_it_proposed(tmp_path: Path) -> None:
    weights = {f"backbone.{key}": value for key, value in Backbone().state_dict().items()}
    torch.save(weights | {"norm.weight": torch.ones(4)}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"4 would fit with prefix='backbone.' in init_cfg"):
        Backbone(from_file(tmp_path / "model.pth")).init_weights()


def test_patches_of_another_size_are_resized_by_the_tool_that_is_named(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    path = backbone_file(tmp_path / "encoder.pth", mixer="cgspn-lean", patch_size=4)
    with pytest.raises(CheckpointError) as caught:
        encoder(from_file(path), mixer="cgspn-lean", patch_size=6).init_weights()
    message = str(caught.value)
    assert "projection.weight: expected (16, 3, 6, 6), got (16, 3, 4, 4)" in message
    assert "Patches are of 6 pixels a side in the config, of 4 in the file: set pat" in message
    command = re.search(r"python tools/(\S+) (.*?) \(or", message)
    out = tmp_path / "six.pth"
    arguments = command[2].replace("OUT", str(out)).split()
    monkeypatch.syspath_prepend(str(repository / "tools"))
    monkeypatch.setattr("sys.argv", [command[1], *arguments])
    importlib.import_module(command[1].removesuffix(".py")).main()
    encoder(from_file(out), mixer="cgspn-lean", patch_size=6).init_weights()
    assert re.search(r"loaded (\d+) of \1 tensors of CGSPN", said[0])


def test_patches_of_a_file_without_config_need_an_export_first(tmp_path: Path) -> None:
    torch.save(encoder(patch_size=2).state_dict(), tmp_path / "encoder.pth")
    with pytest.raises(CheckpointError, match=r"make a backbone file with tools/export_backbone"):
        encoder(from_file(tmp_path / "encoder.pth")).init_weights()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_of_another_function_is_refused(tmp_path: Path, suffix: str) -> None:
    """Every tensor fits."""
    path = backbone_file(tmp_path / f"encoder{suffix}", gelu="none")
    with pytest.raises(ValueError, match=r"gelu is 'none' in the file and 'tanh' in the config of"):
        encoder(from_file(path)).init_weights()
    target = encoder(from_file(path), gelu="none")
    target.init_weights()
    assert torch.equal(target.state_dict()["blocks.0.norm1.bias"], torch.full((16,), 3.0))
    bare = tmp_path / f"bare{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(target.state_dict(), bare)
    encoder(from_file(bare)).init_weights()  # which says nothing of itself


def test_init_cfg_refuses_code_as_well(tmp_path: Path) -> None:
    protect_checkpoint_loading()
    torch.save({"stem.weight": nn.Conv2d(3, 4, 1)}, tmp_path / "module.pth")
    with pytest.raises(CheckpointError, match=r"module.pth: refused.*Conv2d"):
        Backbone(from_file(tmp_path / "module.pth")).init_weights()
