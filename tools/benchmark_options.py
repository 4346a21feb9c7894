"""The command line of the benchmarks."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmark_op import DTYPES, PRESETS

from cgspn_seg.ops import DIRECTIONS

SIZES = (224, 392, 518, 1036, 2058, 4116)  # multiples of 14
BATCHES = (1, 8, 32)
ENCODER_SIZES, ENCODER_BATCHES = (512, 1024), (1, 8)
MIXERS = ("cgspn", "cgspn-lean", "attention")
BACKENDS = ("flash", "cudnn", "efficient", "math")
MODES = ("forward", "train")


def make_parser(description: str) -> tuple[argparse.ArgumentParser, dict]:
    """The parser, and those of its parts by their names."""
    parser = argparse.ArgumentParser(description=description)
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
    encoders = parts.add_parser(
        "encoders", help="whole encoders, ours beside MMSegmentation's Swin and ConvNeXt"
    )
    add_encoder_options(encoders)
    return parser, parts.choices


def positive_int(text: str) -> int:
    """An option's value, which argparse refuses unless it is an integer of at least 1."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def png_file(text: str) -> Path:
    """The name of a picture, which argparse refuses unless it ends in .png."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"expected a file that ends in .png, got {text}")
    return Path(text)


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
    add_case_options(
        what,
        SIZES,
        BATCHES,
        "forward, everything in the dtype, and a training step without the optimizer's, under "
        "autocast (default: both)",
    )
    add_timing_options(parser)
    parser.add_argument(
        "--plot", type=png_file, metavar="FILE.png", help="draw time against resolution"
    )
    add_shared_options(parser)


def add_encoder_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is timed")
    what.add_argument(
        "--encoders",
        nargs="+",
        metavar="NAME",
        help="such as cgspn-small, cgspn-lean-base, vit-base (C-GSPN's encoder with attention), "
        "gspn-tiny, gspn2-tiny, swin-tiny or convnext-tiny (default: all)",
    )
    what.add_argument(
        "--attention",
        choices=BACKENDS,
        help="PyTorch's backend of attention in the vit-* encoders (default: what it chooses)",
    )
    add_case_options(
        what,
        ENCODER_SIZES,
        ENCODER_BATCHES,
        "forward, and a training step without the optimizer's, both under autocast (default: both)",
    )
    what.add_argument(
        "--count-only",
        action="store_true",
        help="parameters and multiply-accumulates at each size; nothing is timed",
    )
    add_timing_options(parser)
    add_shared_options(parser)


def add_case_options(
    group: argparse._ArgumentGroup, sizes: Sequence[int], batches: Sequence[int], modes: str
) -> None:
    """Sizes, batches, modes and dtype; `modes` is the help on the third."""
    group.add_argument(
        "--sizes",
        type=positive_int,
        nargs="+",
        default=sizes,
        metavar="N",
        help=f"sides of the images, pixels (default: {' '.join(map(str, sizes))})",
    )
    group.add_argument(
        "--batches",
        type=positive_int,
        nargs="+",
        default=batches,
        metavar="N",
        help=f"images in a batch (default: {' '.join(map(str, batches))})",
    )
    group.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help=modes)
    group.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on a GPU, fp32 on the CPU"
    )


def add_timing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        type=torch.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:INDEX (default: a GPU where there is one)",
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="how long each is measured (default: 2)"
    )


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
