#!/usr/bin/env python
"""Show what propagation is worth: train a tiny C-GSPN + UPerNet with it, and without.

    python tools/demo.py

draws mazes (tools/draw_mazes.py), trains both models on them (tools/train.py), scores them on mazes
they have not seen (tools/test.py), and leaves pictures and curves in work_dirs/demo. This takes two
minutes on two CPU cores; a GPU is used if there is one. The exit code is 0 even if the models come
out closer than they should, which is said; 1 where a step fails.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from draw_mazes import PALETTE, WALL, MazeSet, default_folder, draw_set
from mmengine.config import Config
from PIL import Image
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from cgspn_seg.visualization import colorize, panel_grid
from cgspn_seg.visualization.curves import draw_curves
from cgspn_seg.visualization.files import write_bytes, write_png
from cgspn_seg.visualization.training_log import TrainingLog, read_training_log

TOOLS = Path(__file__).resolve().parent
CONFIGS = TOOLS.parent / "configs" / "demo"
EXPECTED_GAP = 20  # mIoU points; about 40 are usual
SAMPLES = 5  # rows of the sheet
MAX_THREADS = 4  # small tensors: more threads wait for each other
LOG_TAIL = 20  # lines shown where a step fails


@dataclass(frozen=True)
class Variant:
    """One of the two models: its name in what is shown, its folder, its config."""

    title: str
    folder: str
    config: Path


VARIANTS = (
    Variant("C-GSPN", "cgspn", CONFIGS / "cgspn-demo_upernet_1xb8-0.5k_maze-64x64.py"),
    Variant(
        "no propagation",
        "no-propagation",
        CONFIGS / "cgspn-demo-no-propagation_upernet_1xb8-0.5k_maze-64x64.py",
    ),
)


@dataclass(frozen=True)
class Result:
    """What became of a model: mIoU in percent, the log of its training, its label maps."""

    miou: float
    log: TrainingLog
    predictions: Path


class StepFailed(Exception):
    """A tool ended with an error; the message has the end of what it said."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of mazes and trainings (default: 0)")
    parser.add_argument("--iters", type=int, help="length of a training (default: the config's)")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("work_dirs", "demo"),
        help="folder for pictures, logs and checkpoints (default: work_dirs/demo)",
    )
    args = parser.parse_args()
    if args.iters is not None and args.iters < 4:
        parser.error(f"--iters: expected at least 4, got {args.iters}")
    return args


