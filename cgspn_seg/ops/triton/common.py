"""What the kernels share: how they compute, and how work is cut into programs."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

HALF = torch.bfloat16, torch.float16


def compute_type(x: Tensor) -> tl.dtype:
    """What a kernel computes with: float64 for float64, float32 for everything else."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


@cache
def tile(channels: int, elements: int = 4096) -> dict[str, int]:
    """Rows and channels of a tile that holds whole rows, of so many elements if it can."""
    block = triton.next_power_of_2(channels)
    rows = max(1, elements // block)
    return dict(ROWS=rows, BLOCK=block, num_warps=min(16, max(4, rows * block // 1024)))


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Where a kernel is to be launched; Triton's interpreter works on the CPU."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()  # a switch costs microseconds, each time
    return torch.cuda.device(x.device)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(rows: int, tile_rows: int, device: torch.device) -> int:
    """So many programs that each leaves one partial sum, and the GPU is full."""
    return min(triton.cdiv(rows, tile_rows), 2 * multiprocessors(device))


def partial_sums(x: Tensor, count: int, numbers: int) -> Tensor:
    """(count, numbers), what so many programs leave of x: float64 for float64, else float32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty(count, numbers, dtype=dtype, device=x.device)


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """grad^T x in the weight's dtype, without rounding to that of the factors on the way."""
    if dtype != grad.dtype and dtype == torch.float32 and grad.is_cuda:
        return torch.mm(grad.t(), x, out_dtype=dtype)
    return (grad.t() @ x).to(dtype)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), in float64 too."""
    return 1 / (1 + tl.exp(-x))


@triton.jit
def standardize(x, inside, channels, eps):
    """Rows with mean 0 and variance 1, and what they were divided by."""
    mean = tl.sum(x, 1)[:, None] / channels
    centered = tl.where(inside, x - mean, 0)
    rstd = 1 / tl.sqrt(tl.sum(centered * centered, 1)[:, None] / channels + eps)
    return centered * rstd, rstd


@triton.jit
def standardize_backward(grad, standardized, rstd, channels):
    """The gradient of what was standardized."""
    mean = tl.sum(grad, 1)[:, None] / channels
    along = tl.sum(grad * standardized, 1)[:, None] / channels
    return (grad - mean - standardized * along) * rstd


@triton.jit
def store_affine(partial, grad_w, grad_b, channels, channel, known):
    """Leaves a program's sums over its rows: C numbers of the weight, then C of the bias."""
    partial += tl.program_id(0).to(tl.int64) * 2 * channels + channel
    tl.store(partial, tl.sum(grad_w, 0)[None, :], known)
    tl.store(partial + channels, tl.sum(grad_b, 0)[None, :], known)
