"""What the tools share: the way from a command line to a runner."""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import sys
from pathlib import Path

import cgspn_seg
from cgspn_seg import compat  # noqa: F401  (before mmseg)

# isort: split
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.runner import Runner
from mmseg.registry import RUNNERS

from cgspn_seg import datasets, models  # noqa: F401  (their parts, for configs without them)
from cgspn_seg.checkpoints import CheckpointCheckHook, protect_checkpoint_loading
from cgspn_seg.engine.cli import INTERRUPTED, is_interruption, message_of, run
from cgspn_seg.engine.hooks import (
    CheckScheduleHook,
    FSDPHook,
    PeakMemoryHook,
    RunComplete,
    SaveSubsetHook,
    check_strategy,
)
from cgspn_seg.engine.options import CHANNELS_LAST, OWN_KEYS, UPSTREAM_KEYS, Options, merge_options

__all__ = [
    "add_config_arguments",
    "build_runner",
    "configure_amp",
    "configure_resume",
    "load_config",
    "run",
    "train",
]

_CONFIG_SUFFIXES = (".py", ".yaml", ".yml", ".json")
_PACKAGE = Path(cgspn_seg.__file__).parent


def add_config_arguments(parser: argparse.ArgumentParser, *, runs: bool = True) -> None:
    """Add the arguments that every tool with a config has.

    Args:
        parser: The tool's parser.
        runs: Whether the tool builds a runner: adds `--work-dir`, `--launcher`, `--local_rank`.
    """
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=Options,
        metavar="KEY=VALUE",
        help="override config values, such as train_dataloader.batch_size=8 or key='[a,b]'",
    )
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="load checkpoints that hold more than tensors and MMEngine's run state; such a file "
        "can run any code, so only for files from a source you trust",
    )
    if runs:
        parser.add_argument(
            "--work-dir",
            help="folder for logs and checkpoints (default: the config's work_dir, or "
            "work_dirs/<config name>)",
        )
        parser.add_argument(
            "--launcher",
            choices=("none", "pytorch", "slurm", "mpi"),
            default="none",
            help="job launcher of distributed training",
        )
        # torchrun passes the one, older launchers the other.
        parser.add_argument(
            "--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS
        )


def load_config(args: argparse.Namespace) -> Config:
    """Read the config of a command line and prepare the process for it.

    Merges `--cfg-options`, settles the work folder, the launcher and MMSegmentation's scope, and
    protects checkpoint loading unless `--trust-checkpoint` is given.

    Args:
        args: Parsed arguments: `config` and those of :func:`add_config_arguments`.

    Returns:
        The config, ready for :func:`build_runner`.

    Raises:
        FileNotFoundError: If there is no such config; the message has the closest names.
        ValueError: If it cannot be read, or an option or a key is read by nothing.
    """
    protect_checkpoint_loading(trust=args.trust_checkpoint)
    cfg = _read_config(args.config)
    merge_options(cfg, args.cfg_options or {})
    _check_own_keys(cfg)
    _check_slide(cfg)
    cfg.setdefault("default_scope", "mmseg")
    if not hasattr(args, "launcher"):
        return cfg
    cfg.launcher = args.launcher
    if args.launcher != "none":
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
        if get_device() == "cpu":
            raise ValueError(
                f"--launcher {args.launcher}: distributed runs need GPUs (MMEngine's DDP), and "
                "none is visible; leave --launcher out to run on the CPU"
            )
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = str(Path("work_dirs", Path(args.config).stem))
    return cfg


def _read_config(filename: str) -> Config:
    path = Path(filename).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        nearby = _closest_configs(path)
        hint = f"; did you mean {' or '.join(nearby)}?" if nearby else ""
        raise FileNotFoundError(f"config: {path.absolute()} {what}{hint}")
    if path.suffix not in _CONFIG_SUFFIXES:
        raise ValueError(
            f"config: expected a file ending in {', '.join(_CONFIG_SUFFIXES)}, got {path}"
        )
    try:
        return Config.fromfile(path)
    except Exception as error:  # a config is a program, which can fail in any way
        # Where custom_imports fail, MMEngine lists sys.path; what was raised first is enough.
        cause: BaseException = error
        while isinstance(cause, ImportError) and (cause.__cause__ or cause.__context__):
            cause = cause.__cause__ or cause.__context__
        raise ValueError(
            f"config: {path} cannot be read: {type(cause).__name__}: {message_of(cause)}"
        ) from error


