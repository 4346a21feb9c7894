#!/usr/bin/env python
"""Times the project's parts against their references: python tools/benchmark.py op [options]."""

import argparse
import json
import math
from collections.abc import Callable

import torch
from benchmark_op import DTYPES, PRESETS, Case, benchmark_op
from rich.console import Console
from rich.table import Table

from cgspn_seg.ops import DIRECTIONS

WIDTH = 120  # of a table that goes to a file or a pipe, in characters


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    op = parts.add_parser(
        "op",
        help="line_scan against line_scan_reference; on a GPU also against its memory's bandwidth, "
        "and against GSPN's own kernel",
    )
    problem = op.add_argument_group("what is timed")
    problem.add_argument("--preset", choices=PRESETS, help="a list of cases, instead of one of:")
    problem.add_argument(
        "--shape", type=int, nargs=4, default=(8, 64, 64, 64), metavar=("B", "H", "W", "C")
    )
    problem.add_argument(
        "--groups", type=int, nargs="+", help="channel groups G of the weights (default: C, 1)"
    )
    problem.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    problem.add_argument("--dtype", choices=DTYPES, default="fp32")
    op.add_argument(
        "--device", type=torch.device, default="cpu", help="cpu (default), cuda or cuda:INDEX"
    )
    op.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of the CPU (default: all)"
    )
    op.add_argument(
        "--seconds", type=float, default=3.0, help="how long each is measured on the CPU"
    )
    op.add_argument("--runs", type=int, default=50, help="how many are measured on a GPU")
    op.add_argument("--no-reference", action="store_true", help="do not time line_scan_reference")
    op.add_argument("--json", metavar="FILE", help="write the figures to a file as well")
    args = parser.parse_args()
    if args.device.type not in ("cpu", "cuda"):
        op.error(f"--device: expected cpu or cuda, got {args.device}")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        op.error("--device: PyTorch sees no GPU")
    own = ("shape", "groups", "directions", "dtype")
    if args.preset and (given := [n for n in own if getattr(args, n) != op.get_default(n)]):
        op.error(f"--preset: its cases say the {given[0]} themselves")
    return args


def cases_of(args: argparse.Namespace) -> list[Case]:
    """The cases that the command line names."""
    if args.preset:
        return PRESETS[args.preset]
    shape = tuple(args.shape)
    groups = args.groups or dict.fromkeys((shape[-1], 1))
    return [Case(shape, args.dtype, tuple(args.directions), g) for g in groups]


def three_digits(value: float) -> str:
    """A positive number with three digits that count, or all those before its point."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def ratio(key: str) -> Callable[[dict], str]:
    """Shows the ratio with this key, with a star where the other's time was not measured here."""
    return lambda f: three_digits(f[f"{key}_ratio"]) + "×" + "*" * f.get(f"{key}_quoted", False)


# Header, the figure without which a pass has a dash there, and how it is shown.
COLUMNS: tuple[tuple[str, str, Callable[[dict], str]], ...] = (
    ("time", "ms", lambda f: three_digits(f["ms"])),
    ("MB", "min_bytes", lambda f: three_digits(f["min_bytes"] * 1e-6)),
    ("GB/s", "gb_per_s", lambda f: three_digits(f["gb_per_s"])),
    ("of copy", "copy_share", lambda f: f"{f['copy_share']:.1%}"),
    ("µs/line", "us_per_line", lambda f: three_digits(f["us_per_line"])),
    ("reference", "reference_ms", lambda f: three_digits(f["reference_ms"])),
    ("ratio", "reference_ratio", ratio("reference")),
    ("GSPN", "original_ms", lambda f: three_digits(f["original_ms"])),
    ("ratio", "original_ratio", ratio("original")),
)


def table_of(figures: dict) -> Table:
    """What benchmark_op measured, a row for each case; columns that no case fills are left out."""
    passes = [f for row in figures["rows"] for f in row["passes"].values()]
    columns = [column for column in COLUMNS if any(column[1] in f for f in passes)]
    title = f"line_scan, {figures['device']}; median milliseconds, "
    if "copy_gb_per_s" in figures:
        title += f"{figures['runs']} runs; a copy moves {figures['copy_gb_per_s']:.0f} GB/s"
    else:
        title += f"{figures['threads']} threads"
    table = Table(title=title, show_lines=True)
    table.add_column("B×H×W×C")
    table.add_column()
    for header, _, _ in columns:
        table.add_column(header, justify="right")
    for row in figures["rows"]:
        names = row["directions"]
        directions = "all four" if len(names) == len(DIRECTIONS) else " + ".join(names)
        table.add_row(
            "×".join(map(str, row["shape"]))
            + f"\n{row['dtype']}, {directions}, G = {row['groups']}",
            "\n".join(name.replace("_", " + ") for name in row["passes"]),
            *(
                "\n".join(show(f) if key in f else "–" for f in row["passes"].values())
                for _, key, show in columns
            ),
        )
    if any(f.get("original_quoted") for f in passes):
        table.caption = "* against times measured on one H200, not in this run"
    return table


def main() -> None:
    args = parse_args()
    figures = benchmark_op(
        cases_of(args),
        args.device,
        threads=args.threads,
        seconds=args.seconds,
        runs=args.runs,
        reference=not args.no_reference,
    )
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(table_of(figures))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
