"""The kernel of GSPN's authors, to compare with: timed where their extension is there, else quoted.

The extension is `ops/gaterecurrent` of github.com/NVlabs/GSPN, under a licence of its own; for
Python to find it, the folder of the compiled file goes into PYTHONPATH.
"""

import importlib
from types import ModuleType

import torch
from benchmark_timing import event_ms
from torch import Tensor

from cgspn_seg.ops import line_scan
from cgspn_seg.ops.reference import normalize

MODULES = ("gaterecurrent2dnoind_cuda", "ops.gaterecurrent.gaterecurrent2dnoind_cuda")

ORIGINAL_MS = {
    ("fp32", (16, 1024, 1024, 8)): (33.4, 80.1),
    ("fp32", (8, 128, 128, 64)): (1.41, 4.36),
    ("bf16", (32, 64, 64, 64)): (1.41, 2.85),
    ("bf16", (1, 128, 128, 32)): (0.63, 1.18),
}
"""Milliseconds of its forward and backward, by dtype and (B, H, W, C), for one direction.

Measured on one H200. The kernel knows coefficients per channel only, so they hold for every G.
"""

TOLERANCE = 0.05
"""Largest difference of its result from line_scan's, relative to the norm; its state has the dtype
of x."""


def original_ms(dtype: str, direction: str, inputs: list[Tensor], runs: int) -> dict:
    """Times of the kernel on the same problem, forward and backward, in milliseconds.

    Its launches all go to the default stream, where no CUDA graph can be captured, so they are
    timed as they are called.

    Args:
        dtype: name of the dtype of the inputs, as in `ORIGINAL_MS`.
        direction: name of the one direction.
        inputs: x, weight, input gate and gradient of h, as line_scan takes them.
        runs: how many runs are measured.

    Returns:
        For "forward" and "backward" the time, `ms`, and whether it was not measured here but taken
        from `ORIGINAL_MS`, `quoted`. Empty if there is neither.

    Raises:
        RuntimeError: the kernel computes something else than line_scan.
    """
    kernel = import_original()
    if kernel is None or dtype == "fp64":  # which it does not have
        quoted = ORIGINAL_MS.get((dtype, tuple(inputs[0].shape)))
        if quoted is None:
            return {}
        return {
            name: dict(ms=ms, quoted=True)
            for name, ms in zip(("forward", "backward"), quoted, strict=True)
        }
    problem = OriginalProblem(kernel, direction, inputs)
    forward = event_ms(problem.forward, runs)
    problem.check(line_scan(*inputs[:3], directions=(direction,)))
    backward = event_ms(problem.backward, runs, problem.restore_gradient)
    return dict(forward=dict(ms=forward, quoted=False), backward=dict(ms=backward, quoted=False))


def import_original() -> ModuleType | None:
    """The compiled extension, if it is there; under its bare name first, for its package imports
    modules that were not published."""
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    return None


class OriginalProblem:
    """What the kernel reads and writes, in the layout it wants.

    It scans along the last axis of (B, C, positions, lines). It takes x, λ, and for each neighbour
    and every channel a coefficient that is normalized already; what it writes to are zeros.

    Args:
        kernel: the extension.
        direction: name of the one direction.
        inputs: x, weight, input gate and gradient of h, as line_scan takes them.
    """

    def __init__(self, kernel: ModuleType, direction: str, inputs: list[Tensor]) -> None:
        self.kernel, self.direction = kernel, direction
        x, weight, input_gate, grad_h = inputs
        logits = self.in_lines(weight[..., 0, :, :]).to(torch.promote_types(x.dtype, torch.float32))
        coefficients = normalize(logits).to(x.dtype)
        coefficients = coefficients.repeat_interleave(x.shape[-1] // weight.shape[-1], dim=-1)
        self.inputs = [self.arranged(x), self.arranged(input_gate[..., 0, :])]
        self.inputs += [w.permute(0, 3, 2, 1).contiguous() for w in coefficients.unbind(3)]
        self.grad_h = self.arranged(grad_h[..., 0, :])
        self.h = torch.zeros_like(self.grad_h)
        self.adjoint = self.grad_h.clone()
        self.gradients = [torch.zeros_like(tensor) for tensor in self.inputs]

    def in_lines(self, tensor: Tensor) -> Tensor:
        """(B, H, W, ...) as (B, lines, positions, ...), lines in the order of the scan."""
        tensor = tensor.transpose(1, 2) if self.direction in ("right", "left") else tensor
        return tensor.flip(1) if self.direction in ("up", "left") else tensor

    def arranged(self, tensor: Tensor) -> Tensor:
        """(B, H, W, C) as (B, C, positions, lines)."""
        return self.in_lines(tensor).permute(0, 3, 2, 1).contiguous()

    def forward(self) -> None:
        self.kernel.forward(self.h.shape[3], *self.inputs, self.h)

    def backward(self) -> None:
        """Needs h; turns the gradient of h into the adjoint, in place."""
        lines = self.h.shape[3]
        self.kernel.backward(lines, self.h, self.adjoint, *self.inputs, *self.gradients)

    def restore_gradient(self) -> None:
        self.adjoint.copy_(self.grad_h)

    def check(self, h: Tensor) -> None:
        """Compares the result with line_scan's.

        Raises:
            RuntimeError: they differ.
        """
        expected = self.arranged(h[..., 0, :]).float()
        error = ((self.h - expected).norm() / expected.norm()).item()
        if not error < TOLERANCE:
            raise RuntimeError(f"GSPN's kernel and line_scan differ by {error:.1%} of the norm")
