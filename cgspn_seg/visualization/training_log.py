"""Reading the logs of a training run: MMEngine's scalars and MMSegmentation's per-class tables."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["TrainingLog", "Validation", "read_training_log"]

_NUMBER = r"-?(?:\d+\.?\d*(?:e[+-]?\d+)?|nan|inf)"
_PAIRS = re.compile(rf"([\w./]+): ({_NUMBER})(?=\s|$)", re.IGNORECASE)
_TRAIN_LINE = re.compile(r"\bIter\(train\) +\[ *(\d+)/ *\d+\](.*)")
_TRAIN_EPOCH_LINE = re.compile(r"\bEpoch\(train\) +\[ *(\d+)\]\[ *(\d+)/ *(\d+)\](.*)")
_SUMMARY_LINE = re.compile(r"\b(?:Iter|Epoch)\((val|test)\) *(?:\[ *\d+\])?\[ *(\d+)/ *(\d+)\](.*)")
_RESUMED_LINE = re.compile(r"resumed epoch: \d+, iter: (\d+)")


@dataclass
class Validation:
    """What one validation found.

    Attributes:
        step: The iteration.
        metrics: In percent.
        per_class: By metric, the values of the classes.
        per_layer: By what distillation compares, such as `mixer/error`, the values of the layers.
    """

    step: int
    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    per_layer: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class TrainingLog:
    """The scalars of one training run, in the order of its iterations.

    Attributes:
        name: The folder or file it was read from.
        train: Training records with at least `step`.
        validations: Validation results.
        parts: A name and the first and last step of each process that worked on the run.
    """

    name: str
    train: list[dict[str, Any]] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    parts: list[tuple[str, int, int]] = field(default_factory=list)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a training scalar, such as `loss` or `lr`."""
        points = [(record["step"], record[key]) for record in self.train if key in record]
        return [step for step, _ in points], [value for _, value in points]

    def append(self, part: TrainingLog) -> None:
        """Add what a later process logged; it replaces what an interrupted one had beyond."""
        steps = [record["step"] for record in part.train]
        steps += [validation.step for validation in part.validations]
        if not steps:
            return
        first = min(steps)
        self.train = [record for record in self.train if record["step"] < first] + part.train
        kept = [validation for validation in self.validations if validation.step < first]
        self.validations = kept + part.validations
        self.parts.append((part.name, first, max(steps)))


def read_training_log(path: str | Path) -> TrainingLog:
    """Read a run's log.

    Args:
        path: A work folder (the runs in it, one for each time it was started or resumed, are
            joined), one run's folder, or a log file (`.json` or `.log`).

    Raises:
        FileNotFoundError: If there is no such file or folder, or no log in it.
        ValueError: If the logs hold no training record.
    """
    path = Path(path)
    name = path.absolute().name
    if path.is_dir():
        parts = list(_parts_of_folder(path))
        if not parts:
            raise FileNotFoundError(
                f"{path}: no log found; expected a work folder of MMEngine, which holds "
                "<time>/vis_data/scalars.json or <time>/<time>.log"
            )
    elif path.is_file():
        folder = path.parent.parent if path.parent.name == "vis_data" else path.parent
        beside = [*folder.glob("vis_data/scalars.json")] if path.suffix == ".log" else [path]
        logs = [path] if path.suffix == ".log" else [*folder.glob("*.log")]
        parts = [_read_part(path.stem, next(iter(beside), None), next(iter(logs), None))]
        name = path.stem if path.stem != "scalars" else folder.name
    else:
        raise FileNotFoundError(f"{path} does not exist; expected a work folder or a log file")
    run = TrainingLog(name)
    for part in parts:
        run.append(part)
    if not run.train:
        raise ValueError(f"{path}: the log holds no training iteration (a test run, or too short)")
    return run


