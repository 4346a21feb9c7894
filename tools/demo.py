#!/usr/bin/env python
"""Show what propagation is worth: train a tiny C-GSPN + UPerNet with it, and without.

    python tools/demo.py

draws mazes (tools/draw_mazes.py), trains both models on them (tools/train.py), scores them on mazes
they have not seen (tools/test.py), and leaves pictures and curves in work_dirs/demo. This takes two
minutes on two CPU cores, one for each model; a GPU is used if there is one. The exit code is 0 even
if the models come out closer than they should, which is said; 1 where a step fails.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
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


class Step:
    """A tool at work in a process of its own: its output goes to a file, its state to a bar.

    Args:
        title: What stands before the bar.
        command: The tool's name and its arguments.
        output: The file.
        progress: Where the bar is.
    """

    def __init__(
        self, title: str, command: Sequence[str | Path], output: Path, progress: Progress
    ) -> None:
        self.title = title
        self.command = [sys.executable, TOOLS / command[0], *command[1:]]
        self.output = output
        self.progress = progress
        self.task = progress.add_task(title, total=None, detail="starting")

    def start(self) -> subprocess.Popen:
        """Start the tool, on one thread: tensors are small, and two models share the machine."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with self.output.open("w", encoding="utf-8") as file:
            return subprocess.Popen(
                self.command,
                env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def watch(self) -> None:
        """Bring the bar up to date; called a few times a second, and once after the end."""

    def failure(self, code: int) -> StepFailed:
        """What to raise where the tool has ended with an error."""
        said = self.output.read_text(encoding="utf-8", errors="replace").splitlines()
        end = f"{self.title}: exit code {code}; all that was said is in {self.output}"
        return StepFailed("\n".join([*said[-LOG_TAIL:], "", end]))


class Training(Step):
    """tools/train.py; `log` is what it has logged, `None` before its first iterations."""

    def __init__(self, variant: Variant, args: argparse.Namespace, progress: Progress) -> None:
        self.folder = args.work_dir / variant.folder
        self.iterations = args.iters or configured_iterations(variant.config)
        self.earlier = set(self.folder.glob("*/vis_data"))
        self.log: TrainingLog | None = None
        self.reported = 0
        options = [f"randomness.seed={args.seed}"]
        if args.iters is not None:
            options += shortened_schedule(args.iters)
        command = ["train.py", variant.config, "--work-dir", self.folder, "--cfg-options", *options]
        super().__init__(f"Train {variant.title}", command, self.folder / "train.out", progress)

    def watch(self) -> None:
        for place in set(self.folder.glob("*/vis_data")) - self.earlier:
            try:
                self.log = read_training_log(place.parent)
            except (FileNotFoundError, ValueError):  # not written yet
                return
            self._show(self.log)

    def _show(self, log: TrainingLog) -> None:
        done, detail = log.train[-1]["step"], f"loss {log.train[-1]['loss']:.2f}"
        if log.validations:
            detail += f"  val mIoU {log.validations[-1].metrics['mIoU']:.1f}"
        self.progress.update(self.task, total=self.iterations, completed=done, detail=detail)
        if self.progress.disable and len(log.validations) > self.reported:
            self.reported = len(log.validations)
            self.progress.console.print(f"{self.title}: {done}/{self.iterations}, {detail}")


class Test(Step):
    """tools/test.py on what a training has left last; `result` is there after the end."""

    def __init__(self, variant: Variant, training: Training, progress: Progress) -> None:
        self.folder = training.folder / "test"
        self.earlier = set(self.folder.glob("*/*.json"))
        self.log = training.log
        self.result: Result | None = None
        checkpoint = (training.folder / "last_checkpoint").read_text(encoding="utf-8").strip()
        places = ["--work-dir", self.folder, "--out", self.folder / "predictions"]
        command = ["test.py", variant.config, checkpoint, *places]
        super().__init__(f"Score {variant.title}", command, training.folder / "test.out", progress)

    def watch(self) -> None:
        for scalars in set(self.folder.glob("*/*.json")) - self.earlier:
            if text := scalars.read_text(encoding="utf-8").strip():
                miou = json.loads(text)["mIoU"]
                self.result = Result(miou, self.log, self.folder / "predictions")
                self.progress.update(self.task, total=1, completed=1, detail=f"mIoU {miou:.1f}")


def run_side_by_side(steps: Sequence[Step]) -> None:
    """Run steps to their end; an error of one, or Ctrl-C, ends them all.

    Raises:
        StepFailed: A tool ended with an error.
    """
    processes: list[subprocess.Popen] = []
    try:
        for step in steps:
            processes.append(step.start())
        while running := [process for process in processes if process.poll() is None]:
            for step in steps:
                step.watch()
            with suppress(subprocess.TimeoutExpired):
                running[0].wait(timeout=0.25)
            for step, process in zip(steps, processes, strict=True):
                if process.poll():
                    raise step.failure(process.returncode)
        for step in steps:
            step.watch()
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def configured_iterations(config: Path) -> int:
    """The length of a config's training."""
    # MMEngine would announce each use of CGSPN_DATA on the terminal.
    return Config.fromfile(config, use_environment_variables=False).train_cfg.max_iters


def shortened_schedule(iterations: int) -> list[str]:
    """The config's schedule, with another number of iterations."""
    warm_up = max(2, iterations // 20)
    return [
        f"train_cfg.max_iters={iterations}",
        f"train_cfg.val_interval={max(2, iterations // 10)}",
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


def make_progress(console: Console) -> Progress:
    """Bars with an ETA; disabled where output is no terminal."""
    return Progress(
        TextColumn("{task.description:<25}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[detail]:<24}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
        disable=not console.is_terminal,
    )


def run_demo(args: argparse.Namespace, console: Console) -> None:
    """Go through all steps."""
    start = time.monotonic()
    data = default_folder()
    drawn = draw_set(MazeSet(seed=args.seed), data)
    console.print(f"The mazes are in {data}{'' if drawn else ', drawn before'}.")
    with make_progress(console) as progress:
        trainings = [Training(variant, args, progress) for variant in VARIANTS]
        run_side_by_side(trainings)
        tests = [Test(*pair, progress) for pair in zip(VARIANTS, trainings, strict=True)]
        run_side_by_side(tests)
    results = [test.result for test in tests]
    write_png(args.work_dir / "mazes.png", draw_sheet(data, results))
    titles = [variant.title for variant in VARIANTS]
    curves = draw_curves([result.log for result in results], titles)
    write_bytes(args.work_dir / "curves.png", curves)
    report(results, args, console)
    console.print(f"Done in {time.monotonic() - start:.0f} s.")


def main() -> int:
    args = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the tools too
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
