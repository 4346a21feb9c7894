"""The plain encoder: sizes, shapes, budgets, freezing, initialization and refusals."""

import pytest
import torch
from mmseg.registry import MODELS

from cgspn_seg.models import ARCHITECTURES, CGSPN
from cgspn_seg.models.backbones.plain import resize_pos_embed

TINY = dict(embed_dims=16, num_layers=3, num_heads=2, feedforward_channels=32, latent_dims=8)
MIXERS = ["cgspn", "cgspn-lean", "gspn", "gspn2", "attention"]


def build(**options) -> CGSPN:
    return MODELS.build(dict(type="CGSPN", arch=TINY, patch_size=4, img_size=32, **options))


def num_parameters(arch, mixer: str, **options) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in CGSPN(arch=arch, mixer=mixer, **options).parameters())


def test_so400m_with_cgspn_has_15_percent_fewer_parameters_than_with_attention():
    options = dict(patch_size=14, img_size=378)
    attention = num_parameters("so400m", "attention", **options)
    saved = 1 - num_parameters("so400m", "cgspn", **options) / attention
    assert 0.14 <= saved <= 0.16
    # SigLIP's SO400M has 428 million with its pooling head, 413 without.
    assert attention == pytest.approx(413e6, rel=0.005)


@pytest.mark.parametrize(("name", "millions"), [("tiny", 5.5), ("small", 21.7), ("base", 85.8)])
def test_with_attention_the_sizes_are_those_of_the_vits(name, millions):
    count = num_parameters(name, "attention", img_size=224)
    assert count == pytest.approx(millions * 1e6, rel=0.01)  # without the classifier


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_low_rank_core_alone_is_smaller_than_the_gated_mixer(name):
    assert num_parameters(name, "cgspn-lean") < num_parameters(name, "cgspn")


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(
    ("size", "grid"), [((4, 4), (1, 1)), ((32, 32), (8, 8)), ((33, 21), (9, 6)), ((4, 50), (1, 13))]
)
def test_any_size_from_one_patch_up_gives_padded_features(mixer, size, grid):
    model = build(mixer=mixer, out_indices=(0, -1))
    features = model(torch.randn(2, 3, *size))
    assert [f.shape for f in features] == [(2, 16, *grid)] * 2
    sum(f.sum() for f in features).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    # At a single token nothing is propagated, so the coefficients have no gradient path to miss.
    assert not unused


def test_a_list_of_mixers_is_a_hybrid():
    model = build(mixer=["cgspn", dict(type="cgspn", segment_length=2), "attention"])
    assert [type(block.mixer).__name__ for block in model.blocks] == [
        "CGSPNMixer",
        "CGSPNMixer",
        "AttentionMixer",
    ]
    assert model.pos_embed is not None
    assert model(torch.randn(1, 3, 16, 16))[0].shape == (1, 16, 4, 4)


def test_only_attention_has_a_positional_embedding_and_no_local_perception():
    assert build(mixer="cgspn").pos_embed is None
    attention = build(mixer="attention")
    assert attention.pos_embed.shape == (1, 8, 8, 16)
    oblong = CGSPN(arch=TINY, patch_size=4, img_size=(16, 24), mixer="attention")
    assert oblong.pos_embed.shape == (1, 4, 6, 16)
    assert not any("lpu" in name for name, _ in attention.named_parameters())
    assert any("mixer_lpu" in name for name, _ in build(mixer="cgspn").named_parameters())


def test_local_perception_can_be_asked_for_anywhere():
    names = [name for name, _ in build(local_perception=("mlp",)).named_parameters()]
    assert any("mlp_lpu" in n for n in names) and not any("mixer_lpu" in n for n in names)


def test_information_crosses_the_image_with_propagation_and_not_without():
    """The gradient of a corner of the features reaches the far corner of the image."""

    def reach(**options) -> float:
        torch.manual_seed(0)
        model = build(local_perception=(), **options).double()
        image = torch.randn(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
        model(image)[0][0, :, 0, 0].square().sum().backward()
        return image.grad[0, :, -4:, -4:].abs().max().item()

    assert reach(mixer="cgspn") > 0
    assert reach(mixer=dict(type="cgspn", segment_length=1)) == 0


@pytest.mark.parametrize("frozen_stages", [-1, 0, 2])
@pytest.mark.parametrize("mixer", MIXERS)
def test_activation_checkpointing_changes_memory_only(mixer, frozen_stages):
    torch.manual_seed(0)
    plain = build(mixer=mixer, frozen_stages=frozen_stages)
    recomputing = build(mixer=mixer, frozen_stages=frozen_stages, with_cp=True)
    calls = []
    for block in recomputing.blocks:
        block.register_forward_pre_hook(lambda module, _: calls.append(module))
    recomputing.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 16, 24)
    gradients = []
    for model in (plain, recomputing):
        model(image)[0].square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    # Every block that trains runs twice, every other one once.
    assert len(calls) == 3 + 3 - max(frozen_stages, 0)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_drop_path_grows_with_depth_and_acts_in_training_only():
    model = build(drop_path_rate=0.5)
    rates = [block.drop_path for block in model.blocks]
    assert rates == pytest.approx([0, 0.25, 0.5])
    image = torch.randn(8, 3, 8, 8)
    model.train()
    assert not torch.equal(model(image)[0], model(image)[0])
    model.eval()
    assert torch.equal(model(image)[0], model(image)[0])


