"""The C-GSPN mixer equals its equations, and propagates what it should."""

import pytest
import torch
from torch.nn import functional as F

from cgspn_seg.models.arch import Architecture
from cgspn_seg.models.mixers import CGSPNLeanMixer, CGSPNMixer
from cgspn_seg.ops import line_scan_reference

ARCH = Architecture(24, 1, 2, 48, 8)


@pytest.mark.parametrize("options", [{}, dict(weight_groups=1), dict(segment_length=2)])
@pytest.mark.parametrize("directions", [("down", "up", "right", "left"), ("left",)])
def test_equals_the_equations(options, directions):
    torch.manual_seed(0)
    mixer = CGSPNMixer(ARCH, directions=directions, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.3)
    x = torch.randn(2, 5, 4, 24, dtype=torch.float64)
    d, latent = len(directions), 8
    groups = options.get("weight_groups", latent)

    latent_and_gate = mixer.in_proj(x)
    z, gate = latent_and_gate[..., :latent], latent_and_gate[..., latent:]
    coefficients = mixer.coefficients(z)
    logits = coefficients[..., : 3 * d * groups].reshape(2, 5, 4, d, 3, groups)
    gates = coefficients[..., 3 * d * groups :].reshape(2, 5, 4, 2, d, latent)
    h = line_scan_reference(
        z,
        logits,
        gates[..., 0, :, :],
        directions=directions,
        segment_length=options.get("segment_length"),
    )
    normed = F.layer_norm(h, (latent,), mixer.state_norm.weight, mixer.state_norm.bias)
    y = mixer.up((gates[..., 1, :, :] * normed).sum(3))
    expected = mixer.out(y * F.silu(gate))
    torch.testing.assert_close(mixer(x), expected)


def test_the_gates_start_open_and_the_logits_at_zero():
    mixer = CGSPNMixer(ARCH)
    bias = mixer.coefficients.bias
    assert (bias[: 4 * 3 * 8] == 0).all() and (bias[4 * 3 * 8 :] == 1).all()


def test_lean_is_the_low_rank_core_alone_and_takes_the_same_options():
    lean = CGSPNLeanMixer(ARCH, latent_dims=4, segment_length=1)
    assert lean.in_proj.out_features == 4 and lean.segment_length == 1
    assert {name.split(".")[0] for name, _ in lean.named_parameters()} == {
        "in_proj",
        "coefficients",
        "state_norm",
        "up",
    }
    x = torch.randn(1, 3, 3, 24)
    assert lean(x).shape == x.shape


def test_a_token_reaches_every_other_one():
    mixer = CGSPNMixer(ARCH).double()
    x = torch.randn(1, 4, 5, 24, dtype=torch.float64, requires_grad=True)
    for row in range(4):
        for col in range(5):
            (gradient,) = torch.autograd.grad(mixer(x)[0, row, col].sum(), x)
            assert (gradient.abs().sum(-1) > 0).sum() >= 12  # the cones of the four directions


def test_nothing_is_propagated_with_segments_of_one_line():
    mixer = CGSPNMixer(ARCH, segment_length=1).double()
    x = torch.randn(1, 4, 5, 24, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x)[0, 2, 2].sum(), x)
    gradient[0, 2, 2] = 0
    assert not gradient.any()