class Display:
    """Shows a bar with an ETA for each step; where output is no terminal, a line now and then."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description:<25}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[detail]:<24}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )

    def train(
        self, variant: Variant, iterations: int, command: list[str], folder: Path
    ) -> TrainingLog:
        """Run a training to its end."""
        task = self.progress.add_task(f"Train {variant.title}", total=None, detail="starting")
        earlier = set(folder.glob("*/vis_data"))
        reported = 0

        def watch() -> TrainingLog | None:
            nonlocal reported
            log = read_new_log(folder, earlier)
            if log is not None:
                step, detail = log.train[-1]["step"], describe(log)
                self.progress.update(task, total=iterations, completed=step, detail=detail)
                if not self.console.is_terminal and len(log.validations) > reported:
                    reported = len(log.validations)
                    self.console.print(f"Train {variant.title}: {step}/{iterations}, {detail}")
            return log

        run_tool(command, folder / "train.out", watch)
        log = watch()
        if log is None:
            raise StepFailed(f"{command[1]} left no log in {folder}")
        return log

    def score(self, variant: Variant, command: list[str], folder: Path) -> float:
        """Run a test to its end; returns the mIoU it found."""
        task = self.progress.add_task(f"Score {variant.title}", total=None, detail="")
        run_tool(command, folder / "test.out", lambda: None)
        newest = max(folder.glob("test/*/*.json"), key=lambda path: path.stat().st_mtime)
        miou = float(json.loads(newest.read_text(encoding="utf-8").splitlines()[-1])["mIoU"])
        self.progress.update(task, total=1, completed=1, detail=f"mIoU {miou:.1f}")
        return miou


def read_new_log(folder: Path, earlier: set[Path]) -> TrainingLog | None:
    """The log of the run that has started since, once it holds an iteration."""
    for place in set(folder.glob("*/vis_data")) - earlier:
        try:
            return read_training_log(place.parent)
        except (FileNotFoundError, ValueError):  # not written yet
            pass
    return None


def describe(log: TrainingLog) -> str:
    """Where a training stands, in a few words."""
    detail = f"loss {log.train[-1]['loss']:.2f}"
    if log.validations:
        detail += f"  val mIoU {log.validations[-1].metrics['mIoU']:.1f}"
    return detail


def run_tool(command: list[str], output: Path, watch: Callable[[], object]) -> None:
    """Run a tool with its output in a file.

    Args:
        command: What to run.
        output: The file.
        watch: Called a few times a second.

    Raises:
        StepFailed: The tool ended with an error.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    threads = str(min(MAX_THREADS, len(os.sched_getaffinity(0))))
    env = {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONUNBUFFERED": "1"}
    with output.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            while True:
                try:
                    process.wait(timeout=0.25)
                    break
                except subprocess.TimeoutExpired:
                    watch()
        finally:  # on Ctrl-C
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        said = output.read_text(encoding="utf-8", errors="replace").splitlines()
        tool = Path(command[1]).name
        raise StepFailed(
            "\n".join(said[-LOG_TAIL:])
            + f"\n\n{tool} ended with exit code {process.returncode}; all it said is in {output}"
        )


def train_and_score(variant: Variant, args: argparse.Namespace, display: Display) -> Result:
    """Train a model by tools/train.py, then score its last weights by tools/test.py."""
    folder = args.work_dir / variant.folder
    iterations = args.iters or configured_iterations(variant.config)
    options = [f"randomness.seed={args.seed}"]
    if args.iters is not None:
        options += shortened_schedule(args.iters)
    command = tool_command("train.py", variant.config, "--work-dir", folder)
    log = display.train(variant, iterations, [*command, "--cfg-options", *options], folder)

    checkpoint = (folder / "last_checkpoint").read_text(encoding="utf-8").strip()
    predictions = folder / "predictions"
    command = tool_command("test.py", variant.config, checkpoint, "--out", predictions)
    miou = display.score(variant, [*command, "--work-dir", str(folder / "test")], folder)
    return Result(miou, log, predictions)


def tool_command(tool: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, str(TOOLS / tool), *map(str, arguments)]


def configured_iterations(config: Path) -> int:
    """The length of a config's training."""
    # MMEngine would announce each use of CGSPN_DATA on the terminal.
    return Config.fromfile(config, use_environment_variables=False).train_cfg.max_iters


def shortened_schedule(iterations: int) -> list[str]:
    """The config's schedule, with another number of iterations."""
    warm_up = max(2, iterations // 20)
    return [
        f"train_cfg.max_iters={iterations}",
        f"train_cfg.val_interval={max(1, iterations // 10)}",
        f"default_hooks.checkpoint.interval={iterations}",
        f"default_hooks.logger.interval={max(1, iterations // 100)}",
        f"param_scheduler.0.end={warm_up}",
        f"param_scheduler.1.begin={warm_up}",
        f"param_scheduler.1.end={iterations}",
    ]


def draw_sheet(data: Path, results: list[Result]) -> np.ndarray:
    """The first validation mazes: image, label, and what each model makes of them."""
    palette = np.array((WALL, *PALETTE), np.uint8)
    rows = []
    for image in sorted((data / "images" / "validation").iterdir())[:SAMPLES]:
        name = f"{image.stem}.png"
        label = np.asarray(Image.open(data / "annotations" / "validation" / name))
        # The color of a wall is asked of nobody.
        predicted = [np.asarray(Image.open(r.predictions / name)) * (label > 0) for r in results]
        rows.append(
            [np.asarray(Image.open(image)), *(colorize(x, palette) for x in (label, *predicted))]
        )
    scored = [f"{v.title}: {r.miou:.1f} mIoU" for v, r in zip(VARIANTS, results, strict=True)]
    return panel_grid(rows, ["image", "label", *scored], min_side=256)


def report(results: list[Result], args: argparse.Namespace, console: Console) -> None:
    """Print both mIoU, and what to look at."""
    table = Table("", Column("mIoU", justify="right"), box=box.SIMPLE)
    for variant, result in zip(VARIANTS, results, strict=True):
        table.add_row(variant.title, f"{result.miou:.1f}")
    with_it, without = (round(result.miou, 1) for result in results)
    gap = with_it - without
    table.add_row("difference", f"{gap:+.1f}", style="bold")
    console.print(table)
    if gap < EXPECTED_GAP:
        why = " (--iters is short)" if args.iters else ""
        console.print(f"The difference is below the {EXPECTED_GAP} points to expect{why}.")
    console.print(f"Look at {args.work_dir}/mazes.png and {args.work_dir}/curves.png.")


def run_demo(args: argparse.Namespace, console: Console) -> None:
    """Go through all steps."""
    start = time.monotonic()
    data = default_folder()
    drawn = draw_set(MazeSet(seed=args.seed), data)
    console.print(f"The mazes are in {data}{'' if drawn else ', drawn before'}.")
    display = Display(console)
    with display.progress:
        results = [train_and_score(variant, args, display) for variant in VARIANTS]
    write_png(args.work_dir / "mazes.png", draw_sheet(data, results))
    titles = [variant.title for variant in VARIANTS]
    curves = draw_curves([result.log for result in results], titles)
    write_bytes(args.work_dir / "curves.png", curves)
    report(results, args, console)
    console.print(f"Done in {time.monotonic() - start:.0f} s.")


def main() -> int:
    args = parse_args()
    console = Console(highlight=False, soft_wrap=True)
    try:
        run_demo(args, console)
    except StepFailed as error:
        console.print(f"\n{error}", markup=False)
        return 1
    except FileExistsError as error:
        console.print(f"demo.py: error: {error}", markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("\ndemo.py: interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
