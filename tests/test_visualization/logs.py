"""Logs as MMEngine and MMSegmentation write them, for the tests that read some."""

import json
from collections.abc import Mapping
from pathlib import Path

from prettytable import PrettyTable

STAMP = "2026/11/20 12:00:00 - mmengine - INFO - "


def table(ious: Mapping[str, float]) -> list[str]:
    """The lines of MMSegmentation's table of results per class."""
    drawn = PrettyTable()
    drawn.add_column("Class", list(ious))
    drawn.add_column("IoU", list(ious.values()))
    drawn.add_column("Acc", list(ious.values()))
    return [f"{STAMP}per class results:", STAMP, *drawn.get_string().splitlines()]


def write_run(
    folder: Path,
    steps: range,
    validations: Mapping[int, Mapping[str, float]],
    *,
    scalars: bool = True,
) -> Path:
    """Write the log of one process.

    Args:
        folder: Where to; its name is the time at which the process started.
        steps: The iterations that were logged. Their loss is 100 / iteration.
        validations: IoU of the classes, by iteration.
        scalars: Whether a visualization backend has written scalars.json.
    """
    (folder / "vis_data").mkdir(parents=True)
    records, lines = [], []
    for step in steps:
        loss, lr = 100 / step, 1e-3 / step
        records.append({"lr": lr, "loss": loss, "decode.loss_ce": loss, "iter": step, "step": step})
        lines.append(
            f"{STAMP}Iter(train) [{step:5d}/{steps.stop}]  lr: {lr:.4e}  eta: 0:00:10  "
            f"time: 0.2000  data_time: 0.0100  loss: {loss:.4f}  decode.loss_ce: {loss:.4f}"
        )
        if step in validations:
            ious = validations[step]
            known = [value for value in ious.values() if value == value]
            mean = sum(known) / len(known)
            records.append({"aAcc": 90.0, "mIoU": mean, "mAcc": 50.0, "time": 0.1, "step": step})
            lines += table(ious)
            lines.append(
                f"{STAMP}Iter(val) [3/3]    aAcc: 90.0000  mIoU: {mean:.4f}  mAcc: 50.0000  "
                "data_time: 0.1  time: 0.1"
            )
    if scalars:
        text = "".join(f"{json.dumps(record)}\n" for record in records)
        (folder / "vis_data" / "scalars.json").write_text(text)
    (folder / f"{folder.name}.log").write_text("\n".join(lines) + "\n")
    return folder
