"""Floating-point operations of a block or an encoder, the line scan's counted."""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

SCAN_FLOPS = dict(state=7, coefficients=14)
"""The scan forward. For each state, (B, H, W, D, C): three multiply-adds and λ x. For each set of
three coefficients, (B, H, W, D, G): three sigmoids (exponential, addition, division), their sum,
and three divisions by it."""

SCAN_BACKWARD_FLOPS = dict(state=15, coefficients=31)
"""The scan backward. For each state: three multiply-adds for the adjoint, three for the gradient of
the coefficients, one product for that of λ, a multiply-add for that of x. For each set of
coefficients: the coefficients once more; their mean gradient (5), and for each logit a difference,
a complement of σ and two products."""

Shape = tuple[int, ...]


def _scan_flops(per: dict[str, int], states: Shape, logits: Shape) -> int:
    coefficient_sets = prod(logits) // 3
    return per["state"] * prod(states) + per["coefficients"] * coefficient_sets


def scan_flops(x: Shape, weight: Shape, input_gate: Shape, *_: object, **__: object) -> int:
    """FLOPs of `line_scan` from the shapes of its arguments."""
    return _scan_flops(SCAN_FLOPS, input_gate, weight)


def scan_backward_flops(grad_h: Shape, x: Shape, weight: Shape, *_: object, **__: object) -> int:
    """FLOPs of `line_scan_backward` from the shapes of its arguments."""
    return _scan_flops(SCAN_BACKWARD_FLOPS, grad_h, weight)


def convolution_backward_flops(
    grad_out: Shape, x: Shape, weight: Shape, *rest: object, **_: object
) -> int:
    """FLOPs of a convolution's backward: forward's, once for each of the gradients wanted.

    PyTorch's own formula takes a depthwise convolution's weight gradient for a dense one's, a
    thousand times as much at a thousand channels.
    """
    wanted = rest[-1]
    return 2 * prod(grad_out) * prod(weight[1:]) * (wanted[0] + wanted[1])


def count_flops(module: nn.Module, x: Tensor, train: bool) -> int:
    """FLOPs of a call: products of matrices and convolutions, as PyTorch counts them, and scans.

    Attention counts as the two products that define it, whatever a backend does, and with it their
    gradients; recomputing does not count.

    Args:
        module: on the meta device, so that nothing is computed.
        x: its input, there as well.
        train: whether to count the gradients too, of `x` where it requires one.
    """
    ops = torch.ops.cgspn_seg
    formulas: dict[object, Callable[..., int]] = {
        ops.line_scan: scan_flops,
        ops.line_scan_backward: scan_backward_flops,
        torch.ops.aten.convolution_backward: convolution_backward_flops,
    }
    # Without gradients, the counter stumbles over views of an input that requires one.
    x = x.detach().requires_grad_(train and x.requires_grad)
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(train):
        out = module(x)
        if train:
            outputs = [out] if isinstance(out, Tensor) else list(out)
            torch.autograd.backward(outputs, [o.detach() for o in outputs])
    return counter.get_total_flops()