def test_frozen_stages_keep_their_parameters_and_stay_in_evaluation_mode():
    model = build(frozen_stages=2, drop_path_rate=0.5, mixer="attention").train()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("patch_embed.", "pos_embed", "blocks.0.", "blocks.1."))
    }
    assert [block.training for block in model.blocks] == [False, False, True]
    model(torch.randn(1, 3, 8, 8))[0].sum().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if name in frozen)


def test_layers_are_numbered_from_the_embedding_to_what_follows_the_blocks():
    model = build(mixer="attention", out_norm=True)
    depth = {
        name.split(".")[0]: model.get_layer_depth(f"backbone.{name}", "backbone.")
        for name, _ in model.named_parameters()
        if not name.startswith("blocks")
    }
    assert depth == {"patch_embed": (0, 5), "pos_embed": (0, 5), "out_norms": (4, 5)}
    assert model.get_layer_depth("backbone.blocks.2.norm1.weight", "backbone.") == (3, 5)
    assert model.get_layer_depth("decode_head.conv.weight", "backbone.") == (4, 5)


def test_pretrained_weights_load_and_the_positional_embedding_is_resized(tmp_path):
    source = build(mixer="attention")
    path = tmp_path / "encoder.pth"
    torch.save({"state_dict": source.state_dict()}, path)
    init_cfg = dict(type="Pretrained", checkpoint=str(path))
    target = MODELS.build(
        dict(
            type="CGSPN", arch=TINY, patch_size=4, img_size=48, mixer="attention", init_cfg=init_cfg
        )
    )
    target.init_weights()
    for name, value in source.state_dict().items():
        if name == "pos_embed":
            value = resize_pos_embed(value, (12, 12))
        torch.testing.assert_close(target.state_dict()[name], value)


def test_the_residual_stream_keeps_the_dtype_of_the_parameters_under_autocast():
    model = build()
    streams = []
    model.blocks[1].register_forward_hook(lambda _, args, out: streams.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(1, 3, 16, 16))
    model.bfloat16()(torch.randn(1, 3, 16, 16, dtype=torch.bfloat16))
    assert streams == [torch.float32, torch.bfloat16]


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
def test_compiles_without_graph_breaks(mixer):
    model = build(mixer=mixer).eval()
    image = torch.randn(1, 3, 16, 20)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image)[0], model(image)[0])


def test_an_image_smaller_than_a_patch_is_refused():
    with pytest.raises(ValueError, match="at least one patch, 4 x 4; got 3 x 9"):
        build()(torch.randn(1, 3, 3, 9))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(arch="smal"), ValueError, "did you mean 'small'"),
        (dict(arch=dict(TINY, embed_dim=3)), ValueError, "'embed_dim'.*did you mean 'embed_dims'"),
        (dict(arch={"embed_dims": 8}), ValueError, "arch lacks.*num_layers"),
        (dict(arch=dict(TINY, num_layers=0)), ValueError, "positive integer; got 0"),
        (dict(mixer="cgpsn"), ValueError, "did you mean 'cgspn'"),
        (dict(mixer=["cgspn"] * 2), ValueError, "a list of 3, one per layer; got 2"),
        (dict(mixer=dict(type="cgspn", segments=1)), TypeError, "no option 'segments'"),
        (dict(mixer=dict(type="cgspn", weight_groups=3)), ValueError, "must divide the 8 latent"),
        (dict(mixer=dict(type="cgspn", directions=["north"])), ValueError, "'north'"),
        (dict(mixr="cgspn"), TypeError, "no argument 'mixr'.*did you mean 'mixer'"),
        (dict(out_indices=(3,)), ValueError, "between -3 and 2 for 3 layers; got 3"),
        (dict(out_indices=(2, -1)), ValueError, "must not repeat"),
        (dict(frozen_stages=4), ValueError, "between -1 and the 3 layers; got 4"),
        (dict(local_perception=("attn",)), ValueError, "subset of .*'attn'"),
        (dict(local_perception="mixer"), ValueError, "subset of .*got 'mixer'"),
        (dict(drop_path_rate=1.0), ValueError, r"must be in \[0, 1\); got 1.0"),
        (dict(patch_size=0), ValueError, "patch_size must be a positive integer; got 0"),
        (dict(out_indices=()), ValueError, r"a sequence of indices of layers; got \(\)"),
        (dict(out_indices=2), ValueError, "a sequence of indices of layers; got 2"),
        (dict(frozen_stages="1"), ValueError, "got '1'"),
        (dict(mixer=dict(type="cgspn", segment_length=0)), ValueError, "segment_length must be"),
        (dict(mixer=dict(type="cgspn", latent_dims=0)), ValueError, "latent_dims must be"),
        (dict(mixer=dict(type="cgspn", directions=["up", "up"])), ValueError, "not repeat"),
        (dict(mixer=dict(type="cgspn", directions=[])), ValueError, "got none"),
        (dict(mixer=dict(type="cgspn-lean", gated=True)), TypeError, "no option 'gated'"),
        (dict(arch=dict(TINY, num_heads=3), mixer="attention"), ValueError, "must divide"),
    ],
)
def test_refuses(options, error, message):
    with pytest.raises(error, match=message):
        CGSPN(**{"arch": TINY, "patch_size": 4, **options})
