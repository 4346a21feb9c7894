#!/usr/bin/env python
"""Times the project's parts against their references: python tools/benchmark.py op [options]."""

import argparse
import json
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.benchmark import Timer

from cgspn_seg.ops import DIRECTIONS, line_scan, line_scan_reference

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.half}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    op = parts.add_parser("op", help="line_scan against line_scan_reference")
    op.add_argument(
        "--shape", type=int, nargs=4, default=(8, 64, 64, 64), metavar=("B", "H", "W", "C")
    )
    op.add_argument(
        "--groups", type=int, nargs="+", help="channel groups G of the weights (default: C, 1)"
    )
    op.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    op.add_argument("--dtype", choices=DTYPES, default="fp32")
    op.add_argument("--device", default="cpu")
    op.add_argument("--threads", type=int, default=torch.get_num_threads())
    op.add_argument("--seconds", type=float, default=3.0, help="how long each is measured")
    op.add_argument("--json", metavar="FILE", help="write the figures to a file as well")
    return parser.parse_args()


def median_ms(function: Callable[[], object], threads: int, seconds: float) -> float:
    """Median milliseconds of a call, on the host's clock with the device's work included."""
    timer = Timer("function()", globals={"function": function}, num_threads=threads)
    # The first second finds the memory that later calls get without waiting.
    timer.blocked_autorange(min_run_time=1.0)
    return timer.blocked_autorange(min_run_time=seconds).median * 1e3


def benchmark_op(args: argparse.Namespace) -> list[dict]:
    """One row per number of channel groups: times of the operator, the reference, their ratio."""
    *grid, channels = args.shape
    rows = []
    for groups in args.groups or (channels, 1):
        options = dict(dtype=DTYPES[args.dtype], device=args.device)
        x = torch.randn(*grid, channels, **options)
        weight = torch.randn(*grid, len(args.directions), 3, groups, **options)
        input_gate = torch.randn(*grid, len(args.directions), channels, **options)
        row = dict(shape=list(args.shape), directions=len(args.directions), groups=groups)
        row |= dict(dtype=args.dtype, device=args.device, threads=args.threads)
        for name, scan in (("op", line_scan), ("reference", line_scan_reference)):
            scan = partial(scan, directions=args.directions)
            calls = dict(
                forward=partial(scan, x, weight, input_gate),
                forward_backward=partial(forward_and_backward, scan, x, weight, input_gate),
            )
            for what, call in calls.items():
                row[f"{name}_{what}_ms"] = median_ms(call, args.threads, args.seconds)
        for what in ("forward", "forward_backward"):
            row[f"{what}_ratio"] = row[f"reference_{what}_ms"] / row[f"op_{what}_ms"]
        rows.append(row)
    return rows


def forward_and_backward(scan: Callable[..., Tensor], *tensors: Tensor) -> None:
    """Gradients of all three inputs, for a gradient of the output as large as the input gate."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    torch.autograd.grad(scan(*leaves), leaves, tensors[2])


def print_table(rows: list[dict]) -> None:
    first = rows[0]
    table = Table(
        title=f"line_scan, (B, H, W, C) = {tuple(first['shape'])}, {first['directions']} "
        f"directions, {first['dtype']}, {first['device']}, {first['threads']} threads; median ms"
    )
    for column in ("G", "forward", "reference", "ratio", "fwd + bwd", "reference", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [str(row["groups"])]
        for what in ("forward", "forward_backward"):
            cells += [f"{row[f'{name}_{what}_ms']:.1f}" for name in ("op", "reference")]
            cells.append(f"{row[f'{what}_ratio']:.1f}")
        table.add_row(*cells)
    Console().print(table)


def main() -> None:
    args = parse_args()
    rows = benchmark_op(args)
    print_table(rows)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(dict(torch=torch.__version__, rows=rows), file, indent=2)


if __name__ == "__main__":
    main()
