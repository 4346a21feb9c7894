"""A student's start: with the teacher's attention it computes the teacher's features."""

import pytest
import torch
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from cgspn_seg.checkpoints import CheckpointError
from cgspn_seg.models import CGSPN
from cgspn_seg.models.distillation import (
    EncoderTeacher,
    Teacher,
    TimmTeacher,
    TransformersTeacher,
    student_config,
    warm_start,
)
from cgspn_seg.models.distillation.patch_kernel import fold_normalization, resize_patch_kernel
from cgspn_seg.models.distillation.teacher_parts import gelu_kind
from cgspn_seg.models.distillation.warm_start_report import group_keys
from cgspn_seg.models.mixers import AttentionMixer

from .teachers import (
    ENCODER,
    FAMILIES,
    SIZES,
    TIMM,
    TIMM_OPTIONS,
    WIDTHS,
    library,
    normalized,
    picture,
    random_weights,
)

OURS = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
ROTARY = ("dinov3", "timm-dinov3")
EVERY_BLOCK = (0, 1, 2)
CLOSE = dict(rtol=1e-8, atol=1e-8)


def student_of(teacher: Teacher, mixer: object = "cgspn", **options: object) -> CGSPN:
    config = student_config(teacher, mixer) | dict(out_indices=EVERY_BLOCK) | options
    return MODELS.build(config).double().eval()


class TeachersAttention(nn.Module):
    """The teacher's own attention as a mixer, its class and register tokens beside ours.

    These tokens, and positions, are what the teacher's attention was called with on the image.
    """

    def __init__(self, teacher: Teacher, index: int, image: Tensor) -> None:
        super().__init__()
        name = teacher.family.proj.rpartition(".")[0]
        attention = teacher.find(name, index)
        calls = []
        handle = attention.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, dict(kwargs))), with_kwargs=True
        )
        teacher(image, [index])
        handle.remove()
        (self.args, self.kwargs), self.count = calls[0], teacher.num_prefix_tokens
        tokens = self.args[0] if self.args else self.kwargs.pop("hidden_states")
        self.prefix, self.args = tokens[:, : self.count], self.args[1:]
        self.attention = attention
        self.scale = teacher.find(teacher.family.attention_scale, index)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.attention, AttentionMixer):
            return self.attention(x)  # of images, not of tokens
        tokens = torch.cat([self.prefix, x.flatten(1, 2)], dim=1)
        y = self.attention(tokens, *self.args, **self.kwargs)
        y = y[0] if isinstance(y, tuple) else y
        y = y if self.scale is None else y * self.scale
        return y[:, self.count :].unflatten(1, x.shape[1:3])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_teachers_attention_a_student_computes_its_features(teacher_of, family, size):
    teacher, pixels = teacher_of(family), picture(size)
    image = normalized(pixels, teacher.mean, teacher.std)
    # Attention asks for a positional embedding; teachers that rotate have none.
    mixer = "cgspn" if family in ROTARY else "attention"
    student = student_of(teacher, mixer, img_size=size, local_perception=("mixer",))
    warm_start(student, teacher)
    for index, block in enumerate(student.blocks):
        block.mixer = TeachersAttention(teacher, index, image)
    with torch.no_grad():
        features = student(normalized(pixels, *OURS))
    for feature, tap in zip(features, teacher(image), strict=True):
        torch.testing.assert_close(feature.permute(0, 2, 3, 1), tap.output, **CLOSE)
        assert tap.output.std() > 0.1


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", ["siglip", "siglip2-naflex", "timm-siglip", "encoder"])
def test_without_class_tokens_an_attention_student_is_the_teacher(teacher_of, family, size):
    teacher, pixels = teacher_of(family), picture(size)
    student = student_of(teacher, "attention", img_size=size)
    report = warm_start(student, teacher)
    assert report.fraction == 1 and not report.missing and not report.mismatched
    assert ("pos_embed" in report.resized) == (size != SIZES[0])
    taps = teacher(normalized(pixels, teacher.mean, teacher.std))
    for feature, tap in zip(student(normalized(pixels, *OURS)), taps, strict=True):
        torch.testing.assert_close(feature.permute(0, 2, 3, 1), tap.output, **CLOSE)


