#!/usr/bin/env python
"""Times the project's parts against their references: python tools/benchmark.py PART [options]."""

import argparse
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from benchmark_op import DTYPES, PRESETS, Case, benchmark_op
from benchmark_table import WIDTH, model_table, op_table
from rich.console import Console

from cgspn_seg.ops import DIRECTIONS

SIZES = (224, 392, 518, 1036, 2058, 4116)  # multiples of 14
BATCHES = (1, 8, 32)
MIXERS = ("cgspn", "cgspn-lean", "attention")
BACKENDS = ("flash", "cudnn", "efficient", "math")
MODES = ("forward", "train")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    op = parts.add_parser(
        "op",
        help="line_scan against line_scan_reference; on a GPU also against its memory's bandwidth, "
        "and against GSPN's own kernel",
    )
    add_op_options(op)
    block = parts.add_parser("block", help="one block of the encoder, with one mixer or another")
    model = parts.add_parser(
        "model",
        help="the encoder, with one mixer or another; 'hybrid' attends in 3 of its layers, evenly "
        "spaced, the last one included, and has cgspn in the others",
    )
    model.add_argument("--depth", type=positive_int, help="layers, instead of the architecture's")
    add_model_options(block, MIXERS)
    add_model_options(model, (*MIXERS, "hybrid"))
    args = parser.parse_args()
    chosen = parts.choices[args.part]
    if args.device.type not in ("cpu", "cuda"):
        chosen.error(f"--device: expected cpu or cuda, got {args.device}")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        chosen.error("--device: PyTorch sees no GPU")
    for option in ("json", "plot"):
        # Now rather than after an hour of measuring.
        if (file := getattr(args, option, None)) and not file.absolute().parent.is_dir():
            chosen.error(f"--{option}: the folder of {file} does not exist")
    if args.part == "op":
        own = ("shape", "groups", "directions", "dtype")
        if args.preset and (given := [n for n in own if getattr(args, n) != op.get_default(n)]):
            op.error(f"--preset: its cases say the {given[0]} themselves")
    else:
        complete_model_options(args, chosen)
    return args


def positive_int(text: str) -> int:
    """An option's value, which argparse refuses unless it is an integer of at least 1."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def add_op_options(op: argparse.ArgumentParser) -> None:
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
        "--seconds", type=float, default=3.0, help="how long each is measured on the CPU"
    )
    op.add_argument("--no-reference", action="store_true", help="do not time line_scan_reference")
    add_shared_options(op)


def add_model_options(parser: argparse.ArgumentParser, mixers: tuple[str, ...]) -> None:
    what = parser.add_argument_group("what is timed")
    what.add_argument(
        "--mixers",
        nargs="+",
        default=mixers,
        metavar="NAME[:KEY=VALUE,...]",
        help="with options of the mixer, local_perception, or eager=True (no fused kernels), such "
        'as cgspn:latent_dims=32 or \'cgspn:directions=("down","up")\' '
        f"(default: {' '.join(mixers)})",
    )
    what.add_argument(
        "--attention",
        nargs="+",
        choices=BACKENDS,
        help="PyTorch's backends of attention (default: all; flash and math on the CPU)",
    )
    what.add_argument("--arch", default="so400m", help="sizes of the encoder (default: so400m)")
    what.add_argument(
        "--patch-size", type=positive_int, default=14, help="pixels (default: 14)", metavar="N"
    )
    what.add_argument(
        "--sizes",
        type=positive_int,
        nargs="+",
        default=SIZES,
        metavar="N",
        help=f"sides of the images, pixels (default: {' '.join(map(str, SIZES))})",
    )
    what.add_argument(
        "--batches",
        type=positive_int,
        nargs="+",
        default=BATCHES,
        metavar="N",
        help=f"images in a batch (default: {' '.join(map(str, BATCHES))})",
    )
    what.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        default=MODES,
        help="forward, everything in the dtype, and a training step without the optimizer's, "
        "under autocast (default: both)",
    )
    what.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on a GPU, fp32 on the CPU"
    )
    parser.add_argument(
        "--device",
        type=torch.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:INDEX (default: a GPU where there is one)",
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="how long each is measured (default: 2)"
    )
    parser.add_argument(
        "--plot", type=png_file, metavar="FILE.png", help="draw time against resolution"
    )
    add_shared_options(parser)


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads",
        type=positive_int,
        default=torch.get_num_threads(),
        help="of the CPU (default: all)",
    )
    parser.add_argument(
        "--runs", type=positive_int, default=50, help="how many are measured on a GPU"
    )
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="write the figures to a file as well"
    )


def png_file(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"expected a file that ends in .png, got {text}")
    return Path(text)


def complete_model_options(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Fills in what depends on the device, and turns names into a Setting and Contenders."""
    # Here, since these import MMSegmentation, which takes seconds and which `op` can do without.
    from benchmark_contenders import make_contenders
    from benchmark_model import Setting

    from cgspn_seg.models.arch import resolve_architecture

    on_gpu = args.device.type == "cuda"
    args.dtype = args.dtype or ("bf16" if on_gpu else "fp32")
    args.attention = args.attention or (BACKENDS if on_gpu else ("flash", "math"))
    if min(args.sizes) < args.patch_size:
        parser.error(f"--sizes: {min(args.sizes)} is less than a patch, {args.patch_size}")
    try:
        arch = resolve_architecture(args.arch)
    except ValueError as error:
        parser.error(f"--arch: {error}")
    if getattr(args, "depth", None):
        arch = replace(arch, num_layers=args.depth)
    try:
        args.contenders = make_contenders(args.part, args.mixers, args.attention, arch)
    except (TypeError, ValueError) as error:
        parser.error(f"--mixers: {error}")
    args.setting = Setting(
        part=args.part,
        arch=arch,
        patch_size=args.patch_size,
        dtype=DTYPES[args.dtype],
        device=args.device,
        runs=args.runs,
        seconds=args.seconds,
        threads=args.threads,
    )


