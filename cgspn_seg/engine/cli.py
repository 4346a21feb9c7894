"""How a tool ends: its exit codes, and errors that a user can act on in one message."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from itertools import dropwhile
from pathlib import Path

import cgspn_seg
from cgspn_seg.checkpoints import CheckpointError

__all__ = ["INTERRUPTED", "is_interruption", "message_of", "run"]

INTERRUPTED = 130  # the exit code that a shell reports after Ctrl-C
_DEBUG = "CGSPN_DEBUG"
_PACKAGE = Path(cgspn_seg.__file__).parent
# Raised on purpose, as a rule; the other kinds may also come from a slip in this package.
_DELIBERATE = (CheckpointError, ValueError, FileNotFoundError)


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
        if message is None or os.environ.get(_DEBUG, "0") not in ("", "0"):
            raise
        sys.stderr.write(f"\n{tool}: error: {message}\n")
        if not isinstance(error, _DELIBERATE):
            sys.stderr.write(f"({_DEBUG}=1 shows where it was raised.)\n")
        raise SystemExit(2) from None
    raise SystemExit(code or 0)


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


def message_of(error: BaseException) -> str:
    """What an error says, without the quotes that a KeyError puts around it."""
    if isinstance(error, KeyError) and len(error.args) == 1:
        return str(error.args[0])
    return str(error)
