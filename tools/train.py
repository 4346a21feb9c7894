#!/usr/bin/env python
"""Train a segmentor: python tools/train.py CONFIG [options]."""

import argparse

from cgspn_seg.datasets import check_data_paths
from cgspn_seg.engine import launch


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a segmentor")
    parser.add_argument("config", nargs="?", help="config file")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="resume from a checkpoint (default: the latest in the work folder)",
    )
    parser.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="train with automatic mixed precision, or without what the config has of it",
    )
    parser.add_argument(
        "--cuda-graph",
        action="store_true",
        help="replay the model from CUDA graphs: small models train faster; one GPU, crops of one "
        "size",
    )
    launch.add_config_arguments(parser)
    args = parser.parse_args()
    # `train.py --resume CONFIG` works in MMSegmentation, where --resume takes no value.
    if args.config is None and str(args.resume).endswith((".py", ".yaml", ".yml", ".json")):
        args.config, args.resume = args.resume, "auto"
    if args.config is None:
        parser.error("the following arguments are required: config")
    return args


def main() -> None:
    args = parse_args()
    cfg = launch.load_config(args)
    launch.configure_amp(cfg, args.amp)
    if args.cuda_graph:
        cfg.custom_hooks = [*cfg.get("custom_hooks", []), dict(type="CUDAGraphHook")]
    launch.configure_resume(cfg, args.resume)
    check_data_paths(cfg, ("train_dataloader", "val_dataloader"))
    launch.train(launch.build_runner(cfg))


if __name__ == "__main__":
    launch.run(main)
