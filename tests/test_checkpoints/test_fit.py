"""Whether a checkpoint fits a model, and what is said where it does not."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from cgspn_seg.checkpoints import (
    CheckpointError,
    load_weights,
    require_complete,
    require_usable,
    state_dict_of,
)


class Head(nn.Module):
    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)


class Segmentor(nn.Module):
    """The parts of a segmentor by the names that MMSegmentation gives them."""

    def __init__(self, channels: int = 4, num_classes: int = 3, auxiliary: bool = True) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels))
        self.decode_head = Head(channels, num_classes)
        if auxiliary:
            self.auxiliary_head = Head(channels, num_classes)


def test_a_fitting_checkpoint_is_loaded_whole() -> None:
    source, target = Segmentor(), Segmentor()
    fit = load_weights(target, source.state_dict())
    assert fit.is_perfect and fit.num_matched == fit.num_tensors == 10
    assert fit.counts == {"backbone": (6, 6), "decode_head": (2, 2), "auxiliary_head": (2, 2)}
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)
    require_complete(fit, "x.pth", for_prediction=False)


def test_ddp_prefix_and_missing_batch_norm_counters_are_no_difference() -> None:
    weights = {f"module.{key}": value for key, value in Segmentor().state_dict().items()}
    del weights["module.backbone.1.num_batches_tracked"]
    assert load_weights(Segmentor(), state_dict_of({"state_dict": weights})).is_perfect


def test_module_versions_reach_the_modules() -> None:
    stored = Segmentor().state_dict()
    assert state_dict_of({"state_dict": stored})._metadata == stored._metadata


def test_other_classes_are_named_with_both_numbers_and_the_rest_is_loaded() -> None:
    source, target = Segmentor(num_classes=11), Segmentor(num_classes=150)
    fit = load_weights(target, source.state_dict())
    assert set(fit.mismatched) == {
        f"{head}.conv_seg.{name}"
        for head in ("decode_head", "auxiliary_head")
        for name in ("weight", "bias")
    }
    assert torch.equal(target.backbone[0].weight, source.backbone[0].weight)
    require_usable(fit, "x.pth")
    with pytest.raises(CheckpointError) as caught:
        require_complete(fit, "x.pth", "camvid_run", for_prediction=True)
    message = str(caught.value)
    assert message.startswith("x.pth (trained as camvid_run) does not fit the model: 6 of the")
    assert "decode_head.conv_seg.bias: expected (150,), got (11,)" in message
    assert "number of classes: 150 in the config, 11 in the file" in message


def test_another_architecture_is_named_with_its_keys() -> None:
    fit = load_weights(Segmentor(channels=4), Segmentor(channels=8).state_dict())
    assert fit.counts["backbone"] == (0, 6)
    with pytest.raises(CheckpointError, match=r"leaves the backbone at its random start"):
        require_usable(fit, "x.pth")
    with pytest.raises(CheckpointError, match=r"another architecture \(`arch`"):
        require_complete(fit, "x.pth", for_prediction=True)


def test_a_bare_backbone_does_not_pass_for_a_model() -> None:
    fit = load_weights(Segmentor(), Segmentor().backbone.state_dict())
    with pytest.raises(CheckpointError, match=r"leaves the model at its random start"):
        require_usable(fit, "x.pth")
    with pytest.raises(CheckpointError) as caught:
        require_complete(fit, "x.pth", for_prediction=True)
    message = str(caught.value)
    assert "The file holds an encoder alone, the model's `backbone`" in message
    assert "model.backbone.init_cfg.checkpoint=x.pth instead of load_from" in message


def test_what_matches_nothing_is_no_encoder() -> None:
    fit = load_weights(Segmentor(), {"layer1.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"Nothing matches: the file holds another model"):
        require_usable(fit, "x.pth")


class Stage2(nn.Module):
    """A distiller, whose adapters stage 1 lacks."""

    def __init__(self, adapters: bool = True) -> None:
        super().__init__()
        self.student = nn.Linear(2, 2)
        if adapters:
            self.adapters = nn.ModuleDict({"mixer": nn.Linear(2, 1)})


def test_a_resumed_checkpoint_of_another_stage_is_one_to_load_from() -> None:
    first, second = Stage2(adapters=False), Stage2()
    for model, other, said in (
        (second, first, r"The file lacks the model's adapters: it is of another training or"),
        (first, second, r"The file has adapters, which the model lacks: it is of another"),
    ):
        fit = load_weights(model, other.state_dict())
        way_out = r"pass --cfg-options load_from=x.pth instead of --resume"
        with pytest.raises(CheckpointError, match=rf"{said}(.|\n)*{way_out}"):
            require_complete(fit, "x.pth", for_prediction=False, resuming=True)
        with pytest.raises(CheckpointError, match=rf"{said}.*Use the config it was trained with"):
            require_complete(fit, "x.pth", for_prediction=False)


def test_missing_adapters_alone_change_nothing() -> None:
    """Other gaps, or other shapes, do."""
    whole = Stage2().state_dict()
    students = {key: value for key, value in whole.items() if key.startswith("student.")}
    for weights, expected in (
        (whole, False),
        (students, True),
        ({"student.weight": torch.ones(2, 2)}, False),
        (students | {"teacher.weight": torch.ones(1)}, False),
        (students | {"adapters.mixer.bias": torch.ones(9)}, False),
    ):
        assert load_weights(Stage2(), weights).is_complete_but_for_adapters is expected


def test_another_patch_size_is_named_with_both_numbers() -> None:
    def encoder(side: int) -> nn.Module:
        embedding = nn.ModuleDict({"projection": nn.Conv2d(3, 4, side)})
        return nn.ModuleDict({"patch_embed": embedding, "norm": nn.LayerNorm(4)})

    fit = load_weights(encoder(4), encoder(2).state_dict())
    with pytest.raises(CheckpointError, match=r"4 pixels .* config, of 2 in the file: set patch_s"):
        require_complete(fit, "x.pth", for_prediction=False)


def test_the_auxiliary_head_is_not_needed_to_predict() -> None:
    with_head, without = Segmentor(), Segmentor(auxiliary=False)
    for model, other in ((with_head, without), (without, with_head)):
        fit = load_weights(model, other.state_dict())
        require_complete(fit, "x.pth", for_prediction=True)
        with pytest.raises(CheckpointError, match=r"2 (missing|unexpected) in the file: auxiliary"):
            require_complete(fit, "x.pth", for_prediction=False)


def test_extra_weights_in_a_part_that_the_model_has_are_refused() -> None:
    """The model would be whole, but not the one that was trained."""
    weights = Segmentor().state_dict() | {"backbone.gate.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"1 unexpected in the file: backbone.gate.weight"):
        require_complete(load_weights(Segmentor(), weights), "x.pth", for_prediction=True)
    weights = Segmentor().state_dict() | {"teacher.weight": torch.ones(1)}
    require_complete(load_weights(Segmentor(), weights), "x.pth", for_prediction=True)


def test_long_lists_are_cut() -> None:
    fit = load_weights(Segmentor(), {"decode_head.conv_seg.bias": torch.zeros(3)})
    assert "9 missing in the file: backbone.0.weight, " in fit.describe()
    assert "… and 5 more" in fit.describe()


class Resizing(nn.Module):
    """Adapts one tensor that it loads, as the encoder does, and has another that it does not."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(size))
        self.head = nn.Linear(1, 1, bias=False)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        key = f"{prefix}pos_embed"
        state_dict[key] = state_dict[key][: len(self.pos_embed)]
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_what_a_module_adapts_while_loading_is_no_mismatch() -> None:
    weights = OrderedDict({"pos_embed": torch.ones(5), "head.weight": torch.ones(1, 1)})
    assert load_weights(Resizing(2), weights).is_perfect


def test_what_a_module_adapts_is_loaded_though_another_tensor_does_not_fit() -> None:
    weights = OrderedDict({"pos_embed": torch.ones(5), "head.weight": torch.ones(3, 1)})
    model = Resizing(2)
    fit = load_weights(model, weights)
    assert fit.mismatched == {"head.weight": ((1, 1), (3, 1))} and not fit.missing
    assert fit.counts == {"pos_embed": (1, 1), "head": (0, 1)}
    assert model.pos_embed.tolist() == [1, 1]


def test_a_file_without_weights_lists_what_it_has() -> None:
    with pytest.raises(CheckpointError, match=r"no weights found.*got the keys model, epoch"):
        state_dict_of({"model": {"w": torch.ones(1)}, "epoch": 3})
