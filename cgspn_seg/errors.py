"""Helpers for error messages."""

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str]) -> str:
    """A question that proposes the known name nearest to ``name``, or "" where none is near."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
