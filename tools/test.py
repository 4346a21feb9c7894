#!/usr/bin/env python
"""Score a segmentor: python tools/test.py CONFIG CHECKPOINT [options]."""

import argparse

from mmengine.config import Config

from cgspn_seg.datasets import check_data_paths
from cgspn_seg.engine import launch


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score a segmentor on the config's test data")
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="checkpoint file (.pth or .safetensors) or URL")
    parser.add_argument("--out", help="folder for the predicted label maps, as PNG files")
    parser.add_argument("--show", action="store_true", help="show every prediction in a window")
    parser.add_argument("--show-dir", help="folder for a picture of every prediction")
    parser.add_argument(
        "--wait-time", type=float, default=2, help="seconds for which --show shows each"
    )
    parser.add_argument("--tta", action="store_true", help="average over augmented inputs")
    launch.add_config_arguments(parser)
    return parser.parse_args()


def require_test_parts(cfg: Config) -> None:
    """Check that the config says what to test on and what to score."""
    missing = [k for k in ("test_dataloader", "test_evaluator", "test_cfg") if not cfg.get(k)]
    if missing:
        raise ValueError(
            f"config: {', '.join(missing)} missing, so there is nothing to test; a config that is "
            "tested has test_dataloader, test_evaluator and test_cfg=dict(type='TestLoop')"
        )


def configure_pictures(cfg: Config, args: argparse.Namespace) -> None:
    """Let MMSegmentation's visualization hook draw every test image."""
    hook = cfg.get("default_hooks", {}).get("visualization")
    if hook is None:
        raise ValueError(
            "--show, --show-dir: the config has no default_hooks.visualization to draw with; add "
            "dict(type='SegVisualizationHook')"
        )
    hook.update(draw=True, interval=1)
    if args.show:
        hook.update(show=True, wait_time=args.wait_time)
    if args.show_dir:
        cfg.visualizer.save_dir = args.show_dir


def configure_tta(cfg: Config) -> None:
    """Put the config's test-time augmentation in the place of its model and test pipeline."""
    for key in ("tta_model", "tta_pipeline"):
        if key not in cfg:
            raise ValueError(
                f"--tta: the config has no {key}; add `tta_model = dict(type='SegTTAModel')` and a "
                "tta_pipeline that ends in a TestTimeAug transform"
            )
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.tta_model.module = cfg.model
    cfg.model = cfg.tta_model


def main() -> None:
    args = parse_args()
    cfg = launch.load_config(args)
    require_test_parts(cfg)
    cfg.load_from, cfg.resume = args.checkpoint, False
    if args.show or args.show_dir:
        configure_pictures(cfg, args)
    if args.tta:
        configure_tta(cfg)
    if args.out is not None:
        evaluators = cfg.test_evaluator
        for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
            evaluator.update(output_dir=args.out, keep_results=True)
    check_data_paths(cfg, ("test_dataloader",))
    launch.build_runner(cfg, for_prediction=True).test()


if __name__ == "__main__":
    launch.run(main)