@pytest.mark.parametrize("family", ["dinov2-registers", "timm-deit"])
def test_layer_scale_becomes_part_of_an_attention_students_products(teacher_of, family):
    """With class tokens left out of the teacher's attention, by hand."""
    teacher = teacher_of(family)
    student = student_of(teacher, "attention")
    warm_start(student, teacher)
    x = torch.randn(1, 2, 3, 32, dtype=torch.float64)
    attention = TeachersAttention(teacher, 1, torch.zeros(1, 3, 8, 12, dtype=torch.float64))
    attention.prefix, attention.count = attention.prefix[:, :0], 0
    torch.testing.assert_close(student.blocks[1].mixer(x), attention(x), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_filled_and_what_is_not_is_all_accounted_for(teacher_of, family):
    teacher = teacher_of(family)
    student = student_of(teacher)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    report = warm_start(student, teacher, mean=teacher.mean, std=teacher.std)
    own = student.state_dict()
    assert {*report.matched, *report.missing} == set(own) and not report.resized
    assert report.fraction == 1 and report.expected == 2 + 3 * 8
    # Mixers as initialized, to the bit; local perception units add nothing.
    for key, remark in report.missing.items():
        if ".mixer_lpu." in key:
            assert remark == "0: adds nothing at first" and not own[key].any()
        else:
            assert ".mixer." in key and remark == "as initialized"
            assert torch.equal(own[key], before[key])
    assert not any(torch.equal(own[key], before[key]) for key in report.matched)
    torch.testing.assert_close(own["patch_embed.projection.weight"], teacher.patch_kernel()[0])
    # Neither lost nor invented: used and unused are all of the teacher's.
    names = {key.rpartition(".")[0] or key for key in report.unused}
    attention = teacher.family.proj.rpartition(".")[0]
    assert any(attention in name for name in names)
    assert set(teacher.family.prefix_tokens) & set(teacher.model.state_dict()) <= set(report.unused)
    assert not any("norm2" in name or "layernorm_after" in name for name in names)
    text = report.describe()
    assert text.startswith("26 of 26 tensors are from the teacher\n")
    assert "matched: blocks.*.mlp.fc1.weight (3)" in text


def test_an_earlier_student_gives_its_mixers_too():
    teacher = EncoderTeacher(ENCODER | dict(mixer="cgspn"))
    random_weights(teacher.model)
    student = MODELS.build(ENCODER | dict(mixer="cgspn"))
    report = warm_start(student, teacher)
    assert not report.missing and not report.unused and report.fraction == 1
    for key, value in student.state_dict().items():
        assert torch.equal(value, teacher.model.state_dict()[key]), key
    hybrid = MODELS.build(ENCODER | dict(mixer=["cgspn", "cgspn-lean", "attention"]))
    report = warm_start(hybrid, teacher, min_match=0.5)
    assert {key.split(".")[1] for key in report.missing if ".mixer." in key} == {"1", "2"}
    assert "attention is not copied: the teacher has none" in report.notes


def test_patches_of_another_size_are_resized(teacher_of):
    teacher = teacher_of("encoder")
    config = student_config(teacher, "cgspn", patch_size=6)
    assert config["patch_size"] == 6 and config["img_size"] == [24, 24]
    student = MODELS.build(config).double()
    report = warm_start(student, teacher, mean=teacher.mean, std=teacher.std)
    assert report.resized == {
        "patch_embed.projection.weight": "4 to 6 pixels a side (pseudo-inverse)"
    }
    patches = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    larger = F.interpolate(patches, size=(6, 6), mode="bilinear")
    weight, bias = teacher.patch_kernel()
    torch.testing.assert_close(
        student.patch_embed(larger)[0][:, 0], F.conv2d(patches, weight, bias).flatten(1), **CLOSE
    )


def test_smaller_patches_get_the_nearest_embedding():
    """The pseudo-inverse is the least-squares solution, better than resizing the weight."""
    weight = torch.randn(7, 3, 8, 8, dtype=torch.float64)
    resized = resize_patch_kernel(weight, 4)
    assert resized.shape == (7, 3, 4, 4) and resize_patch_kernel(weight, 8) is weight
    x = torch.eye(64, dtype=torch.float64).view(-1, 1, 8, 8)
    smaller = F.interpolate(x, size=(4, 4), mode="bilinear", antialias=True)

    def error(kernel: Tensor) -> float:
        wanted = weight.flatten(2) @ x.flatten(1).T
        return float((kernel.flatten(2) @ smaller.flatten(1).T - wanted).square().sum())

    naive = F.interpolate(weight, size=(4, 4), mode="bilinear", antialias=True) * 4
    assert error(resized) < error(naive)
    for _ in range(5):
        assert error(resized) < error(resized + 0.01 * torch.randn_like(resized))


def test_normalization_is_folded_exactly():
    weight, bias = torch.randn(7, 3, 4, 4).double(), torch.randn(7).double()
    theirs, pixels = ((10.0, 20.0, 30.0), (50.0, 60.0, 70.0)), picture((8, 12))
    folded = fold_normalization(weight, bias, theirs, OURS)
    torch.testing.assert_close(
        F.conv2d(normalized(pixels, *OURS), *folded, stride=4),
        F.conv2d(normalized(pixels, *theirs), weight, bias, stride=4),
        **CLOSE,
    )
    same = fold_normalization(weight, bias, OURS, OURS)
    assert torch.equal(same[0], weight) and torch.equal(same[1], bias)
    with pytest.raises(ValueError, match=r"std: expected a value for each of 3 channels, got \[1"):
        fold_normalization(weight, bias, OURS, (OURS[0], (1.0,)))


@pytest.mark.parametrize(
    ("channels", "latent"), [(192, 32), (384, 32), (768, 48), (1024, 64), (1152, 64)]
)
def test_the_derived_sizes_are_those_of_our_encoders(channels, latent):
    from cgspn_seg.models import ARCHITECTURES

    named = {arch.embed_dims: arch for arch in ARCHITECTURES.values()}[channels]
    arch = vars(named) | dict(num_layers=1)
    teacher = EncoderTeacher(ENCODER | dict(arch=arch, patch_size=16))
    config = student_config(teacher)
    assert config["arch"] == arch and arch["latent_dims"] == latent
    assert config["gelu"] == "tanh" and config["mixer"] == "cgspn"
    MODELS.build(config)


def test_gelus_are_told_apart_by_what_they_compute():
    assert gelu_kind(nn.GELU()) == "none" and gelu_kind(nn.GELU("tanh")) == "tanh"
    assert gelu_kind(nn.SiLU()) is None and gelu_kind(nn.ReLU()) is None


def refuses(student: CGSPN, teacher: Teacher, kind: type, match: str, **options) -> None:
    """Check that a start is refused and the student is as it was."""
    before = {key: value.clone() for key, value in student.state_dict().items()}
    with pytest.raises(kind, match=match):
        warm_start(student, teacher, **options)
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())


