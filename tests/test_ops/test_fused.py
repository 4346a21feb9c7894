"""The fused passes: their kernels against the few lines of PyTorch that say what they compute."""

import os
from functools import partial

import pytest
import torch

from cgspn_seg.ops import fused

if not torch.cuda.is_available():
    # Set before the kernels are imported: Triton then runs them in Python, on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [
    pytest.mark.skipif(not fused.has_triton(), reason="Triton is not installed"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]

EPS = 1e-6


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the kernels take tensors on the CPU, where the interpreter is."""
    monkeypatch.setattr(fused, "uses_kernels", lambda x: fused._enabled)


def draw(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, dtype=torch.float64, device=DEVICE) * scale).to(dtype)


def slice_of(last: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of this shape that is part of a wider one with `last` more numbers a token."""
    tokens, rest = shape[:3], shape[3:]
    wide = draw(*tokens, last + torch.Size(rest).numel(), dtype=dtype)
    return wide[..., last:].unflatten(-1, rest) if len(rest) > 1 else wide[..., last:]


GRID = (2, 5, 11)


def arguments(name: str, dtype: torch.dtype, channels: int) -> tuple:
    """A function's inputs; tensors that require gradients and others."""
    c, new = channels, partial(draw, dtype=dtype)
    tokens = (*GRID, c)
    norm = (1 + new(c, scale=0.1), new(c, scale=0.1))
    wide = 3 * c
    return {
        "norm": lambda: (new(*tokens), None, *norm, EPS),
        "add_norm": lambda: (new(*tokens), new(*tokens), *norm, EPS),
        "scaled_add_norm": lambda: (new(*tokens), new(*tokens), *norm, EPS, new(GRID[0])),
        "perceive_norm": lambda: (new(*tokens), new(c, 1, 3, 3), new(c), *norm, EPS),
        "merge": lambda: (new(*GRID, 4, c), slice_of(7 * c, *GRID, 4, c, dtype=dtype), *norm),
        "merge_two_without_norm": lambda: (
            new(*GRID, 2, c), new(*GRID, 2, c), None, None,
        ),
        "gated_projection": lambda: (
            new(*tokens), slice_of(c, *GRID, wide, dtype=dtype),
            new(wide, c, scale=c**-0.5), new(wide), new(wide, wide, scale=wide**-0.5), new(wide),
        ),
        "mlp": lambda: (
            new(*tokens), new(wide, c, scale=c**-0.5), new(wide),
            new(c, wide, scale=wide**-0.5), new(c), "none",
        ),
        "tanh_mlp": lambda: (
            new(*tokens), new(wide, c, scale=c**-0.5), new(wide),
            new(c, wide, scale=wide**-0.5), new(c), "tanh",
        ),
    }[name]()  # fmt: skip


FUNCTIONS = {
    "norm": fused.add_norm,
    "add_norm": fused.add_norm,
    "scaled_add_norm": fused.add_norm,
    "perceive_norm": fused.perceive_norm,
    "merge": fused.merge_directions,
    "merge_two_without_norm": fused.merge_directions,
    "gated_projection": fused.gated_projection,
    "mlp": fused.mlp,
    "tanh_mlp": fused.mlp,
}


def results(name: str, inputs: tuple, enabled: bool, seed: int = 0) -> list[torch.Tensor]:
    """Outputs, and the gradients of all that a parameter or activation can be."""
    fixed = 5 if name == "scaled_add_norm" else len(inputs)  # the scale has no gradient
    leaves = [
        x.detach().requires_grad_(i < fixed) if isinstance(x, torch.Tensor) else x
        for i, x in enumerate(inputs)
    ]
    wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    with fused.fused_kernels(enabled):
        outputs = FUNCTIONS[name](*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator(DEVICE).manual_seed(seed)
    grads = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64, device=DEVICE).to(o.dtype)
        for o in outputs
    ]
    return outputs + list(torch.autograd.grad(outputs, wanted, grads))


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("channels", [5, 48])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_kernels_compute_what_the_code_says_in_float64(name, channels):
    torch.manual_seed(0)
    inputs = arguments(name, torch.float64, channels)
    for value, expected in zip(
        results(name, inputs, True), results(name, inputs, False), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_half_precision_is_as_good_as_unfused(name, dtype):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter rounds bfloat16 towards zero")
    torch.manual_seed(1)
    inputs = arguments(name, dtype, 64)
    exact = results(name, [x.double() if isinstance(x, torch.Tensor) else x for x in inputs], False)
    got, unfused = results(name, inputs, True), results(name, inputs, False)
    for value, other, truth in zip(got, unfused, exact, strict=True):
        assert value.dtype == other.dtype
        assert relative_error(value, truth) < 1.5 * relative_error(other, truth) + 1e-6


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_second_half_of_a_block_in_inference(approximate):
    torch.manual_seed(2)
    _, _, *norm = arguments("norm", torch.float64, 48)
    x, y, (_, *products, _) = draw(*GRID, 48), draw(*GRID, 48), arguments("mlp", torch.float64, 48)
    with torch.no_grad(), fused.fused_kernels(False):
        z, normed = fused.add_norm(x, y, *norm)
        expected = z + fused.mlp(normed, *products, approximate)
    with torch.no_grad():
        got = fused.add_norm_mlp(x, y, norm, products, approximate)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
