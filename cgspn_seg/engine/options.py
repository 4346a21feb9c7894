"""`--cfg-options`: reading them, and refusing those that would change nothing."""

from __future__ import annotations

import argparse
import inspect
import shlex
from collections.abc import Mapping
from typing import Any

from cgspn_seg import compat  # noqa: F401  (before MMEngine's runner)

# isort: split
from mmengine.config import Config, DictAction
from mmengine.runner import Runner
from mmseg.registry import RUNNERS

from cgspn_seg.engine.cli import message_of
from cgspn_seg.errors import closest

__all__ = [
    "CHANNELS_LAST",
    "OWN_KEYS",
    "UPSTREAM_KEYS",
    "Options",
    "dataset_to_test",
    "merge_options",
]

# Config keys that these tools read beyond those of MMEngine's Runner.
CHANNELS_LAST = "channels_last"
OWN_KEYS = (CHANNELS_LAST,)
# What MMEngine and MMSegmentation read of a config: the runner's arguments, what it looks up
# later, and what their tools and inference use.
UPSTREAM_KEYS = frozenset(inspect.signature(Runner).parameters) | {
    "activation_checkpointing",
    "compile",
    "custom_imports",
    "efficient_conv_bn_eval",
    "find_unused_parameters",
    "model_wrapper_cfg",
    "runner_type",
    "sync_bn",
    "test_pipeline",
    "tta_model",
    "tta_pipeline",
}


class Options(DictAction):
    """MMEngine's way to read KEY=VALUE, whose own errors do not name the option."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        try:
            super().__call__(parser, *args)
        except (AssertionError, RecursionError, ValueError):
            pairs = shlex.join(args[1])
            parser.error(
                f"--cfg-options {pairs}: expected KEY=VALUE pairs, where VALUE is a word, a number "
                'or a list such as "[a,(b,c)]"; set the entries of a dict one by one, as '
                "KEY.ENTRY=VALUE"
            )


def merge_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Merge `--cfg-options`; MMEngine would accept those that change nothing.

    These are keys that nothing reads, and variables such as `data_root` and `test_pipeline`: when
    the config was read, their values were used or copied to the places where they are read.

    Args:
        cfg: The config, which is changed.
        options: Values by dotted key.

    Raises:
        ValueError: If an option would change nothing, or does not fit the config's structure.
    """
    read = _keys_read(cfg, options.get("runner_type"))
    for key in options:
        top = key.split(".", 1)[0]
        if top in read:
            continue
        if top not in cfg:
            raise ValueError(
                f"--cfg-options {key}: the config has no {top!r} and nothing reads it"
                f"{closest(top, {*cfg.keys(), *read})}"
            )
        if copies := _copies(cfg, top):
            raise ValueError(
                f"--cfg-options {key}: {top!r} is a variable of the config, whose value has been "
                f"copied already; override the copies: {', '.join(copies)}"
            )
        raise ValueError(
            f"--cfg-options {key}: {top!r} is a variable of the config, which nothing reads after "
            "the config itself; override what was made of it, or set it in a config of your own"
        )
    try:
        cfg.merge_from_dict(dict(options))
    except (KeyError, TypeError) as error:
        pairs = " ".join(f"{key}={value}" for key, value in options.items())
        raise ValueError(f"--cfg-options {pairs}: {message_of(error)}") from error


def _keys_read(cfg: Config, runner_type: str | None = None) -> set[str]:
    """Top-level keys that are read when the config has been."""
    read = {*UPSTREAM_KEYS, *OWN_KEYS} - {"custom_imports"}  # done while the config was read
    if kind := runner_type or cfg.get("runner_type"):
        runner = kind if isinstance(kind, type) else RUNNERS.get(kind)
        if runner is not None:  # what does not exist is refused where it is built
            read |= inspect.signature(runner).parameters.keys()  # FlexibleRunner's strategy
    if dataset_to_test(cfg).get("pipeline"):
        read.discard("test_pipeline")  # it wins, so that testing and predicting cannot differ
    return read


def dataset_to_test(cfg: Config) -> Mapping[str, Any]:
    """The config of the data set to test on, empty where there is none."""
    return (cfg.get("test_dataloader") or {}).get("dataset") or {}


def _copies(cfg: Config, variable: str) -> list[str]:
    """Keys, in `--cfg-options` notation, whose value is that of a top-level variable."""
    value, found, read = cfg[variable], [], _keys_read(cfg)

    def visit(node: Any, key: str) -> None:
        name = key.rsplit(".", 1)[-1]
        # A small number or an empty list may be equal by chance.
        telling = name == variable or (isinstance(value, str | list | tuple | dict) and value)
        if node == value and type(node) is type(value) and telling:
            found.append(key)
        elif isinstance(node, dict):
            for child, item in node.items():
                visit(item, f"{key}.{child}")
        elif isinstance(node, list):
            for index, item in enumerate(node):
                visit(item, f"{key}.{index}")

    for top in cfg:
        if top in read:
            visit(cfg[top], top)
    return found
