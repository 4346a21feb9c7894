"""The fused passes: their kernels against the few lines of PyTorch that say what they compute."""

import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from cgspn_seg.ops import fused

if not torch.cuda.is_available():
    # Set before the kernels are imported: Triton then runs them in Python, on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [
    pytest.mark.skipif(not fused.has_triton(), reason="Triton is not installed"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the kernels take tensors on the CPU, where the interpreter is."""
    monkeypatch.setattr(fused, "can_run_kernels", lambda x: x.numel() > 0)
    torch.manual_seed(0)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, device=DEVICE)


def part_of_more(*shape: int) -> torch.Tensor:
    """(B, H, W, ...) with other numbers between tokens."""
    size = torch.Size(shape[3:]).numel()
    return draw(*shape[:3], size + 3)[..., 2:-1].unflatten(-1, shape[3:])


def layers(*modules: nn.Module) -> list[nn.Module]:
    """In float64, with parameters that are all of a size that matters."""
    for module in modules:
        module.to(DEVICE, torch.float64)
        for name, parameter in module.named_parameters():
            with torch.no_grad():
                near_one = isinstance(module, nn.LayerNorm) and name == "weight"
                parameter.normal_(1.0 if near_one else 0.0, 0.3)
    return list(modules)


Problem = tuple[Callable, list[torch.Tensor], list[nn.Module]]


def problem(name: str, grid: tuple[int, int, int], c: int) -> Problem:
    """A function of tensors alone, the tensors, and the modules with its parameters."""
    tokens, wide = (*grid, c), 3 * c
    linear = nn.Linear
    match name:
        case "norm":
            (norm,) = layers(nn.LayerNorm(c))
            return lambda x: fused.add_norm(x, None, norm), [draw(*tokens)], [norm]
        case "add_norm" | "add_norm_of_parts" | "scaled_add_norm":
            (norm,) = layers(nn.LayerNorm(c))
            make = part_of_more if name == "add_norm_of_parts" else draw
            scale = draw(grid[0]) if name == "scaled_add_norm" else None

            def add_norm(x, y):
                return fused.add_norm(x, y, norm, None if scale is None else scale.to(x.dtype))

            return add_norm, [make(*tokens), make(*tokens)], [norm]
        case "perceive_norm":
            conv, norm = layers(nn.Conv2d(c, c, 3, padding=1, groups=c), nn.LayerNorm(c))
            return lambda x: fused.perceive_norm(x, conv, norm), [draw(*tokens)], [conv, norm]
        case "merge" | "merge_two_without_norm":
            count, norm = (4, layers(nn.LayerNorm(c))[0]) if name == "merge" else (2, None)
            tensors = [draw(*grid, count, c), part_of_more(*grid, count, c)]
            modules = [] if norm is None else [norm]
            return lambda h, u: fused.merge_directions(h, u, norm), tensors, modules
        case "gated_projection":
            first, second = layers(linear(c, wide), linear(wide, wide))
            tensors = [part_of_more(*tokens), part_of_more(*grid, wide)]
            return (
                lambda x, g: fused.gated_projection(x, g, first, second),
                tensors,
                [first, second],
            )
        case "mlp" | "tanh_mlp":
            gelu = nn.GELU("tanh" if name == "tanh_mlp" else "none")
            first, second = layers(linear(c, wide), linear(wide, c))
            return lambda x: fused.mlp(x, first, gelu, second), [draw(*tokens)], [first, second]
        case "second_half":
            norm, first, second = layers(nn.LayerNorm(c), linear(c, wide), linear(wide, c))
            products = first, nn.GELU("tanh"), second

            def second_half(x, y):
                return fused.add_norm_mlp(x, y, norm, products, (None, None))

            return second_half, [draw(*tokens), draw(*tokens)], [norm, first, second]
    raise ValueError(name)


NAMES = [
    "norm",
    "add_norm",
    "add_norm_of_parts",
    "scaled_add_norm",
    "perceive_norm",
    "merge",
    "merge_two_without_norm",
    "gated_projection",
    "mlp",
    "tanh_mlp",
    "second_half",
]
# Sizes within one tile and beyond: rows of the images, columns, channels, and single ones.
GRIDS = {(2, 5, 11): (5, 48), (1, 1, 1): (3,), (2, 37, 1): (1,), (1, 2, 40): (130,)}
CASES = [(name, grid, c) for name in NAMES for grid in GRIDS for c in GRIDS[grid]]


def results(
    made: Problem, kernels: bool, dtype: torch.dtype = torch.float64, autocast: bool = False
) -> list[torch.Tensor]:
    """Outputs, and the gradients of tensors and parameters, for fixed gradients of the outputs."""
    function, tensors, modules = made
    for module in modules:
        module.to(torch.float32 if autocast else dtype)
    leaves = [x.detach().to(torch.float32 if autocast else dtype).requires_grad_() for x in tensors]
    with fused.fused_kernels(kernels), torch.autocast(DEVICE, dtype, enabled=autocast):
        outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator(DEVICE).manual_seed(1)
    draw_like = partial(torch.randn, generator=generator, dtype=torch.float64, device=DEVICE)
    grads = [draw_like(o.shape).to(o.dtype) for o in outputs]
    wanted = leaves + [p for module in modules for p in module.parameters()]
    return outputs + list(torch.autograd.grad(outputs, wanted, grads))


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize(("name", "grid", "channels"), CASES)
def test_kernels_compute_what_the_code_says_in_float64(name, grid, channels):
    made = problem(name, grid, channels)
    for value, expected in zip(results(made, True), results(made, False), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("autocast", [False, True], ids=["all", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_as_good_as_unfused(name, dtype, autocast):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter rounds bfloat16 towards zero")
    if autocast and dtype == torch.float32:
        pytest.skip("autocast is for half types")
    made = problem(name, (2, 5, 11), 64)
    exact = results(made, False)
    got, unfused = results(made, True, dtype, autocast), results(made, False, dtype, autocast)
    # Under autocast a norm's float32 result is rounded by the product that takes it; here at once.
    rounding = torch.finfo(dtype).eps if autocast else 2e-6
    for value, other, truth in zip(got, unfused, exact, strict=True):
        assert value.dtype == other.dtype or (autocast and value.dtype == dtype)
        assert relative_error(value, truth) < 1.5 * relative_error(other, truth) + rounding


def test_a_small_kernel_of_the_local_perception_unit_is_not_lost_beside_the_identity():
    function, (x,), (conv, norm) = problem("perceive_norm", (1, 6, 6), 16)
    with torch.no_grad():
        conv.weight.mul_(0.01)
        half = torch.float16
        conv.to(half), norm.to(half)
        exact = x + conv.double()(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        conv.to(half)
        got = function(x.to(half))[0].double() - x.to(half).double()
    assert relative_error(got, exact - x) < 0.1  # of what the convolution adds


def test_the_second_half_of_a_block_adds_in_place_in_inference(monkeypatch):
    function, tensors, _ = problem("second_half", (2, 5, 11), 48)
    with torch.no_grad(), fused.fused_kernels(False):
        expected = function(*tensors)
    calls = []
    add_norm = fused.add_norm
    monkeypatch.setattr(fused, "add_norm", lambda *a: calls.append(a) or add_norm(*a))
    with torch.no_grad():
        got = function(*tensors)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert not calls


def test_results_are_not_changed_behind_autograd():
    """Wider than one step of the tensor cores: the product and the gate are two calls."""
    first, second = layers(nn.Linear(200, 32), nn.Linear(32, 32))
    x, gate = draw(1, 3, 4, 200), draw(1, 3, 4, 32)
    made = (lambda x, g: fused.gated_projection(x, g, first, second), [x, gate], [first, second])
    for value, expected in zip(results(made, True), results(made, False), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("change", ["hook", "subclass", "off"])
def test_layers_that_are_more_than_their_parameters_are_called(change):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    first, gelu, second = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)
    seen = []
    if change == "subclass":
        first = Scaled(4, 8)
    if change == "hook":
        second.register_forward_hook(lambda *a: seen.append(a))
    layers(first, second)
    x = draw(1, 2, 3, 4)
    with fused.fused_kernels(change != "off"):
        assert not fused.uses_kernels(x, first, gelu, second)
        torch.testing.assert_close(fused.mlp(x, first, gelu, second), second(gelu(first(x))))
    assert len(seen) == (2 if change == "hook" else 0)
    assert fused.uses_kernels(x, nn.Linear(4, 4))


def test_what_only_stands_for_tensors_is_left_to_pytorch():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert not fused.uses_kernels(torch.randn(2, 3))
    torch.func.vmap(lambda x: x.sum() if not fused.uses_kernels(x) else 1 / 0)(draw(2, 3))


def test_kernels_are_differentiable_once():
    function, (x,), _ = problem("norm", (1, 2, 2), 4)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(function(x)[1].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        grad.sum().backward()
