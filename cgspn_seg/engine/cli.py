"""How a tool ends: its exit codes, and errors that a user can act on in one message."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable
from itertools import dropwhile
from pathlib import Path
from traceback import walk_tb

import cgspn_seg
from cgspn_seg import compat  # noqa: F401  (before MMEngine's registry)

# isort: split
from mmengine.registry import build_from_cfg
from rich.console import Console

from cgspn_seg.checkpoints import CheckpointError
from cgspn_seg.datasets.subset import SUBSET_KEYS, can_be_divided
from cgspn_seg.errors import closest

__all__ = ["INTERRUPTED", "is_debugging", "is_interruption", "message_of", "run", "wide_console"]

INTERRUPTED = 130  # the exit code that a shell reports after Ctrl-C
_DEBUG = "CGSPN_DEBUG"
_PACKAGE = Path(cgspn_seg.__file__).parent
# Raised on purpose, as a rule; the other kinds may also come from a slip in this package.
_DELIBERATE = (CheckpointError, ValueError, FileNotFoundError)
_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")
_UNNAMED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def wide_console() -> Console:
    """The terminal; 120 characters wide where a tool writes to a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def run(main: Callable[[], int | None]) -> None:
    """Run a tool's main function and end the process with its exit code.

    Exit codes: what `main` returns (`None` is 0); 2 with one message for what a user can mend; 130
    after Ctrl-C. With `CGSPN_DEBUG=1` every error shows its traceback.
    """
    tool = Path(sys.argv[0]).name
    try:
        code = main()
    except (KeyboardInterrupt, Exception) as error:
        if is_interruption(error):
            sys.stderr.write(f"\n{tool}: interrupted\n")
            raise SystemExit(INTERRUPTED) from None
        message = _user_message(error)
        if message is None or is_debugging():
            raise
        sys.stderr.write(f"\n{tool}: error: {message}\n")
        if not isinstance(error, _DELIBERATE):
            sys.stderr.write(f"({_DEBUG}=1 shows where it was raised.)\n")
        raise SystemExit(2) from None
    raise SystemExit(code or 0)


def is_debugging() -> bool:
    """Whether errors are to show their traceback."""
    return os.environ.get(_DEBUG, "0") not in ("", "0")


def is_interruption(error: BaseException | None) -> bool:
    """Whether an error is Ctrl-C, or arose while one was handled.

    MMEngine catches everything in some places, such as the formatting of a config, and raises
    something else instead.
    """
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _user_message(error: BaseException) -> str | None:
    """The message of an error that this package raised about its input, else `None`.

    Those are recognized by where they were raised, also inside a data loader's worker, whose
    traceback arrives as text.
    """
    if isinstance(error, CheckpointError):
        return str(error)
    if not isinstance(error, ValueError | TypeError | KeyError | OSError | ImportError):
        return None
    if (text := str(error)).startswith("Caught ") and "Original Traceback" in text:
        lines = text.splitlines()
        last = max(index for index, line in enumerate(lines) if line.startswith('  File "'))
        raised_in = Path(lines[last].split('"')[1])
        said = dropwhile(lambda line: line.startswith(" "), lines[last:])
        # The first line begins with the class's name.
        message = "\n".join(said).partition(": ")[2]
        return message if raised_in.is_relative_to(_PACKAGE) else None
    if (mistyped := _unknown_key(error) or _unknown_type(error)) is not None:
        return mistyped
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return None
    raised_in = Path(traceback.tb_frame.f_code.co_filename)
    tools = Path(sys.argv[0]).absolute().parent
    if raised_in.is_relative_to(_PACKAGE) or raised_in.absolute().parent == tools:
        return message_of(error)
    return None


def _unknown_key(error: BaseException) -> str | None:
    """The message of a config's dict with a key that its class does not take, else `None`."""
    found = _UNEXPECTED.search(str(error))
    if not isinstance(error, TypeError) or found is None:
        return None
    key, built, keys = found[1], None, ()
    for frame, _ in walk_tb(error.__traceback__):
        if frame.f_code is build_from_cfg.__code__:
            built, keys = frame.f_locals.get("obj_cls"), frame.f_locals.get("args", ())
    if built is None or key not in keys:
        return None
    known = _parameters(built)
    if key in known:  # a slip in a class that does not take what it says
        return None
    if can_be_divided(built):
        known += [key for key in SUBSET_KEYS if key not in known]
    name = getattr(built, "__name__", built)
    return f"config: {name} has no key {key!r}; it takes {', '.join(known)}{closest(key, known)}"


def _unknown_type(error: BaseException) -> str | None:
    """The message of a config's dict with a `type` that is not registered, else `None`."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    if not isinstance(error, KeyError) or frames[-1].f_code is not build_from_cfg.__code__:
        return None
    frame = frames[-1]
    kind, registry = frame.f_locals.get("obj_type"), frame.f_locals.get("registry")
    if not isinstance(kind, str) or frame.f_locals.get("obj_cls") is not None:
        return None
    known: list[str] = []
    place = registry
    while place is not None:  # a library's own parts, then those of the one below it
        known += place.module_dict
        place = place.parent
    hint = closest(kind, known) or "; one of your own has to be imported, by custom_imports"
    return f"config: type={kind!r}: there is no such {registry.name}{hint}"


def _parameters(built: Callable) -> list[str]:
    """What a class or function takes by name, with what a class passes on to those above it."""
    named: dict[str, None] = {}
    initializers = [vars(kind).get("__init__") for kind in getattr(built, "__mro__", ())]
    for function in filter(inspect.isfunction, initializers or [built]):
        parameters = inspect.signature(function).parameters.values()
        named |= {p.name: None for p in parameters if p.kind not in _UNNAMED and p.name != "self"}
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return list(named)


def message_of(error: BaseException) -> str:
    """What an error says, without the quotes that a KeyError puts around it."""
    if isinstance(error, KeyError) and len(error.args) == 1:
        return str(error.args[0])
    return str(error)
