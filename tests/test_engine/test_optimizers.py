"""Parameter groups of LayerDecayOptimWrapperConstructor."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

import cgspn_seg.engine  # noqa: F401  (registers the constructor)
from cgspn_seg.models import CGSPN

ARCH = dict(embed_dims=8, num_layers=2, num_heads=2, feedforward_channels=16, latent_dims=4)


class Segmentor(nn.Module):
    def __init__(self, mixer: str = "attention") -> None:
        super().__init__()
        self.backbone = CGSPN(arch=ARCH, patch_size=4, img_size=16, mixer=mixer, out_norm=True)
        self.decode_head = nn.Conv2d(8, 3, 1)


def optimizer_of(model: nn.Module, **paramwise_cfg) -> torch.optim.Optimizer:
    config = dict(
        type="OptimWrapper",
        constructor="mmseg.LayerDecayOptimWrapperConstructor",
        optimizer=dict(type="AdamW", lr=0.1, weight_decay=0.05),
        paramwise_cfg=paramwise_cfg,
    )
    return build_optim_wrapper(model, config).optimizer


def settings_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_every_parameter_is_in_one_of_two_groups_without_layer_decay():
    model = Segmentor()
    optimizer = optimizer_of(model)
    assert len(optimizer.param_groups) == 2
    settings = settings_of(model, optimizer)
    assert settings.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        decays = parameter.ndim >= 2 and name != "backbone.pos_embed"
        assert settings[name] == (0.1, 0.05 if decays else 0.0)


def test_a_wrapper_is_looked_through():
    """DDP, which MMEngine has been put around the model by then."""
    model = Segmentor()
    wrapper = nn.Module()
    wrapper.module = model
    expected = settings_of(model, optimizer_of(model, layer_decay_rate=0.5))
    assert settings_of(model, optimizer_of(wrapper, layer_decay_rate=0.5)) == expected


def test_the_rate_decays_from_the_head_to_the_embedding():
    model = Segmentor()
    settings = settings_of(model, optimizer_of(model, layer_decay_rate=0.5))
    assert settings["decode_head.weight"][0] == 0.1
    assert settings["backbone.out_norms.0.weight"][0] == 0.1
    assert settings["backbone.blocks.1.mlp.fc1.weight"][0] == pytest.approx(0.05)
    assert settings["backbone.blocks.0.mlp.fc1.weight"][0] == pytest.approx(0.025)
    assert settings["backbone.patch_embed.projection.weight"][0] == pytest.approx(0.0125)
    assert settings["backbone.pos_embed"] == (pytest.approx(0.0125), 0.0)


def test_custom_keys_multiply_and_the_longest_wins():
    model = Segmentor()
    keys = {"decode_head": dict(lr_mult=10.0), "decode_head.weight": dict(decay_mult=0.0)}
    settings = settings_of(model, optimizer_of(model, custom_keys=keys))
    assert settings["decode_head.bias"] == (1.0, 0.0)
    assert settings["decode_head.weight"] == (0.1, 0.0)


def test_frozen_parameters_are_left_out():
    model = Segmentor()
    model.decode_head.requires_grad_(False)
    assert not any("decode_head" in n for n in settings_of(model, optimizer_of(model)))


@pytest.mark.parametrize(
    ("paramwise_cfg", "message"),
    [
        (dict(layer_decay=0.9), "unknown key 'layer_decay'.*did you mean 'layer_decay_rate'"),
        (dict(layer_decay_rate=1.5), r"must be in \(0, 1\]; got 1.5"),
    ],
)
def test_refuses(paramwise_cfg, message):
    with pytest.raises(ValueError, match=message):
        optimizer_of(Segmentor(), **paramwise_cfg)


def test_layer_decay_needs_an_encoder_that_numbers_its_layers():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="get_layer_depth"):
        optimizer_of(model, layer_decay_rate=0.9)
