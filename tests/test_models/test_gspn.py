"""The mixers of GSPN and GSPN-2 equal their equations, and propagate what they should."""

import pytest
import torch
from torch import Tensor, nn

from cgspn_seg.models import CGSPN
from cgspn_seg.models.arch import Architecture
from cgspn_seg.models.mixers import GSPN2Mixer, GSPNMixer, gspn
from cgspn_seg.ops import line_scan
from tests.test_models import transcription

ARCH = Architecture(8, 1, 2, 16, 4)
EQUATIONS = {GSPNMixer: transcription.gspn, GSPN2Mixer: transcription.gspn2}
MIXERS = list(EQUATIONS)


def build(cls: type, **options) -> nn.Module:
    """A mixer in float64 whose parameters are all at work."""
    torch.manual_seed(0)
    mixer = cls(ARCH, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.4)
    return mixer


def tokens(height: int, width: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, height, width, 8, dtype=torch.float64, requires_grad=True)


def assert_equal_with_derivatives(mixer: nn.Module, x: Tensor) -> None:
    leaves = [x, *mixer.parameters()]
    outputs = mixer(x), EQUATIONS[type(mixer)](mixer, x)
    torch.testing.assert_close(*outputs)
    gradient = torch.randn_like(x)
    got, expected = (torch.autograd.grad(out, leaves, gradient) for out in outputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().sum() > 0


@pytest.mark.parametrize("size", [(4, 4), (5, 3), (2, 7)], ids=str)
@pytest.mark.parametrize("segment_length", [None, 2, 3])
@pytest.mark.parametrize("cls", MIXERS)
def test_equals_the_equations(cls, segment_length, size):
    assert_equal_with_derivatives(build(cls, segment_length=segment_length), tokens(*size))


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (GSPNMixer, dict(directions=("left", "down"), proxy_dims=3)),
        (GSPN2Mixer, dict(directions=("left", "down"), proxy_dims=3)),
        (GSPN2Mixer, dict(state_norm=False)),
    ],
)
def test_equals_the_equations_with_other_options(cls, options):
    assert_equal_with_derivatives(build(cls, **options), tokens(3, 4))


def test_channels_that_are_added_for_the_gpu_change_nothing(monkeypatch):
    monkeypatch.setattr(gspn, "channels_to_add", lambda x: 4)
    assert_equal_with_derivatives(build(GSPNMixer, segment_length=2), tokens(5, 3))
    assert_equal_with_derivatives(build(GSPNMixer, compat="gspn-v1"), tokens(4, 4))


