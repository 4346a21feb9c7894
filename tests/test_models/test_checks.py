"""A segmentor whose parts do not fit is named with what to set, before its first image."""

import logging
from copy import deepcopy
from typing import Any

import pytest
import torch
from mmengine.config import ConfigDict
from mmseg.registry import MODELS
from torch import nn

from cgspn_seg.models.checks import check_channels, check_sizes

NARROW = dict(embed_dims=16, num_layers=4, num_heads=2, feedforward_channels=32, latent_dims=8)
PLAIN = dict(type="CGSPN", arch=NARROW, patch_size=14, out_indices=(0, 1, 2, 3))
STAGES = dict(type="GSPN", arch=dict(embed_dims=8, depths=[1, 1, 1, 1], latent_dims=4))
BN = dict(type="BN")
NECK = dict(type="Feature2Pyramid", embed_dim=16, rescales=[4, 2, 1, 0.5], norm_cfg=BN)
UPER = dict(
    type="UPerHead", in_channels=[16] * 4, in_index=[0, 1, 2, 3], channels=8, num_classes=3,
    pool_scales=(1,), norm_cfg=BN,
)  # fmt: skip
FCN = dict(
    type="FCNHead", in_channels=16, in_index=2, channels=8, num_convs=1, concat_input=False,
    num_classes=3, norm_cfg=BN,
)  # fmt: skip
PREPROCESSOR = dict(
    type="SegDataPreProcessor", mean=[0.0] * 3, std=[1.0] * 3, size=(56, 84),
    test_cfg=dict(size_divisor=28),
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("mmseg_scope")


def build(backbone: dict = PLAIN, neck: dict | None = NECK, **parts: Any) -> nn.Module:
    cfg = dict(
        type="EncoderDecoder",
        data_preprocessor=PREPROCESSOR,
        backbone=backbone,
        neck=neck,
        decode_head=UPER,
        auxiliary_head=FCN,
        test_cfg=dict(mode="whole"),
    )
    return MODELS.build(ConfigDict(deepcopy(cfg | parts)))


def stages(**head: Any) -> nn.Module:
    return build(STAGES, None, decode_head=UPER | head, auxiliary_head=FCN | dict(in_channels=32))


CONCAT = dict(type="FCNHead", input_transform="resize_concat", in_index=[0, 3], in_channels=[8, 64])
CONCAT = FCN | CONCAT


@pytest.mark.parametrize(
    "model",
    [
        build,
        lambda: stages(in_channels=[8, 16, 32, 64]),
        lambda: stages(in_channels=[64, 8], in_index=[-1, 0]),
        lambda: build(STAGES, None, decode_head=CONCAT, auxiliary_head=[]),
        lambda: build(neck=None, decode_head=UPER, auxiliary_head=[FCN, FCN | dict(in_index=-1)]),
    ],
)
def test_parts_that_fit_pass_and_run(model):
    model = model().eval()
    check_channels(model)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 56, 56), mode="tensor").shape[1] == 3


