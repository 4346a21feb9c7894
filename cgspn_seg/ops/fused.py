"""The passes over memory between the matrix products of a block, each of them in one piece.

Every function here is a few lines of PyTorch, and on a GPU with Triton a kernel that computes the
same, with its derivative: it reads each input once, writes each output once, and keeps less for the
backward pass, which computes cheap things again. The environment variable
CGSPN_FUSED_KERNELS=0, or :func:`fused_kernels`, switches the kernels off.

Layers come as PyTorch's own modules. One that is not quite that any more (a subclass, an adapter,
a quantized layer, a module with hooks) is called as it is, without the kernel. The kernels are
differentiable once, and PyTorch's counter of FLOPs does not see the products inside them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_enabled = os.environ.get("CGSPN_FUSED_KERNELS", "1") != "0"

PLAIN_TENSORS = (Tensor, nn.Parameter)
PLAIN_MODULES = (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.GELU)


@contextmanager
def fused_kernels(enabled: bool) -> Iterator[None]:
    """Within, the functions of this module use their kernels where they can, or never.

    It holds for all threads. Activation checkpoints look again when they recompute, so that
    backward passes belong inside as well.
    """
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


@cache
def has_triton() -> bool:
    """Whether the kernels' compiler is installed, as with every build of PyTorch for CUDA."""
    return find_spec("triton") is not None


def uses_kernels(x: Tensor, *modules: nn.Module | None) -> bool:
    """Whether the functions of this module take their kernels for a tensor and these layers.

    Not under torch.compile, which fuses by itself what it sees, nor for tensors that only stand for
    others, as in tracing, nor for layers that are more than their parameters.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        _enabled
        and can_run_kernels(x)
        and type(x) in PLAIN_TENSORS
        and all(module is None or is_plain(module) for module in modules)
        and not torch.jit.is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def can_run_kernels(x: Tensor) -> bool:
    """Whether there is something to compute, where Triton's kernels run."""
    return x.is_cuda and x.numel() > 0 and has_triton()