def _closest_configs(path: Path) -> list[str]:
    """Paths of existing configs with a name like that of `path`, at most three."""
    folder = path if path.is_dir() else path.parent
    places = [folder, _PACKAGE.parent / "configs"]
    found = {
        config.name: config
        for place in reversed(places)
        if place.is_dir()
        for config in (place.rglob("*.py") if place.name == "configs" else place.glob("*.py"))
        if "_base_" not in config.parts
    }
    names = difflib.get_close_matches(path.name, found, n=3, cutoff=0.6)
    return [os.path.relpath(found[name]) for name in names]


def _check_own_keys(cfg: Config) -> None:
    for key in cfg.keys() - UPSTREAM_KEYS - {*OWN_KEYS}:
        # More alike than for other names: a config may have variables of its own.
        if near := difflib.get_close_matches(key, OWN_KEYS, n=1, cutoff=0.8):
            raise ValueError(f"config: nothing reads the key {key!r}; did you mean {near[0]!r}?")
    channels_last = cfg.get(CHANNELS_LAST, False)
    if not isinstance(channels_last, bool):
        raise ValueError(f"config: {CHANNELS_LAST}: expected True or False, got {channels_last!r}")


def _check_slide(cfg: Config) -> None:
    """Inference by slides needs their size, which MMSegmentation looks up at the first image."""
    options = (cfg.get("model") or {}).get("test_cfg") or {}
    missing = [key for key in ("crop_size", "stride") if not options.get(key)]
    if options.get("mode") == "slide" and missing:
        raise ValueError(
            "config: model.test_cfg.mode='slide' needs model.test_cfg.crop_size and "
            f"model.test_cfg.stride, each (height, width) in pixels; {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing. Set them, or mode='whole'"
        )


def configure_amp(cfg: Config, amp: bool | None) -> None:
    """Switch automatic mixed precision on or off, and check that the machine can do it.

    `--amp` means bfloat16, which needs no loss scaling, where the GPU computes in it, and float16
    with dynamic loss scaling elsewhere; `dtype` and `loss_scale` in the config win.

    Args:
        cfg: The config; its `optim_wrapper` is changed.
        amp: On, off, or (`None`) as the config says.

    Raises:
        ValueError: If mixed precision is asked for without a GPU or with another kind of
            optimizer wrapper, or the config has no optimizer wrapper at all.
    """
    if not cfg.get("optim_wrapper"):
        raise ValueError("config: optim_wrapper is missing, so there is nothing to train with")
    wrapper = cfg.optim_wrapper
    kind = wrapper.setdefault("type", "OptimWrapper")
    if amp is False and kind == "AmpOptimWrapper":
        wrapper.type = "OptimWrapper"
        for key in ("dtype", "loss_scale", "use_fsdp"):
            wrapper.pop(key, None)
    elif amp and kind not in ("OptimWrapper", "AmpOptimWrapper"):
        raise ValueError(
            f"--amp: works with optim_wrapper.type='OptimWrapper', the config has {kind!r}"
        )
    elif amp or kind == "AmpOptimWrapper":
        if get_device() == "cpu":
            asked = "--amp" if amp else "optim_wrapper.type='AmpOptimWrapper' in the config"
            raise ValueError(
                f"{asked}: mixed precision needs a GPU, and none is visible; "
                f"{'leave --amp out' if amp else 'pass --no-amp'} to train in float32 on the CPU"
            )
        if kind == "OptimWrapper":
            wrapper.type = "AmpOptimWrapper"
            bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)
            dtype = wrapper.setdefault("dtype", "bfloat16" if bfloat16 else "float16")
            scaled = dtype == "float16"
            wrapper.setdefault("loss_scale", "dynamic" if scaled else dict(enabled=False))


def configure_resume(cfg: Config, resume: str | None) -> None:
    """Settle what a training resumes from.

    Args:
        cfg: The config; its `resume` and `load_from` are changed.
        resume: A checkpoint, `auto` for the latest in the work folder (the config's `load_from`
            stays where there is none), or `None` to leave the config as it is.

    Raises:
        FileNotFoundError: If the work folder names a latest checkpoint that is gone.
    """
    if resume is None:
        return
    latest = resume if resume != "auto" else _latest_checkpoint(Path(cfg.work_dir))
    cfg.resume = latest is not None
    if latest is not None:
        cfg.load_from = latest
    else:
        print(f"Nothing to resume in {cfg.work_dir}: training starts from the beginning.")


def _latest_checkpoint(work_dir: Path) -> str | None:
    record = work_dir / "last_checkpoint"
    if not record.is_file():
        return None
    named = Path(record.read_text(encoding="utf-8").strip())
    # The record has an absolute path, which is out of date once the folder was moved.
    for candidate in (named, work_dir / named.name):
        if candidate.is_file():
            return str(candidate)
    others = ", ".join(sorted(path.name for path in work_dir.glob("*.pth"))) or "none"
    raise FileNotFoundError(
        f"--resume: {record} names {named}, which does not exist; pass one to resume from with "
        f"--resume CHECKPOINT (in the folder: {others}), or train without --resume"
    )