def _parts_of_folder(folder: Path) -> Iterator[TrainingLog]:
    for place in [folder, *sorted(child for child in folder.iterdir() if child.is_dir())]:
        scalars = place / "vis_data" / "scalars.json"
        logs = sorted(place.glob("*.log"))
        if scalars.is_file() or logs:
            part = _read_part(
                place.name, scalars if scalars.is_file() else None, next(iter(logs), None)
            )
            if part.train:  # tests leave folders of the same kind
                yield part


def _read_part(name: str, scalars: Path | None, log: Path | None) -> TrainingLog:
    """Read what one process logged, from its scalars where there are any."""
    from_text = _read_text(name, log) if log is not None else TrainingLog(name)
    if scalars is None:
        return from_text
    part = _read_scalars(name, scalars)
    # Both are written in the same order by the same process, but only the text has the tables.
    for validation, source in zip(part.validations, from_text.validations, strict=False):
        validation.per_class = source.per_class
    return part


def _read_scalars(name: str, path: Path) -> TrainingLog:
    part, last = TrainingLog(name), 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number > 1:  # the process ended in the middle of a line
                break
            raise ValueError(f"{path}: expected one JSON object a line ({error})") from error
        if "loss" in record:
            last = record["step"] = int(record.get("step", record.get("iter", last)))
            part.train.append(record)
            continue
        metrics, per_layer = _metrics(record), _per_layer(record)
        if metrics or per_layer:
            # Epoch-based runs log validations by epoch, so by a smaller number.
            step = max(last, int(record.get("step", 0)))
            part.validations.append(Validation(step, metrics, per_layer=per_layer))
    return part


def _metrics(record: dict[str, Any]) -> dict[str, float]:
    return {
        key.rsplit("/", 1)[-1]: float(value)
        for key, value in record.items()
        if re.fullmatch(r"(?:.*/)?(?:aAcc|m[A-Z]\w+)", key) and isinstance(value, int | float)
    }


def _per_layer(record: dict[str, Any]) -> dict[str, list[float]]:
    """Collect what DistillationMetric returned."""
    found: dict[str, list[float]] = {}
    for key in sorted(record):
        if match := re.fullmatch(r"(\w+/(?:error|cosine))_\d+", key):
            found.setdefault(match[1], []).append(float(record[key]))
    return found


def _read_text(name: str, path: Path) -> TrainingLog:
    """Read a `.log` file; its numbers are rounded, but it alone has the per-class tables."""
    part, last, rows = TrainingLog(name), 0, []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif found := _TRAIN_LINE.search(line):
            last = int(found[1])
            part.train.append({**_pairs(found[2]), "step": last})
        elif found := _TRAIN_EPOCH_LINE.search(line):
            last = (int(found[1]) - 1) * int(found[3]) + int(found[2])
            part.train.append({**_pairs(found[4]), "step": last})
        elif found := _RESUMED_LINE.search(line):
            last = int(found[1])
        elif found := _SUMMARY_LINE.search(line):
            pairs = _pairs(found[4])
            metrics, per_layer = _metrics(pairs), _per_layer(pairs)
            if not metrics and not per_layer:
                continue
            if found[1] == "val":
                part.validations.append(Validation(last, metrics, _per_class(rows), per_layer))
            rows = []
    return part


def _pairs(text: str) -> dict[str, float]:
    return {key: float(value) for key, value in _PAIRS.findall(text)}


def _per_class(rows: list[list[str]]) -> dict[str, dict[str, float]]:
    """Turn the rows of a `Class | IoU | Acc` table into values by metric and class."""
    starts = [index for index, row in enumerate(rows) if row[0] == "Class"]
    if not starts:
        return {}
    header, *body = rows[starts[-1] :]
    table: dict[str, dict[str, float]] = {metric: {} for metric in header[1:]}
    for label, *cells in body:
        for metric, cell in zip(header[1:], cells, strict=False):
            if re.fullmatch(_NUMBER, cell, re.IGNORECASE):
                table[metric][label] = float(cell)
    return table
