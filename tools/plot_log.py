#!/usr/bin/env python
"""Draw learning curves: python tools/plot_log.py WORK_DIR_OR_LOG [more ...] --out FILE.png."""

import argparse
from pathlib import Path

from cgspn_seg.engine import launch
from cgspn_seg.visualization.curves import draw_curves
from cgspn_seg.visualization.files import write_bytes
from cgspn_seg.visualization.layer_curves import draw_layer_curves, has_layers
from cgspn_seg.visualization.training_log import read_training_log


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw loss, learning rate, mIoU and per-class IoU of training runs, logged by "
        "these tools or by MMSegmentation's own; several runs are overlaid. Of one distillation, "
        "draw how close each layer is to the teacher's"
    )
    parser.add_argument("logs", nargs="+", help="work folders, or log files (.json, .log)")
    parser.add_argument("--out", required=True, help="the picture to write (.png)")
    parser.add_argument("--labels", nargs="+", help="a name for each run (default: its folder's)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    out = Path(args.out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out: expected a file that ends in .png, got {out}")
    if args.labels is not None and len(args.labels) != len(args.logs):
        raise ValueError(
            f"--labels: expected one for each of the {len(args.logs)} runs, got {len(args.labels)}"
        )
    runs = [read_training_log(path) for path in args.logs]
    labels = args.labels or [run.name for run in runs]
    if any(has_layers(run) for run in runs):
        if len(runs) > 1:
            raise ValueError(
                "logs: distillations are drawn one at a time, with a picture of their own; got "
                f"{len(runs)} runs, of which {', '.join(r.name for r in runs if has_layers(r))}"
            )
        write_bytes(out, draw_layer_curves(runs[0], labels[0]))
    else:
        write_bytes(out, draw_curves(runs, labels))
    for run, label in zip(runs, labels, strict=True):
        parts = ", ".join(f"{name} (iterations {low}-{high})" for name, low, high in run.parts)
        print(f"{label}: {len(run.validations)} validations; {parts}")
    print(f"Wrote {out}")


if __name__ == "__main__":
    launch.run(main)