class _Runner(Runner):
    """MMEngine's runner, with `channels_last`."""

    def build_model(self, model: torch.nn.Module | dict) -> torch.nn.Module:
        # Before DDP wraps it, which fixes the layout of the gradients.
        model = super().build_model(model)
        if self.cfg.get(CHANNELS_LAST):
            model = model.to(memory_format=torch.channels_last)
        return model


def build_runner(cfg: Config, *, for_prediction: bool = False) -> Runner:
    """Build the runner of a config, with a check of every checkpoint it loads.

    Args:
        cfg: A config from :func:`load_config`. Beyond MMEngine's keys, `channels_last=True` stores
            4-d weights in the channels-last memory format, which is faster on GPUs.
        for_prediction: Whether the runner only tests, so that a checkpoint need not hold what only
            training uses, and the peak memory is shown.

    Where there is a GPU, training batches are pinned, which also takes their unpickling out of the
    training's thread; `train_dataloader.pin_memory=False` in the config wins.

    Raises:
        ValueError: If a `runner_type` of the config's own is combined with `channels_last`, or
            FSDP with what it cannot do; see :func:`check_strategy`.
    """
    pin_batches(cfg)
    if "runner_type" in cfg:
        if cfg.get(CHANNELS_LAST):
            raise ValueError(
                f"config: {CHANNELS_LAST}=True works with MMEngine's runner only; leave out "
                f"runner_type={cfg.runner_type!r} or {CHANNELS_LAST}"
            )
        runner = RUNNERS.build(cfg)
        check_strategy(runner)
    else:
        runner = _Runner.from_cfg(cfg)
    runner.register_hook(CheckpointCheckHook(for_prediction))
    runner.register_hook(CheckScheduleHook())
    runner.register_hook(FSDPHook())
    if not any(isinstance(hook, SaveSubsetHook) for hook in runner.hooks):
        runner.register_hook(SaveSubsetHook())  # the config has other custom_hooks
    if for_prediction:
        # A hook that asks for the iteration, as that of --show-dir does, would build the training
        # loop, and with it the training data.
        runner._train_loop = None
        runner.register_hook(PeakMemoryHook())
    return runner


def pin_batches(cfg: Config) -> None:
    """Have the training's loader pin its batches where there is a GPU, unless the config has a say.

    Args:
        cfg: The config; its `train_dataloader` is changed.
    """
    loader = cfg.get("train_dataloader")
    if isinstance(loader, dict) and torch.cuda.is_available():
        loader.setdefault("pin_memory", True)


def train(runner: Runner) -> None:
    """Train; an interruption ends the process with the command that resumes."""
    try:
        runner.train()
    except RunComplete as complete:
        print(complete)
    except (KeyboardInterrupt, Exception) as error:
        if not is_interruption(error):
            raise
        # An AMP scaler or a loader may be in any state now, so nothing is saved here.
        latest = _latest_checkpoint(Path(runner.work_dir))
        if latest is None:
            message = "no checkpoint was written yet, so start again"
        else:
            message = f"resume from {Path(latest).name} with: {_resume_command(runner.launcher)}"
        iteration = runner.train_loop.iter if not isinstance(runner._train_loop, dict) else 0
        sys.stderr.write(f"\nInterrupted at iteration {iteration}; {message}\n")
        raise SystemExit(INTERRUPTED) from None
    finally:
        _stop_workers(runner)


def _stop_workers(runner: Runner) -> None:
    """End the loaders' processes.

    At exit, PyTorch before 2.13 waits 5 s for each one that is persistent and pinned.
    """
    for loop in (runner._train_loop, runner._val_loop):
        iterator = getattr(getattr(loop, "dataloader", None), "_iterator", None)
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


def _resume_command(launcher: str = "none") -> str:
    """This process's command line with a bare `--resume`; a launcher's own is not known here."""
    if launcher != "none":
        return "the same command with --resume"
    arguments = list(sys.argv)
    for index, argument in enumerate(arguments):
        if argument == "--resume" and index + 1 < len(arguments):
            if arguments[index + 1].endswith((".pth", ".pt")):
                del arguments[index + 1]
        elif argument.startswith("--resume="):
            arguments[index] = "--resume"
    if "--resume" not in arguments:
        arguments.append("--resume")
    return shlex.join(["python", *arguments])