def cases_of(args: argparse.Namespace) -> list[Case]:
    """The cases that the command line names."""
    if args.preset:
        return PRESETS[args.preset]
    shape = tuple(args.shape)
    groups = args.groups or dict.fromkeys((shape[-1], 1))
    return [Case(shape, args.dtype, tuple(args.directions), g) for g in groups]


def run_op(args: argparse.Namespace) -> dict:
    """Measures what the command line says about the operator."""
    return benchmark_op(
        cases_of(args),
        args.device,
        threads=args.threads,
        seconds=args.seconds,
        runs=args.runs,
        reference=not args.no_reference,
    )


def run_model(args: argparse.Namespace, write: Callable[[dict], None]) -> dict:
    """Measures what the command line says about a block or the encoder, until Ctrl-C.

    Args:
        args: the command line.
        write: is called after every row, so that a run that is ended leaves what it has.
    """
    from benchmark_model import benchmark_model

    on_gpu = args.device.type == "cuda"
    device = torch.cuda.get_device_name(args.device) if on_gpu else "CPU"
    figures = dict(part=args.part, device=device, torch=torch.__version__)
    figures |= dict(runs=args.runs) if on_gpu else dict(threads=args.threads)
    figures |= dict(dtype=args.dtype, arch=args.arch, layers=args.setting.arch.num_layers)
    figures |= dict(patch_size=args.patch_size, seconds=args.seconds, rows=[])
    rows = benchmark_model(
        args.setting,
        args.contenders,
        modes=args.modes,
        sizes=args.sizes,
        batches=args.batches,
    )
    with suppress(KeyboardInterrupt):
        for figures["rows"] in rows:
            write(figures)
    return figures


def main() -> None:
    args = parse_args()

    def write(figures: dict) -> None:
        if args.json:
            args.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")

    figures = run_op(args) if args.part == "op" else run_model(args, write)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(op_table(figures) if args.part == "op" else model_table(figures))
    write(figures)
    if args.part != "op" and args.plot:
        from benchmark_plot import draw_times

        if not any("ms" in row for row in figures["rows"]):
            raise SystemExit("--plot: nothing was measured")
        args.plot.write_bytes(draw_times(figures))


if __name__ == "__main__":
    main()
