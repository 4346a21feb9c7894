#!/usr/bin/env python
"""Foreign weights for our encoders: python tools/convert_checkpoint.py TEACHER OUT.

A student's start from a teacher, or with `--compat gspn-v1` an encoder of GSPN's original code.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS
from rich.table import Table
from rich.text import Text

from cgspn_seg.checkpoints import CheckpointError, protect_checkpoint_loading
from cgspn_seg.checkpoints.export import (
    backbone_config,
    check_out,
    encode_backbone,
    file_sha256,
    read_backbone,
    take_backbone,
    tensors_sha256,
)
from cgspn_seg.checkpoints.gspn_v1 import choose_arch, convert_gspn_v1, read_gspn_v1
from cgspn_seg.engine import launch
from cgspn_seg.engine.cli import wide_console
from cgspn_seg.engine.options import Options
from cgspn_seg.models import CGSPN, GSPN_ARCHITECTURES
from cgspn_seg.models.distillation import (
    EncoderTeacher,
    Teacher,
    TimmTeacher,
    TransformersTeacher,
    student_config,
    warm_start,
)
from cgspn_seg.models.distillation.teachers.base import IMAGENET_MEAN, IMAGENET_STD
from cgspn_seg.models.distillation.warm_start import MIN_MATCH
from cgspn_seg.models.distillation.warm_start_report import group_keys
from cgspn_seg.models.mixers.gspn import COMPAT
from cgspn_seg.visualization.files import write_bytes


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options] TEACHER OUT [CONFIG]\n"
        f"       %(prog)s --compat {COMPAT} [--arch ARCH] [--no-ema] CHECKPOINT OUT",
        description="Write a student's backbone file with the patch embedding, norms and MLPs of a "
        "teacher and fresh mixers, or the encoder of a checkpoint of GSPN's original code, for "
        "init_cfg=dict(type='Pretrained', checkpoint=OUT)",
    )
    parser.add_argument(
        "teacher",
        help="folder with config.json and model.safetensors (transformers), weights of timm with "
        "--timm, or a backbone file of an encoder of ours; with --compat, the checkpoint",
    )
    parser.add_argument("out", help="file to write, .safetensors or .pth")
    parser.add_argument(
        "config", nargs="?", help="config file of the student (default: derived from the teacher)"
    )
    parser.add_argument("--timm", metavar="NAME", help="timm's name of the teacher")
    parser.add_argument(
        "--timm-options",
        nargs="+",
        action=Options,
        default={},
        metavar="KEY=VALUE",
        help="options that timm builds the teacher with, such as img_size=518",
    )
    derived = parser.add_argument_group("without CONFIG")
    derived.add_argument("--mixer", default="cgspn", help="the mixers (default: %(default)s)")
    derived.add_argument(
        "--arch",
        help="a named size instead of the teacher's own, such as small; with --compat, the "
        "checkpoint's (default: found by its channels)",
    )
    derived.add_argument(
        "--patch-size", type=int, help="side of a patch in pixels (default: the teacher's)"
    )
    parser.add_argument(
        "--prefix",
        default="backbone.",
        help="where the student is in CONFIG's model (default: %(default)s)",
    )
    parser.add_argument(
        "--keep-normalization",
        action="store_true",
        help="make a student for images normalized as the teacher's are (default: by ImageNet's "
        "mean and std, as the configs do it; the teacher's are folded into the patch embedding)",
    )
    parser.add_argument(
        "--min-match",
        type=float,
        default=MIN_MATCH,
        help="share of the tensors to fill below which nothing is written (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of what stays random (default: %(default)s)"
    )
    original = parser.add_argument_group("checkpoints of other code")
    original.add_argument(
        "--compat",
        choices=(COMPAT,),
        help="convert an image classifier of GSPN's original code to an encoder that computes the "
        "same, its directions' peculiarities included",
    )
    original.add_argument(
        "--no-ema",
        dest="ema",
        action="store_false",
        help="take the weights that were trained where the checkpoint has averaged ones too",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    launch.add_config_arguments(parser, runs=False)
    args = parser.parse_args()
    if args.compat:
        kept = ("teacher", "out", "arch", "compat", "ema", "force", "trust_checkpoint")
        changed = [k for k, v in vars(args).items() if v != parser.get_default(k)]
        if ignored := [k for k in changed if k not in kept]:
            parser.error(f"--compat makes no student: {ignored[0].replace('_', '-')} has no effect")
    elif not args.ema:
        parser.error("--no-ema is for checkpoints with --compat")
    if args.config is None and args.cfg_options:
        parser.error("--cfg-options changes CONFIG, and none is given")
    if args.config is not None and (args.arch or args.patch_size or args.mixer != "cgspn"):
        parser.error("--mixer, --arch and --patch-size are for a student without CONFIG")
    if args.timm_options and not args.timm:
        parser.error("--timm-options needs --timm NAME")
    return args


def read_teacher(args: argparse.Namespace) -> Teacher:
    """The teacher that the arguments mean.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        CheckpointError: If it is unreadable, of unknown kind, or does not fit its model.
    """
    path = Path(args.teacher).expanduser()
    if args.timm:
        return TimmTeacher(args.timm, path, **args.timm_options)
    if path.is_dir():
        return TransformersTeacher(path)
    try:
        read_backbone(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\nTEACHER: weights of timm need --timm NAME, and a model of transformers is "
            "given by its folder"
        ) from error
    return EncoderTeacher(checkpoint=path)


def build_student(args: argparse.Namespace, teacher: Teacher) -> tuple[CGSPN, dict]:
    """The student with random weights, and its config.

    Raises:
        ValueError: If the config's model has no CGSPN under the prefix.
    """
    if args.config is None:
        config, scope = student_config(teacher, args.mixer, args.patch_size), "mmseg"
        if args.arch:
            config["arch"] = args.arch
    else:
        cfg = launch.load_config(args)
        config, scope = backbone_config(cfg, f"{args.prefix.rstrip('.')}."), cfg.default_scope
    torch.manual_seed(args.seed)
    with DefaultScope.overwrite_default_scope(scope):
        student = MODELS.build(config)
    if not isinstance(student, CGSPN):
        raise ValueError(f"CONFIG: {args.prefix}: expected a CGSPN, got a {config['type']}")
    return student, config


def show(title: str, rows: Iterable[tuple[str, str, int, str]], notes: Sequence[str] = ()) -> None:
    """Print what went where, a row for all layers of a name."""
    table = Table(title=Text(f"{title}; * is a layer's number"))
    table.add_column("", no_wrap=True)
    table.add_column("tensor", overflow="fold")
    table.add_column("number", justify="right")
    table.add_column("", overflow="fold")
    last = None
    for kind, names, number, remark in rows:
        if last not in (None, kind):
            table.add_section()
        table.add_row("" if kind == last else kind, Text(names), str(number), Text(remark))
        last = kind
    console = wide_console()
    console.print(table)
    for note in notes:
        console.print(Text(f"- {note}"))


def start_student(args: argparse.Namespace, source: Path, out: Path) -> None:
    """Write a student's start from a teacher."""
    teacher = read_teacher(args)
    student, config = build_student(args, teacher)
    try:
        config_text = json.dumps(config)
    except TypeError as error:
        raise ValueError(f"CONFIG: {error}, so it cannot be stored with the weights") from error
    kept = args.keep_normalization
    mean, std = (teacher.mean, teacher.std) if kept else (IMAGENET_MEAN, IMAGENET_STD)
    report = warm_start(student, teacher, mean=mean, std=std, min_match=args.min_match)
    show(
        f"{report.num_filled} of {report.expected} tensors from {type(teacher.model).__name__} "
        f"({teacher.library})",
        report.rows(),
        report.notes,
    )
    filled = group_keys((*report.matched, *report.resized))
    weights = {k: v.contiguous() for k, v in teacher.model.state_dict().items()}
    facts = {
        "config": config_text,
        "source": source.name,
        "source_model": f"{args.timm or type(teacher.model).__name__} ({teacher.library})",
        "source_tensors_sha256": tensors_sha256(weights),
        "weights": f"started from the teacher: {report.num_filled} of {len(student.state_dict())} "
        f"tensors; the others as the encoder starts (mixers random, seed {args.seed})",
        "tensors_of_source": json.dumps({names: len(keys) for names, keys in filled.items()}),
        "seed": str(args.seed),
        "image_mean": json.dumps(list(mean)),
        "image_std": json.dumps(list(std)),
    }
    tensors = take_backbone(student.state_dict(), "", source.name)
    write_bytes(out, encode_backbone(tensors, facts, out.suffix))
    print_use(out, config)
    if kept:
        print(f"  data_preprocessor: mean={list(mean)}, std={list(std)}")