def test_what_does_not_fit_is_refused_and_nothing_changed(teacher_of):
    teacher = teacher_of("encoder")
    arch = ENCODER["arch"]

    def build(**changes: object) -> CGSPN:
        return MODELS.build(ENCODER | changes)

    wide, deep = arch | dict(embed_dims=48), arch | dict(num_layers=4)
    refuses(build(arch=wide), teacher, ValueError, r"has 48 channels .*, the teacher 32; a warm")
    refuses(build(arch=deep), teacher, ValueError, r"has 4 blocks \(arch.num_layers\), the teac")
    refuses(build(in_channels=1), teacher, ValueError, r"has 1 channels of an image")
    refuses(build(gelu="none"), teacher, ValueError, r"its GELU is gelu='tanh', the student's ge")
    slim = build(arch=arch | dict(feedforward_channels=40))
    match = r"would fill 30 of the 39 tensors it should \(77%, at least 90% wanted\)"
    match += r".*arch.feedforward_channels=48; (.|\n)*"
    match += r"mismatched: blocks.\*.mlp.fc1.weight \(3\): student \(40, 32\), teacher \(48, 32\)"
    refuses(slim, teacher, CheckpointError, match)
    assert warm_start(slim, teacher, min_match=0.7).num_filled == 30
    heads = build(arch=arch | dict(num_heads=4))
    refuses(heads, teacher, CheckpointError, r"the teacher's has 2 heads, the student's 4")
    no_bias = build(mixer=dict(type="attention", qkv_bias=False))
    refuses(no_bias, teacher, CheckpointError, r"has biases, the student's qkv_bias=False")
    other_eps = build(norm_eps=1e-5)
    assert "norms: the teacher's eps is 1e-06, the student's 1e-05" in (
        warm_start(other_eps, teacher).notes
    )