def test_all_that_another_encoder_needs_is_said_at_once():
    model = build(PLAIN | dict(arch=NARROW | dict(embed_dims=24)))
    with pytest.raises(ValueError, match="gives feature maps of") as caught:
        check_channels(model)
    assert str(caught.value) == (
        "config: model.backbone (CGSPN) gives feature maps of [24,24,24,24] channels (its arch and "
        "out_indices), but the config says model.neck.embed_dim=16, "
        "model.decode_head.in_channels=[16,16,16,16], model.auxiliary_head.in_channels=16: set "
        "model.neck.embed_dim=24, model.decode_head.in_channels=[24,24,24,24], "
        "model.auxiliary_head.in_channels=24."
    )
    with pytest.raises(RuntimeError), torch.no_grad():
        model(torch.zeros(1, 3, 56, 56), mode="tensor")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            lambda: stages(),
            r"\(GSPN\) gives feature maps of \[8,16,32,64\] .* says "
            r"model\.decode_head\.in_channels=\[16,16,16,16\]: set "
            r"model\.decode_head\.in_channels=\[8,16,32,64\]\.$",
        ),
        (
            lambda: build(STAGES, NECK),
            r"says model\.neck\.embed_dim=16, .* set model\.neck=None, ",
        ),
        (
            lambda: build(PLAIN | dict(out_indices=(1, 3))),
            r"model\.neck\.rescales=\[4,2,1,0\.5\], model\.decode_head\.in_index=\[0,1,2,3\], "
            r"model\.auxiliary_head\.in_index=2: set model\.neck\.rescales to 2 factors, one for "
            r"each map, model\.decode_head\.in_index to numbers from 0 to 1, ",
        ),
        (
            lambda: build(neck=None, auxiliary_head=[FCN, FCN | dict(in_channels=7)]),
            r"says model\.auxiliary_head\.1\.in_channels=7: set "
            r"model\.auxiliary_head\.1\.in_channels=16\.$",
        ),
        (
            lambda: build(
                STAGES, None, decode_head=CONCAT | dict(in_channels=[8, 8]), auxiliary_head=[]
            ),
            r"decode_head\.in_channels=16 in all: set model\.decode_head\.in_channels=\[8,64\]\.$",
        ),
    ],
    ids=["stages", "stages with a neck", "fewer maps", "one of several heads", "concatenated"],
)
def test_what_does_not_fit_is_named_with_what_to_set(model, said):
    with pytest.raises(ValueError, match=said):
        check_channels(model())


def test_what_is_not_known_here_is_left_alone(caplog):
    foreign = dict(type="ResNet", depth=18, out_indices=(0, 1, 2, 3))
    model = build(foreign, None, data_preprocessor=PREPROCESSOR | dict(size=(31, 33)))
    fpn = dict(type="FPN", in_channels=[16] * 4, out_channels=12, num_outs=4)
    for other in (model, build(neck=fpn), nn.Identity()):
        check_channels(other)
    check_sizes(model, logging.getLogger("test"))
    check_sizes(nn.Identity(), logging.getLogger("test"))
    assert not caplog.records


def warnings_of(caplog: pytest.LogCaptureFixture, model: nn.Module) -> list[str]:
    check_sizes(model, logging.getLogger("test"))
    return [record.message for record in caplog.records]


@pytest.mark.parametrize("size", [(480, 504), (504, 480)])
def test_sizes_that_the_coarsest_map_does_not_divide_are_named_with_such_that_do(caplog, size):
    preprocessor = PREPROCESSOR | dict(size=size, test_cfg=dict(size_divisor=32))
    assert warnings_of(caplog, build(data_preprocessor=preprocessor)) == [
        f"model.data_preprocessor.size=[{size[0]},{size[1]}], "
        "model.data_preprocessor.test_cfg.size_divisor=32: expected multiples of 28 "
        "(model.backbone.patch_size=14, divided by the least of model.neck.rescales, 0.5); with "
        "others, predictions lie beside their place towards the right and the bottom. Set "
        "model.data_preprocessor.size=[504,504], model.data_preprocessor.test_cfg.size_divisor=28"
    ]


def test_windows_are_looked_at_where_inference_slides(caplog):
    window = dict(crop_size=(480, 480), stride=(320, 320))
    assert not warnings_of(caplog, build(test_cfg=dict(mode="whole", **window)))
    (said,) = warnings_of(caplog, build(test_cfg=dict(mode="slide", **window)))
    assert said.startswith("model.test_cfg.crop_size=[480,480]: expected multiples of 28")


@pytest.mark.parametrize(
    ("model", "divisor"),
    [
        (lambda cfg: build(data_preprocessor=cfg), 28),
        (lambda cfg: build(neck=None, data_preprocessor=cfg), 14),
        (
            lambda cfg: build(neck=NECK | dict(rescales=[2, 1, 0.5, 0.25]), data_preprocessor=cfg),
            56,
        ),
        (lambda cfg: build(STAGES, None, data_preprocessor=cfg), 13),
    ],
    ids=["half the patches", "patches", "a quarter", "stages"],
)
def test_sizes_that_fit_and_those_of_stages_pass(caplog, model, divisor):
    cfg = PREPROCESSOR | dict(size=None, size_divisor=divisor, test_cfg=None)
    assert not warnings_of(caplog, model(cfg))
