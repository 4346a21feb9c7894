#!/usr/bin/env python
"""Times the project's parts against their references: python tools/benchmark.py PART [options]."""

import argparse
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace

import torch
from benchmark_op import DTYPES, PRESETS, Case, benchmark_op
from benchmark_options import BACKENDS, make_parser
from benchmark_table import WIDTH, encoder_table, model_table, op_table
from rich.console import Console

COARSEST_STRIDE = 32
"""Of the encoders with stages, in pixels."""

TABLES = dict(op=op_table, block=model_table, model=model_table, encoders=encoder_table)


def parse_args() -> argparse.Namespace:
    parser, parts = make_parser(__doc__)
    args = parser.parse_args()
    chosen = parts[args.part]
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
        if args.preset and (given := [n for n in own if getattr(args, n) != chosen.get_default(n)]):
            chosen.error(f"--preset: its cases say the {given[0]} themselves")
        return args
    args.dtype = args.dtype or ("bf16" if args.device.type == "cuda" else "fp32")
    complete = complete_encoder_options if args.part == "encoders" else complete_model_options
    complete(args, chosen)
    return args


def complete_model_options(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Fills in what depends on the device, and turns names into a Setting and Contenders."""
    # Here, since these import MMSegmentation, which takes seconds and which `op` can do without.
    from benchmark_contenders import make_contenders
    from benchmark_model import MixerSetting

    from cgspn_seg.models.arch import resolve_architecture

    on_gpu = args.device.type == "cuda"
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
    args.setting = MixerSetting(
        part=args.part, arch=arch, patch_size=args.patch_size, **timing_options(args)
    )


def complete_encoder_options(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Turns names into NamedEncoders, and the rest into an EncoderSetting."""
    from benchmark_encoders import EncoderSetting
    from benchmark_named import find_encoders

    if min(args.sizes) < COARSEST_STRIDE:
        parser.error(
            f"--sizes: {min(args.sizes)} is less than the coarsest stride, {COARSEST_STRIDE}"
        )
    try:
        args.contenders = find_encoders(args.encoders)
    except ValueError as error:
        parser.error(f"--encoders: {error}")
    args.setting = EncoderSetting(attention=args.attention, **timing_options(args))


def timing_options(args: argparse.Namespace) -> dict:
    """What every Setting has."""
    return dict(
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

    facts = dict(arch=args.arch, layers=args.setting.arch.num_layers, patch_size=args.patch_size)
    rows = benchmark_model(
        args.setting,
        args.contenders,
        modes=args.modes,
        sizes=args.sizes,
        batches=args.batches,
    )
    return collect(args, facts, rows, write)


def run_encoders(args: argparse.Namespace, write: Callable[[dict], None]) -> dict:
    """Measures, or only counts, the encoders that the command line names, until Ctrl-C.

    Args:
        args: the command line.
        write: is called after every row, so that a run that is ended leaves what it has.
    """
    from benchmark_encoders import benchmark_encoders, count_encoders

    facts = dict(attention=args.attention, layout="channels_last")
    if args.count_only:
        rows = count_encoders(args.contenders, args.sizes)
    else:
        rows = benchmark_encoders(
            args.setting,
            args.contenders,
            modes=args.modes,
            sizes=args.sizes,
            batches=args.batches,
        )
    return collect(args, facts, rows, write)


def collect(
    args: argparse.Namespace,
    facts: dict,
    rows: Iterable[list[dict]],
    write: Callable[[dict], None],
) -> dict:
    """The figures of a run: where and how it was measured, `facts`, and the last `rows`."""
    on_gpu = args.device.type == "cuda"
    device = torch.cuda.get_device_name(args.device) if on_gpu else "CPU"
    figures = dict(part=args.part, device=device, torch=torch.__version__)
    figures |= dict(runs=args.runs) if on_gpu else dict(threads=args.threads)
    figures |= dict(dtype=args.dtype, **facts, seconds=args.seconds, rows=[])
    with suppress(KeyboardInterrupt):
        for figures["rows"] in rows:
            write(figures)
    return figures


def main() -> None:
    args = parse_args()

    def write(figures: dict) -> None:
        if args.json:
            args.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")

    if args.part == "op":
        figures = run_op(args)
    else:
        figures = (run_encoders if args.part == "encoders" else run_model)(args, write)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(TABLES[args.part](figures))
    write(figures)
    if getattr(args, "plot", None):
        from benchmark_plot import draw_times

        if not any("ms" in row for row in figures["rows"]):
            raise SystemExit("--plot: nothing was measured")
        args.plot.write_bytes(draw_times(figures))


if __name__ == "__main__":
    main()
