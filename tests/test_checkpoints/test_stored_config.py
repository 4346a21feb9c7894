"""What the config in a backbone file is compared for: options that fit and change the function."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from mmseg.registry import MODELS

from cgspn_seg import models  # noqa: F401  (registers the encoders)
from cgspn_seg.checkpoints import CheckpointError
from cgspn_seg.checkpoints.export import FILE_FORMAT
from cgspn_seg.checkpoints.stored_config import require_same_function, stored_config

pytestmark = pytest.mark.usefixtures("mmseg_scope")

ARCH = dict(embed_dims=16, num_layers=2, num_heads=4, feedforward_channels=32, latent_dims=8)
STAGES = dict(embed_dims=8, depths=(1, 1, 2, 1), latent_dims=4)
PLAIN = dict(type="CGSPN", arch=ARCH, patch_size=4, img_size=16)
GSPN = dict(type="GSPN", arch=STAGES)
UP = ("up", "down")


def mixer(**options: Any) -> dict:
    return dict(mixer=dict(type="cgspn", **options))


@pytest.mark.parametrize(
    ("base", "file", "own", "said"),
    [
        (PLAIN, dict(gelu="none"), {}, "gelu is 'none' in the file and 'tanh' in"),
        (PLAIN, dict(norm_eps=1e-5), {}, "norm_eps is 1e-05 in the file and 1e-06 in"),
        (
            PLAIN | dict(mixer="attention"),
            {},
            dict(arch=ARCH | {"num_heads": 2}),
            "arch['num_heads'] is 4 in the file and 2 in",
        ),
        (
            PLAIN,
            mixer(directions=UP),
            mixer(directions=UP[::-1]),
            "mixer['directions'] is ('up', 'down') in the file and ('down', 'up') in",
        ),
        (PLAIN, mixer(segment_length=2), {}, "mixer['segment_length'] is 2 in the file and None"),
        (PLAIN, {}, mixer(state_norm=False), "mixer['state_norm'] is True in the file and False"),
        (
            PLAIN,
            dict(mixer=["cgspn", dict(type="cgspn", segment_length=2)]),
            {},
            "is 2 in the file and None in the config (blocks.1). Set",
        ),
        (
            GSPN,
            dict(mixer_options=dict(compat="gspn-v1")),
            {},
            "mixer_options['compat'] is 'gspn-v1' in the file and None in the config. Set mixer_op",
        ),
        (GSPN, {}, dict(segment_length=4), "segment_length is 2 in the file and 4 in the config. "),
        (
            GSPN,
            {},
            dict(arch=STAGES | {"global_stages": (3,)}),
            ": arch['global_stages'] is (2, 3) in the file and (3,) in the config. Set",
        ),
        (dict(type="GSPN2", arch=STAGES), dict(gelu="tanh"), {}, "gelu is 'tanh' in the file and"),
    ],
)
def test_options_without_a_shape(base: dict, file: dict, own: dict, said: str) -> None:
    model, config = MODELS.build(base | own), json.loads(json.dumps(base | file))
    if "state_norm" not in said:
        fits = MODELS.build(config).state_dict()
        assert {k: v.shape for k, v in fits.items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }
    with pytest.raises(ValueError) as caught:
        require_same_function(model, config, "x.pth", "the config")
    message = str(caught.value)
    assert message.startswith("x.pth was made with other options, so its weights would compute")
    assert said in message and message.count("in the file and") == 1
    assert "python tools/export_backbone.py --info x.pth" in message
    require_same_function(MODELS.build(base | file), config, "x.pth", "the config")


def test_two_differences_are_named_together() -> None:
    attention = PLAIN | dict(mixer="attention")
    model = MODELS.build(attention | dict(arch=ARCH | {"num_heads": 2}))
    with pytest.raises(ValueError, match=r"Set gelu='none', arch\['num_heads'\]=4 in the config;"):
        require_same_function(model, attention | dict(gelu="none"), "x.pth", "the config")


@pytest.mark.parametrize(
    "changes",
    [
        dict(img_size=64, drop_path_rate=0.3, with_cp=True, frozen_stages=1),
        dict(out_indices=(0, 1), out_norm=True),
        dict(mixer=dict(type="cgspn", latent_dims=8)),
    ],
    ids=str,
)
def test_what_leaves_the_function_alone_may_differ(changes: Mapping) -> None:
    require_same_function(MODELS.build(PLAIN | changes), PLAIN, "x.pth", "the config")


def test_other_modules_and_files_without_config_pass() -> None:
    require_same_function(torch.nn.Linear(1, 1), dict(type="Unknown"), "x.pth", "the config")
    require_same_function(MODELS.build(PLAIN), None, "x.pth", "the config")


def test_a_config_that_cannot_be_built_is_named() -> None:
    for config in (PLAIN | dict(curvature=1), dict(type="Unheard"), PLAIN | dict(mixer="new")):
        with pytest.raises(ValueError, match=r"x.pth: the encoder's config inside cannot be buil"):
            require_same_function(MODELS.build(PLAIN), config, "x.pth", "the config")


def test_a_config_is_read_from_backbone_files_alone() -> None:
    facts = {"file_format": FILE_FORMAT, "config": json.dumps(PLAIN)}
    assert stored_config("x.pth", {"meta": facts, "state_dict": {}}) == PLAIN
    for meta in (None, {"iter": 8}, {"config": "{}"}, {"file_format": FILE_FORMAT}):
        assert stored_config("x.pth", {"meta": meta}) is None
    for config, said in (("{", "not readable as JSON"), ("[]", "expected an object, got list")):
        with pytest.raises(CheckpointError, match=rf"x.pth: the config inside.*{said}"):
            stored_config("x.pth", {"meta": facts | {"config": config}})