def test_channels_are_added_so_that_pixels_are_whole_slices_apart(monkeypatch):
    strides = []

    def scan(x: Tensor, *coefficients: Tensor, **options: object) -> Tensor:
        strides.extend(s for t in (x, *coefficients) for s in t.stride()[:-1])
        return line_scan(x, *coefficients, **options)

    monkeypatch.setattr(gspn, "channels_to_add", lambda x: -x.shape[-1] % 32)
    monkeypatch.setattr(gspn, "line_scan", scan)
    mixer = GSPNMixer(Architecture(6, 1, 2, 16, 4))
    assert mixer(tokens(5, 3)[..., :6].detach().float()).shape == (2, 5, 3, 6)
    assert strides
    assert all(stride % 32 == 0 for stride in strides)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_with_added_channels_computes_the_same():
    mixer = GSPNMixer(Architecture(6, 1, 2, 16, 4), segment_length=2)
    x = tokens(5, 3)[..., :6].detach().float()
    assert gspn.channels_to_add(torch.empty(1, 1, 1, 9, device="cuda")) == 23
    torch.testing.assert_close(mixer.cuda()(x.cuda()).cpu(), mixer.cpu()(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("segment_length", [None, 2])
def test_compat_turns_the_image_alone(segment_length):
    options = dict(compat="gspn-v1", segment_length=segment_length)
    assert_equal_with_derivatives(build(GSPNMixer, **options), tokens(5, 5))


@pytest.mark.parametrize("directions", [("right",), ("left",), ("down",), ("up",)])
def test_compat_is_the_same_function_only_for_the_direction_that_needs_no_turning(directions):
    mixer, x = build(GSPNMixer, directions=directions), tokens(4, 4)
    correct = mixer(x)
    mixer.compat = "gspn-v1"
    assert torch.allclose(mixer(x), correct) == (directions == ("right",))


def test_compat_refuses_what_the_original_could_not_do():
    with pytest.raises(ValueError, match=r"square feature maps.*got 3 x 4\. Train on square"):
        build(GSPNMixer, compat="gspn-v1")(tokens(3, 4))


def reach(mixer: nn.Module, size: tuple[int, int], pixel: tuple[int, int]) -> Tensor:
    """The pixels whose values a pixel of the result depends on, (H, W)."""
    x = tokens(*size)
    (gradient,) = torch.autograd.grad(mixer(x)[0, pixel[0], pixel[1]].sum(), x)
    return gradient[0].abs().sum(-1) > 0


def scan_alone(mixer: nn.Module) -> nn.Module:
    """Without what else reaches other pixels: GSPN's filter, but for its centre, and its GRN."""
    if isinstance(mixer, GSPNMixer):
        with torch.no_grad():
            mixer.grn.weight.zero_()
            centre = mixer.conv.weight[:, :, 3, 3].clone()
            mixer.conv.weight.zero_()[:, :, 3, 3] = centre
    return mixer


@pytest.mark.parametrize("size", [(1, 9), (20, 23), (33, 8)], ids=str)
@pytest.mark.parametrize("cls", MIXERS)
def test_global_is_the_whole_image_at_any_size(cls, size):
    mixer = scan_alone(build(cls))
    corners = reach(mixer, size, (0, 0))
    last = (size[0] - 1, size[1] - 1)
    assert corners[0, last[1]] and corners[last[0], 0]
    centre = reach(mixer, size, (size[0] // 2, size[1] // 2))
    assert centre[size[0] // 2].all() and centre[:, size[1] // 2].all()


@pytest.mark.parametrize("cls", MIXERS)
def test_local_propagates_within_segments(cls):
    mixer = scan_alone(build(cls, segment_length=2))
    reached = reach(mixer, (8, 10), (3, 5))
    # Rows and columns are paired from 0 on, whichever side an even number of them is counted from.
    assert {tuple(pixel) for pixel in reached.nonzero().tolist()} == {
        (2, 4), (2, 5), (2, 6), (3, 4), (3, 5), (4, 4)
    }  # fmt: skip


@pytest.mark.parametrize("name", ["gspn", "gspn2"])
def test_a_plain_encoder_takes_them_per_layer(name):
    arch = Architecture(16, 3, 2, 32, 8)
    mixers = [name, dict(type=name, segment_length=2, proxy_dims=2), "attention"]
    model = CGSPN(arch, patch_size=4, img_size=16, mixer=mixers)
    places = [(b.mixer_lpu is not None, b.mlp_lpu is not None) for b in model.blocks]
    assert places == [(name == "gspn2",) * 2] * 2 + [(False, False)]
    (features,) = model(torch.randn(2, 3, 18, 13))
    assert features.shape == (2, 16, 5, 4)
    features.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_norm_after_the_scan_sees_more_than_its_eps_at_the_start():
    model = CGSPN(Architecture(96, 2, 3, 384, 8), patch_size=4, mixer="gspn")
    variances = []
    for block in model.blocks:
        block.mixer.norm.register_forward_pre_hook(
            lambda _, args: variances.append(args[0].var(-1).median().item())
        )
    model(torch.randn(1, 3, 32, 32))
    assert min(variances) > 1e-5


def test_the_merge_starts_as_the_mean():
    torch.testing.assert_close(GSPNMixer(ARCH).merge.data, torch.full((4,), 0.25))


@pytest.mark.parametrize("cls", MIXERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(cls, dtype):
    mixer = build(cls).float()
    x = tokens(6, 5).detach().float()
    expected = mixer(x)
    with torch.autocast("cpu", dtype):
        autocast = mixer(x)
    half = mixer.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    for result in (autocast, half):
        error = (result.float() - expected).norm() / expected.norm()
        assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (GSPNMixer, dict(proxy_dims=0), "proxy_dims must be a positive integer; got 0"),
        (GSPNMixer, dict(segment_length=0), "segment_length must be a positive integer; got 0"),
        (GSPNMixer, dict(directions=("north",)), "'north'"),
        (GSPNMixer, dict(compat="gspn_v1"), "did you mean 'gspn-v1'"),
        (GSPN2Mixer, dict(proxy_dims=0), "positive integer; got 0"),
        (GSPN2Mixer, dict(segment_length=-1), "segment_length must be a positive integer; got -1"),
    ],
)
def test_refuses(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(ARCH, **options)


def test_channels_that_have_no_half_are_refused():
    with pytest.raises(ValueError, match=r"must be even.*got 9"):
        GSPNMixer(Architecture(9, 1, 1, 16, 4))