def is_plain(module: nn.Module) -> bool:
    """Whether a call of the module is nothing but what its parameters say."""
    return (
        type(module) in PLAIN_MODULES
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products take x in: autocast's where it is on."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def residual(x: Tensor, y: Tensor, scale: Tensor | None) -> Tensor:
    """x + y, each image of y times its scale, as stochastic depth has it; None for 1."""
    return x + (y if scale is None else y * scale.view(-1, 1, 1, 1))


def add_norm(
    x: Tensor, y: Tensor | None, norm: nn.LayerNorm, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A residual and the LayerNorm of the next branch: (x + scale y, norm(x + scale y)).

    Args:
        x: (B, H, W, C), the residual stream.
        y: what a branch adds, of a shape that expands to x's; None for nothing.
        norm: over C.
        scale: (B,), as for :func:`residual`; no gradient flows into it.

    Returns:
        The sum, in the dtype of x, and its norm, in that of matrix products.
    """
    if uses_kernels(x, norm):
        from cgspn_seg.ops.triton.norm import AddNorm

        return AddNorm.apply(
            x.contiguous(),
            None if y is None else y.expand_as(x).contiguous(),
            None if scale is None else scale.contiguous(),
            norm.weight,
            norm.bias,
            norm.eps,
            product_dtype(x),
        )
    if y is not None:
        x = residual(x, y, scale)
    return x, norm(x)


def perceive_norm(x: Tensor, conv: nn.Conv2d, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """A local perception unit (GSPN-2) and the LayerNorm after it.

    Args:
        x: (B, H, W, C), the residual stream.
        conv: depthwise, 3x3, with a bias.
        norm: over C.

    Returns:
        x + conv(x) in the dtype of x, and its norm, in that of matrix products.
    """
    if uses_kernels(x, conv, norm):
        from cgspn_seg.ops.triton.local_perception import PerceiveNorm

        parameters = conv.weight, conv.bias, norm.weight, norm.bias
        return PerceiveNorm.apply(x.contiguous(), *parameters, norm.eps, product_dtype(x))
    # The permuted view is what PyTorch calls channels_last: no copy on the way in or out.
    x = x + conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return x, norm(x)


def merge_directions(h: Tensor, gate: Tensor, norm: nn.LayerNorm | None) -> Tensor:
    """Σ_d gate_d ⊙ norm(h_d), the output gate and merge of C-GSPN's scans.

    Args:
        h: (B, H, W, D, C), states of D directions.
        gate: (B, H, W, D, C), u; may be a slice of a joint projection.
        norm: over C; None for no norm.

    Returns:
        (B, H, W, C).
    """
    if uses_kernels(h, norm):
        from cgspn_seg.ops.triton.merge import MergeDirections

        parameters = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
        merged = MergeDirections.apply(h.flatten(0, 2).contiguous(), _rows(gate), *parameters)
        return merged.view(*h.shape[:3], -1)
    return (gate * (h if norm is None else norm(h))).sum(dim=3)


def gated_projection(x: Tensor, gate: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    """second(first(x) ⊙ SiLU(gate)).

    Args:
        x: (B, H, W, C_c).
        gate: (B, H, W, C); may be a slice of a joint projection.
        first: from C_c to C, with a bias.
        second: from C to C, with a bias.

    Returns:
        (B, H, W, C).
    """
    if uses_kernels(x, first, second):
        from cgspn_seg.ops.triton.gated_projection import GatedProjection

        parameters = first.weight, first.bias, second.weight, second.bias
        y = GatedProjection.apply(
            x.flatten(0, 2).contiguous(), _rows(gate), *parameters, product_dtype(x)
        )
        return y.view(*x.shape[:3], -1)
    return second(first(x) * F.silu(gate))


def mlp(x: Tensor, first: nn.Linear, gelu: nn.GELU, second: nn.Linear) -> Tensor:
    """second(gelu(first(x))) of (B, H, W, C); both products have a bias."""
    if uses_kernels(x, first, gelu, second):
        from cgspn_seg.ops.triton.mlp import MLP

        parameters = first.weight, first.bias, second.weight, second.bias
        options = gelu.approximate == "tanh", product_dtype(x)
        y = MLP.apply(x.flatten(0, 2).contiguous(), *parameters, *options)
        return y.view(*x.shape[:3], -1)
    return second(gelu(first(x)))


def add_norm_mlp(
    x: Tensor,
    y: Tensor,
    norm: nn.LayerNorm,
    products: tuple[nn.Linear, nn.GELU, nn.Linear],
    scales: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """The second half of a block: z + mlp(norm(z)) with z = x + y.

    In inference the last product adds to z where it lies, instead of a pass that would add its
    result; its bias is in z already.

    Args:
        x: (B, H, W, C), the residual stream.
        y: (B, H, W, C), what the first half adds.
        norm: over C.
        products: the MLP's, as :func:`mlp` takes them.
        scales: of y and of the MLP's result, as for :func:`residual`.

    Returns:
        (B, H, W, C), in the dtype of x.
    """
    first, gelu, second = products
    inference = not torch.is_grad_enabled() and scales == (None, None) and x.shape == y.shape
    if (
        inference
        and uses_kernels(x, norm, *products)
        and x.dtype == y.dtype == first.weight.dtype == second.weight.dtype == product_dtype(x)
    ):
        from cgspn_seg.ops.triton.mlp import gelu_projection
        from cgspn_seg.ops.triton.norm import add_norm_forward

        z, normed = add_norm_forward(
            x.contiguous(), y.contiguous(), None, norm.weight, norm.bias, norm.eps, x.dtype,
            offset=second.bias,
        )  # fmt: skip
        hidden = gelu_projection(
            normed.flatten(0, 2), first.weight, first.bias, gelu.approximate == "tanh"
        )
        z.flatten(0, 2).addmm_(hidden, second.weight.t())
        return z
    z, normed = add_norm(x, y, norm, scales[0])
    return residual(z, mlp(normed, *products), scales[1])


def _rows(x: Tensor) -> Tensor:
    """(B, H, W, ...) as (B H W, ...): a view where tokens lie equally far apart and are dense."""
    rows = x.flatten(0, 2)
    return rows if rows[0].is_contiguous() else rows.contiguous()
