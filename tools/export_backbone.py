#!/usr/bin/env python
"""Take the backbone out of a checkpoint: python tools/export_backbone.py CONFIG CHECKPOINT OUT."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS
from rich.table import Table
from rich.text import Text

from cgspn_seg.checkpoints import (
    CheckpointError,
    load_checkpoint,
    load_weights,
    protect_checkpoint_loading,
    require_complete,
)
from cgspn_seg.checkpoints.export import (
    BACKBONE_SUFFIXES,
    backbone_config,
    check_out,
    choose_weights,
    encode_backbone,
    file_sha256,
    read_backbone,
    take_backbone,
)
from cgspn_seg.engine import launch
from cgspn_seg.engine.cli import wide_console
from cgspn_seg.visualization.files import write_bytes

DTYPES = ("float32", "float16", "bfloat16")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options] CONFIG CHECKPOINT OUT\n       %(prog)s --info FILE",
        description="Write a checkpoint's backbone alone, with its config, hash and provenance "
        "inside, for init_cfg=dict(type='Pretrained', checkpoint=OUT)",
    )
    parser.add_argument("config", nargs="?", help="config file that the checkpoint was trained by")
    parser.add_argument("checkpoint", nargs="?", help="checkpoint file (.pth or .safetensors)")
    parser.add_argument("out", nargs="?", help="file to write, .safetensors or .pth")
    parser.add_argument("--info", metavar="FILE", help="show what such a file holds, and verify it")
    parser.add_argument(
        "--prefix",
        default="backbone.",
        help="where the backbone is, both in the checkpoint's keys and in the config's model, such "
        "as student.backbone. (default: %(default)s)",
    )
    parser.add_argument(
        "--no-ema",
        dest="ema",
        action="store_false",
        help="take the weights that were trained where the checkpoint has averaged ones too",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="convert the weights (default: as they are)"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    launch.add_config_arguments(parser, runs=False)
    args = parser.parse_args()
    given = [arg for arg in (args.config, args.checkpoint, args.out) if arg is not None]
    if args.info is None and len(given) == 1 and Path(given[0]).suffix in BACKBONE_SUFFIXES:
        args.info = given.pop()
    if len(given) != (3 if args.info is None else 0):
        parser.error("expected CONFIG CHECKPOINT OUT, or --info FILE alone")
    return args


def require_fit(config: dict, tensors: Mapping[str, torch.Tensor], cfg: Config, name: str) -> None:
    """Load the tensors into a new backbone of the config, every key accounted for.

    Args:
        config: The backbone's config.
        tensors: Its tensors.
        cfg: The whole config, for the scope of its names.
        name: The checkpoint's, for messages.

    Raises:
        CheckpointError: If they do not fit.
    """
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        backbone = MODELS.build(config)
    require_complete(load_weights(backbone, tensors), name, for_prediction=False)
    # Encoders interpolate their positional embedding as they load, so its size passes above.
    for key, own in backbone.state_dict().items():
        if key in tensors and own.shape != tensors[key].shape:
            raise CheckpointError(
                f"{name}: {key} is {tuple(tensors[key].shape)}, the config's {tuple(own.shape)}: "
                "the file was trained with another img_size. Export with the config it was trained "
                "with; the file can then be loaded at any size"
            )


def export(args: argparse.Namespace) -> None:
    """Write the backbone file that the arguments ask for."""
    checkpoint, out = Path(args.checkpoint).expanduser(), Path(args.out).expanduser()
    check_out(out, checkpoint, "CHECKPOINT", args.force)
    if "://" in args.checkpoint:
        raise ValueError(f"CHECKPOINT: {args.checkpoint}: download it first, to a file to hash")
    prefix = f"{args.prefix.rstrip('.')}."
    cfg = launch.load_config(args)
    config = backbone_config(cfg, prefix)
    try:
        config_text = json.dumps(config)
    except TypeError as error:
        raise ValueError(f"config: {prefix}: {error}, so it cannot be stored with it") from error

    content = load_checkpoint(str(checkpoint))
    meta = content.get("meta") or {}
    weights, taken = choose_weights(content, checkpoint.name, ema=args.ema)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    tensors = take_backbone(weights, prefix, checkpoint.name, dtype)
    require_fit(config, tensors, cfg, checkpoint.name)

    dataset = (cfg.get("train_dataloader") or {}).get("dataset") or {}
    # Names of files without their folders, which are nobody else's business.
    facts = {
        "config": config_text,
        "config_file": Path(args.config).name,
        "source": checkpoint.name,
        "source_sha256": file_sha256(checkpoint),
        "source_prefix": prefix,
        "weights": taken,
        "iteration": meta.get("iter"),
        "epoch": meta.get("epoch"),
        "trained_as": meta.get("experiment_name"),
        "dataset": dataset.get("type"),
    }
    known = {key: str(value) for key, value in facts.items() if value is not None}
    write_bytes(out, encode_backbone(tensors, known, out.suffix))


def show(path: Path) -> None:
    """Print what a backbone file holds.

    Args:
        path: The file.

    Raises:
        CheckpointError: If it is none, or its tensors are not those that were exported.
    """
    file = read_backbone(path)
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in file.tensors.values())
    rows = {
        "tensors": f"{len(file.tensors)} "
        f"({', '.join(f'{number} {dtype}' for dtype, number in dtypes.items())}), "
        f"{sum(t.numel() for t in file.tensors.values()):,} numbers",
        **{key: file.facts[key] for key in sorted(file.facts)},
    }
    rows["tensors_sha256"] += " (verified)" if file.is_intact else " (NOT what is in the file)"
    table = Table(title=Text(str(path)), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(key, Text(value))  # as it is: brackets are markup otherwise
    wide_console().print(table)
    if not file.is_intact:
        sys.stdout.flush()
        raise CheckpointError(
            f"{path}: damaged or changed: its tensors hash to {file.sha256}, and "
            f"{file.facts['tensors_sha256']} were exported. Copy or export it again."
        )


def main() -> None:
    args = parse_args()
    if args.info is None:
        export(args)
        print(f"Wrote {args.out}; load it with init_cfg=dict(type='Pretrained', checkpoint=...)")
    else:
        protect_checkpoint_loading(trust=args.trust_checkpoint)
    show(Path(args.info or args.out).expanduser())


if __name__ == "__main__":
    launch.run(main)
