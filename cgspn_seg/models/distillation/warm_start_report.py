"""What a student got from its teacher, in a form to print."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["WarmStart", "group_keys"]

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class WarmStart:
    """What a student got from its teacher.

    Attributes:
        matched: the student's tensors that are the teacher's, layer scale and normalization folded.
        resized: the student's tensors that were resampled, with what was done.
        mismatched: shapes in the student and in the teacher, of tensors that stay as initialized.
        missing: the student's tensors that no teacher has, or this one has not, with what they are.
        unused: the teacher's tensors that went nowhere.
        expected: number of tensors that a warm start fills where all fits.
        notes: what else differs, in words.
    """

    matched: tuple[str, ...]
    resized: Mapping[str, str]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    missing: Mapping[str, str]
    unused: tuple[str, ...]
    expected: int
    notes: tuple[str, ...] = ()

    @property
    def fraction(self) -> float:
        """Share of the expected tensors that were filled."""
        return self.num_filled / self.expected

    @property
    def num_filled(self) -> int:
        """Number of tensors that were filled."""
        return len(self.matched) + len(self.resized)

    def rows(self) -> Iterator[tuple[str, str, int, str]]:
        """(kind, names, number of tensors, remark), the layers of a name in one row."""
        shapes = {k: f"student {a}, teacher {b}" for k, (a, b) in self.mismatched.items()}
        for kind, remarks in (
            ("matched", dict.fromkeys(self.matched, "")),
            ("resized", self.resized),
            ("mismatched", shapes),
            ("missing", self.missing),
            ("unused", dict.fromkeys(self.unused, "of the teacher")),
        ):
            for names, keys in group_keys(remarks).items():
                yield kind, names, len(keys), remarks[keys[0]]

    def describe(self) -> str:
        """The same over a few lines."""
        head = f"{self.num_filled} of {self.expected} tensors are from the teacher"
        lines = [
            f"  {kind}: {names} ({number}){f': {remark}' if remark else ''}"
            for kind, names, number, remark in self.rows()
        ]
        return "\n".join([head, *lines, *(f"  {note}" for note in self.notes)])


def group_keys(keys: Sequence[str] | Mapping[str, Any]) -> dict[str, list[str]]:
    """Keys by their names with `*` for a layer's number."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(_LAYER.sub("*", key), []).append(key)
    return groups
