"""Weights of GSPN's original code compute here what they compute there."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cgspn_seg.checkpoints import CheckpointError, load_weights, protect_checkpoint_loading
from cgspn_seg.checkpoints.gspn_v1 import choose_arch, convert_gspn_v1, read_gspn_v1
from cgspn_seg.models import GSPN, GSPN_ARCHITECTURES, HierarchicalArchitecture
from tests.test_checkpoints.gspn_v1_files import DEEP, random_weights, save, shapes
from tests.test_models import transcription


def build(arch: str | HierarchicalArchitecture, compat: str | None = "gspn-v1") -> GSPN:
    torch.manual_seed(1)
    return GSPN(arch, mixer_options=dict(compat=compat))


def converted(weights: dict, arch: HierarchicalArchitecture, compat: str | None) -> GSPN:
    encoder = build(arch, compat).double()
    conversion = convert_gspn_v1(weights, encoder, "ckpt.pth")
    assert load_weights(encoder, conversion.tensors).is_perfect
    return encoder.eval()


@pytest.mark.parametrize("global_stages", [(2, 3), (3,)])
def test_an_encoder_computes_what_the_original_does(global_stages):
    """At the original's 224 pixels, of all stages."""
    arch = replace(DEEP, global_stages=global_stages)
    weights = random_weights(arch, torch.float64)
    image = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        got = converted(weights, arch, "gspn-v1")(image)
        corrected = converted(weights, arch, None)(image)
        expected = transcription.gspn_v1(weights, image, arch.depths, global_stages)
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        if i < 3:  # the norm that is ours alone, as it starts
            theirs = F.layer_norm(theirs.permute(0, 2, 3, 1), (8 * 2**i,)).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        assert (corrected[i] - theirs).abs().mean() > 0.05


@pytest.mark.parametrize("name", GSPN_ARCHITECTURES)
def test_every_key_of_the_released_sizes_is_accounted_for(name):
    arch = GSPN_ARCHITECTURES[name]
    with torch.device("meta"):
        encoder = build(name)
        weights = {key: torch.empty(shape) for key, shape in shapes(arch).items()}
    assert choose_arch(weights, GSPN_ARCHITECTURES, "ckpt.pth") == name
    conversion = convert_gspn_v1(weights, encoder, "ckpt.pth")
    used = [key for origins in conversion.sources.values() for key in origins]
    assert sorted([*used, *conversion.unused]) == sorted(weights)
    assert conversion.unused == ("classifier.head.weight", "classifier.head.bias")
    assert {k: v.shape for k, v in conversion.tensors.items()} == {
        k: v.shape for k, v in encoder.state_dict().items()
    }
    missing = {key for key, origins in conversion.sources.items() if not origins}
    assert missing == {f"out_norms.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")}
    rows = list(conversion.rows())
    assert sum(number for _, _, number, _ in rows) == len(conversion.tensors) + 2
    assert (
        "converted",
        "stages.*.*.mixer.merge",
        sum(arch.depths),
        "layers.*.blocks.*.op.m_conv.weight",
    ) in rows


def test_products_may_be_1x1_convolutions():
    weights = random_weights(DEEP, torch.float32)
    encoder = build(DEEP)
    expected = convert_gspn_v1(weights, encoder, "ckpt.pth").tensors
    for key, value in weights.items():
        if value.ndim == 2:
            weights[key] = value[:, :, None, None]
    for key, value in convert_gspn_v1(weights, encoder, "ckpt.pth").tensors.items():
        assert torch.equal(value, expected[key])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(take="layers.2.blocks.14.op.m_conv.weight"),
            "1 missing in the file: layers.2.blocks.14.op.m_conv.weight",
        ),
        (dict(take="classifier.norm.bias"), "missing in the file: classifier.norm.bias"),
        (dict(add="pos_embed"), "1 unexpected in the file: pos_embed"),
        (dict(add="layers.2.blocks.15.norm.weight"), "unexpected in the file: layers.2.blocks.15"),
        (
            dict(add="layers.0.blocks.0.op.in_proj.bias"),
            "unexpected in the file: .*op.in_proj.bias",
        ),
        (
            dict(add="layers.0.blocks.0.op.w_conv_up.weight"),
            r"layers.0.blocks.0.op.w_conv_up.weight: expected \(144, 3\), got \(2, 2\)",
        ),
        (dict(add="patch_embed.5.weight"), r"expected \(8, 4, 3, 3\), got \(2, 2\)"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_what_does_not_correspond_is_named(change, message):
    weights = random_weights(DEEP, torch.float32)
    if "take" in change:
        del weights[change["take"]]
    else:
        weights[change["add"]] = torch.ones(2, 2)
    with pytest.raises(CheckpointError, match=rf"(?s)ckpt.pth does not fit .*{message}"):
        convert_gspn_v1(weights, build(DEEP), "ckpt.pth")


def test_sizes_that_are_not_known_are_refused():
    weights = {"patch_embed.7.weight": torch.ones(64)}
    with pytest.raises(CheckpointError, match="has 64 channels; known are tiny 96, small 108"):
        choose_arch(weights, GSPN_ARCHITECTURES, "ckpt.pth")
    with pytest.raises(CheckpointError, match=r"ckpt.pth: not a checkpoint .* begins with norm"):
        choose_arch({"norm": torch.ones(64)}, GSPN_ARCHITECTURES, "ckpt.pth")


def test_the_originals_files_are_read_as_data(tmp_path: Path):
    """Their settings are of a class that need not be installed, and runs nothing."""
    protect_checkpoint_loading()
    trained, averaged = {"a": torch.zeros(2)}, {"a": torch.ones(2)}
    save(tmp_path / "both.pth", trained, averaged)
    save(tmp_path / "one.pth", trained, None)
    torch.save(trained, tmp_path / "bare.pth")
    for name, ema, value, taken in (
        ("both.pth", True, 1, "model_ema (EMA)"),
        ("both.pth", False, 0, "model (as trained)"),
        ("one.pth", True, 0, "model (as trained)"),
        ("bare.pth", True, 0, "the file's only weights"),
    ):
        weights, said = read_gspn_v1(str(tmp_path / name), ema=ema)
        assert (weights["a"].tolist(), said) == ([value] * 2, taken)
    torch.save(dict(model=trained, config=Path("x")), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="refused"):
        read_gspn_v1(str(tmp_path / "other.pth"))