def convert_original(args: argparse.Namespace, source: Path, out: Path) -> None:
    """Write the encoder of a checkpoint of GSPN's original code."""
    weights, taken = read_gspn_v1(str(source), ema=args.ema)
    arch = args.arch or choose_arch(weights, GSPN_ARCHITECTURES, source.name)
    config = dict(type="GSPN", arch=arch, mixer_options=dict(compat=args.compat))
    encoder = MODELS.build(config)
    conversion = convert_gspn_v1(weights, encoder, source.name)
    show(
        f"{conversion.num_converted} of {len(conversion.tensors)} tensors of GSPN {arch} from "
        f"{source.name}: {taken}",
        conversion.rows(),
    )
    facts = {
        "config": json.dumps(config),
        "source": source.name,
        "source_sha256": file_sha256(source),
        "source_model": f"GSPN {arch} (original code)",
        "weights": taken,
        "image_mean": json.dumps(list(IMAGENET_MEAN)),
        "image_std": json.dumps(list(IMAGENET_STD)),
    }
    tensors = take_backbone(conversion.tensors, "", source.name)
    write_bytes(out, encode_backbone(tensors, facts, out.suffix))
    print_use(out, config)
    print("  on square feature maps: train on square crops, and test by windows:")
    print("  test_cfg = dict(mode='slide', crop_size=(512, 512), stride=(341, 341))")


def print_use(out: Path, config: dict) -> None:
    """Say how a file that was written is loaded."""
    print(f"Wrote {out}; load it with init_cfg=dict(type='Pretrained', checkpoint=...) in")
    print(f"  backbone = {config}")


def main() -> None:
    args = parse_args()
    protect_checkpoint_loading(trust=args.trust_checkpoint)
    source, out = Path(args.teacher).expanduser(), Path(args.out).expanduser()
    check_out(out, source, "CHECKPOINT" if args.compat else "TEACHER", args.force)
    if args.compat:
        convert_original(args, source, out)
    else:
        start_student(args, source, out)


if __name__ == "__main__":
    launch.run(main)
