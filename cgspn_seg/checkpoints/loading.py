"""Checkpoints are data, not programs: reading them without running what they contain.

A ``.pth`` file is a pickle, and a pickle may call any function while it is read. PyTorch can
restrict that to tensors (``weights_only``), but MMEngine asks for the unrestricted way, since it
stores its own run state (log histories, NumPy numbers) beside the weights.
:func:`protect_checkpoint_loading` restricts every load of the process again and allows, beyond
tensors, exactly that run state.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

__all__ = ["CheckpointError", "load_checkpoint", "protect_checkpoint_loading"]

# PyTorch reads it at every torch.load; it wins over weights_only=False in the call.
_FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
# The log statistics whose names MMEngine stores with every history.
_HISTORY_STATISTICS = ("min", "max", "current", "mean")
# RuntimeErrors of torch.load that are about the file, unlike an exhausted GPU memory.
_ABOUT_THE_FILE = re.compile("PytorchStreamReader|TorchScript|unexpected EOF|corrupt|magic number")


class CheckpointError(RuntimeError):
    """A checkpoint that is refused, unreadable or does not fit the model."""


def _history_statistic(owner: Any, name: str) -> Callable:
    """Stand in for `getattr` in checkpoints, which refer by it to methods of `HistoryBuffer`.

    The real `getattr` would reach any attribute of any object, so it is not allowed.
    """
    if owner is HistoryBuffer and name in _HISTORY_STATISTICS:
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError("GLOBAL builtins.getattr was not an allowed global by default.")


def _run_state_globals() -> list[Callable | tuple[Callable, str]]:
    """What MMEngine's run state consists of, beyond the tensors and containers PyTorch allows."""
    # The functions that pickled arrays and numbers call; their module is private.
    reconstruct, scalar = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    allowed: list[Callable | tuple[Callable, str]] = [
        HistoryBuffer,
        (_history_statistic, "builtins.getattr"),
        np.ndarray,
        np.dtype,
    ]
    # NumPy 1 wrote numpy.core, NumPy 2 writes numpy._core.
    for package in ("numpy.core", "numpy._core"):
        allowed.append((reconstruct, f"{package}.multiarray._reconstruct"))
        allowed.append((scalar, f"{package}.multiarray.scalar"))
    allowed.extend(getattr(np.dtypes, name) for name in np.dtypes.__all__)
    return allowed


def _explanation(name: str, error: Exception) -> CheckpointError:
    """Translate what PyTorch says about the file `name` into one message."""
    text = str(error)
    wanted = set(re.findall(r"GLOBAL (\S+) (?:was not an allowed|whose module)", text))
    general_pickle = False
    if os.path.isfile(name):
        # PyTorch stops at the first; this lists all without running any, if the format permits.
        with contextlib.suppress(Exception):
            wanted.update(torch.serialization.get_unsafe_globals_in_checkpoint(name))
        with open(name, "rb") as file:
            general_pickle = file.read(1) == pickle.PROTO
    if wanted:
        names = sorted({full_name.removeprefix("builtins.") for full_name in wanted})
        reason = f"loading it would run code, it asks for {', '.join(names)}"
    elif "TorchScript" in text:
        reason = "it is a TorchScript program"
    elif general_pickle and "Unsupported operand" in text:
        reason = "it is a pickle that torch.save did not write, and can hold any code"
    else:
        lines = text.split("\n\nCheck the documentation")[0].strip().splitlines()
        said = lines[-1] if lines else repr(error)
        return CheckpointError(
            f"{name}: not readable as a PyTorch checkpoint ({said}): the "
            "file is damaged, incomplete or of another format. Copy or download it again."
        )
    return CheckpointError(
        f"{name}: refused: {reason}. Checkpoints are read as data only, tensors and MMEngine's own "
        "run state. If you trust whoever made this file, pass --trust-checkpoint; otherwise ask "
        "for the weights as .safetensors."
    )


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(
            f"{path}: reading .safetensors needs a package that is not installed: "
            "pip install safetensors"
        ) from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: not readable as .safetensors ({error}). Copy or download it again."
        ) from error


def _load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Read a local ``.pth`` or ``.safetensors`` file; MMEngine's loader for plain paths."""
    path = Path(filename).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        nearby = sorted(p.name for p in path.parent.glob("*") if p.suffix in _SUFFIXES)
        hint = f" The checkpoints beside it: {', '.join(nearby[:8])}." if nearby else ""
        raise FileNotFoundError(f"checkpoint: {path} {what}; expected a checkpoint file.{hint}")
    if path.suffix == ".safetensors":
        return _safetensors(path)
    # Unrestricted unless _FORCE_WEIGHTS_ONLY is set, as in MMEngine's own loaders.
    return torch.load(path, map_location=map_location, weights_only=False)


_SUFFIXES = (".pth", ".pt", ".safetensors")
_load_from_local.__name__ = "load_from_local"  # MMEngine logs it, without "load_from_"


def _explaining(loader: Callable) -> Callable:
    """Let `loader` name the file and the way out in its errors."""

    @functools.wraps(loader)
    def load(filename: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            with warnings.catch_warnings():  # the message below says it better
                warnings.filterwarnings("ignore", message=".*(TorchScript|pickle protocol)")
                checkpoint = loader(filename, *args, **kwargs)
        except (CheckpointError, FileNotFoundError):
            raise
        except (pickle.UnpicklingError, EOFError, UnicodeDecodeError) as error:
            raise _explanation(filename, error) from error
        except (RuntimeError, OSError) as error:
            # A cut zip archive is first read as the older format, which seeks out of range.
            if _ABOUT_THE_FILE.search(str(error)) or getattr(error, "errno", 0) == errno.EINVAL:
                raise _explanation(filename, error) from error
            raise
        if not isinstance(checkpoint, dict):
            raise CheckpointError(
                f"{filename}: expected a checkpoint, a dict of tensors or with a `state_dict`, got "
                f"{type(checkpoint).__name__}"
            )
        return checkpoint

    load.explains = loader
    return load


def protect_checkpoint_loading(*, trust: bool = False) -> None:
    """Make this process read checkpoints as data only, wherever MMEngine or PyTorch loads one.

    That covers `load_from`, `resume`, `init_cfg` with `Pretrained`, the checkpoint of a test, local
    files, URLs and MMEngine's other schemes, and also adds ``.safetensors`` to what a path may
    name. A file that would run code raises :class:`CheckpointError` and nothing of it runs.

    Args:
        trust: Load without restriction, for files from a source you trust (`--trust-checkpoint`).
            A `TORCH_FORCE_WEIGHTS_ONLY_LOAD` that was set outside still counts.
    """
    if not trust:
        os.environ[_FORCE_WEIGHTS_ONLY] = "1"
        torch.serialization.add_safe_globals(_run_state_globals())
    CheckpointLoader.register_scheme("", _load_from_local, force=True)
    for prefix, loader in list(CheckpointLoader._schemes.items()):
        if not hasattr(loader, "explains"):
            CheckpointLoader.register_scheme(prefix, _explaining(loader), force=True)


def load_checkpoint(filename: str, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint the way MMEngine does: from a path, a URL or another of its schemes.

    Args:
        filename: Path or URL.
        map_location: As in `torch.load`; ignored for ``.safetensors``, which are read to the CPU.

    Returns:
        What the file holds: a dict with `state_dict` and more, or the state dict itself.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is unreadable, or would run code and
            :func:`protect_checkpoint_loading` was called.
    """
    return CheckpointLoader.load_checkpoint(str(filename), map_location, logger="current")