def test_attention_of_ours_does_not_rotate(teacher_of):
    teacher = teacher_of("dinov3")
    student = student_of(teacher, "attention")
    refuses(student, teacher, CheckpointError, r"rotates queries and keys by their positions")
    report = warm_start(student, teacher, min_match=0.6)
    assert "pos_embed" in report.missing and "blocks.0.mixer.qkv.weight" in report.missing


@pytest.mark.parametrize("kind", ["dinov2", "dinov3_vit"])
def test_gated_mlps_of_transformers_are_refused(kind):
    library("transformers")
    gated = dict(use_swiglu_ffn=True) if kind == "dinov2" else dict(use_gated_mlp=True)
    teacher = TransformersTeacher(config=dict(model_type=kind, image_size=16, **WIDTHS, **gated))
    student = MODELS.build(ENCODER | dict(arch=ENCODER["arch"]))
    refuses(student, teacher, ValueError, r"the MLP of block 0 is gated \(SwiGLU\)")
    with pytest.raises(ValueError, match=r"is gated"):
        student_config(teacher)
    assert len(teacher(torch.zeros(1, 3, 16, 16))) == 3, "its taps can be learned from"


def test_parts_of_timm_that_students_lack_are_refused():
    library("timm")
    student = MODELS.build(ENCODER | dict(gelu="none"))
    gated = r"the MLP of block 0 is gated \(SwiGLU\) or has a norm inside"
    for name, options, match in (
        (TIMM["timm-vit"], dict(pre_norm=True), r"has a norm before its first block \(norm_pre\)"),
        (TIMM["timm-vit"], dict(scale_mlp_norm=True), gated),
        ("vit_giant_patch14_dinov2", {}, gated),  # gate and value in one product
        ("eva02_tiny_patch14_224", dict(scale_mlp=True), gated),  # in two
    ):
        teacher = TimmTeacher(name, **(TIMM_OPTIONS | dict(mlp_ratio=1.5) | options))
        refuses(student, teacher, ValueError, match)
        assert len(teacher(torch.zeros(1, 3, 16, 16))) == 3
    teacher = TimmTeacher(TIMM["timm-vit"], **TIMM_OPTIONS, mlp_ratio=1.5, qk_norm=True)
    refuses(student, teacher, CheckpointError, r"than softmax attention has \(attn.q_norm\)")


def test_quick_gelu_is_refused():
    library("transformers")
    config = dict(model_type="vit", image_size=16, intermediate_size=48, **WIDTHS)
    teacher = TransformersTeacher(config=config | dict(hidden_act="quick_gelu"))
    refuses(MODELS.build(ENCODER), teacher, ValueError, r"QuickGELU\w*, which is neither the exac")


def test_keys_are_grouped_by_layers():
    keys = ["blocks.0.norm1.weight", "blocks.11.norm1.weight", "pos_embed", "model.layer.3.a.b.1"]
    assert group_keys(keys) == {
        "blocks.*.norm1.weight": keys[:2],
        "pos_embed": ["pos_embed"],
        "model.layer.*.a.b.1": keys[3:],
    }
