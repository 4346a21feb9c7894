"""The encoder with fused kernels does what it does without."""

import os

import pytest
import torch
from torch import nn

from cgspn_seg.models import CGSPN, GSPN, GSPN2, Architecture
from cgspn_seg.ops import fused

if not torch.cuda.is_available():
    # Set before the kernels are imported: Triton then runs them in Python, on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [
    pytest.mark.skipif(not fused.has_triton(), reason="Triton is not installed"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]

ARCH = Architecture(32, 4, 4, 64, 8)
MIXERS = ["cgspn", "cgspn-lean", "gspn", "attention"]
STAGES = dict(embed_dims=8, depths=(1, 1, 2, 1), latent_dims=4)


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the kernels take tensors on the CPU, where the interpreter is."""
    monkeypatch.setattr(fused, "can_run_kernels", lambda x: x.numel() > 0)


def build(cls: type = CGSPN, **options) -> nn.Module:
    torch.manual_seed(0)
    if cls is CGSPN:
        options = dict(arch=ARCH, patch_size=4, img_size=16, mixer=MIXERS) | options
    model = cls(**options).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train()


def gradients(model: nn.Module, kernels: bool, autocast: bool) -> dict[str, torch.Tensor | None]:
    """The features, and what a step leaves in the parameters."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)  # the images, and the branches that are dropped
    dtype = next(model.parameters()).dtype
    image = torch.randn(4, 3, 16, 22, device=DEVICE, dtype=dtype)
    with fused.fused_kernels(kernels):
        with torch.autocast(DEVICE, torch.float16, enabled=autocast):
            features = torch.cat([part.flatten() for part in model(image)])
        features.float().square().mean().backward()
    return dict(features=features.detach()) | {n: p.grad for n, p in model.named_parameters()}


OPTIONS = [
    {},
    dict(with_cp=True),
    dict(drop_path_rate=0.5),
    dict(drop_path_rate=0.5, with_cp=True),
    dict(frozen_stages=1),
    dict(frozen_stages=2, with_cp=True),
    dict(local_perception=("mixer", "mlp"), gelu="none"),
]


@pytest.mark.parametrize("autocast", [False, True], ids=["float64", "autocast"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_training_step_is_the_same(options, autocast):
    assert_same_step(build(**options), autocast)


@pytest.mark.parametrize("autocast", [False, True], ids=["float64", "autocast"])
@pytest.mark.parametrize("cls", [GSPN, GSPN2])
def test_so_is_that_of_the_four_stages(cls, autocast):
    assert_same_step(build(cls, arch=STAGES), autocast)


def assert_same_step(model: nn.Module, autocast: bool) -> None:
    if not autocast:
        model.double()
    got, expected = gradients(model, True, autocast), gradients(model, False, autocast)
    for name, value in got.items():
        other = expected[name]
        assert (value is None) == (other is None), name
        if value is not None:
            assert value.dtype == other.dtype, name
            error = (value.double() - other.double()).norm() / other.double().norm()
            assert error < (0.01 if autocast else 1e-5), name  # the loss is in float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_inference_is_the_same(dtype):
    model = build().eval().to(dtype)
    image = torch.randn(2, 3, 16, 22, device=DEVICE, dtype=dtype)
    results = []
    for kernels in (True, False):
        with torch.inference_mode(), fused.fused_kernels(kernels):
            results.append(model(image)[0].double())
    error = (results[0] - results[1]).norm() / results[1].norm()
    assert error < (5e-3 if dtype == torch.float16 else 1e-12)


def test_half_tokens_under_autocast_meet_no_mixed_products():
    """Parameters in float32, tokens as a frozen half-precision stem would leave them."""
    block = build().eval().blocks[0]
    tokens = torch.randn(1, 4, 5, 32, device=DEVICE, dtype=torch.float16)
    with torch.no_grad(), torch.autocast(DEVICE, torch.float16):
        assert torch.isfinite(block(tokens)).all()
