"""Learning curves: loss, learning rate, mIoU and the IoU of every class, of one run or several."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from cgspn_seg.visualization.palette import distinct_palette
from cgspn_seg.visualization.training_log import TrainingLog, Validation

__all__ = ["draw_curves"]

_RUN_COLORS = (
    "#1a73e8",
    "#e8710a",
    "#188038",
    "#d01884",
    "#8430ce",
    "#129eaf",
    "#b06000",
    "#5f6368",
)
_MAIN_METRICS = ("mIoU", "mDice", "mFscore")
_MAX_LINES = 20  # more classes than this are bars
_BARS_PER_COLUMN = 40


def draw_curves(runs: Sequence[TrainingLog], labels: Sequence[str]) -> bytes:
    """Draw the curves of some runs, overlaid.

    Per-class IoU are lines over the iterations for one run of up to 20 classes; otherwise those of
    the last validation, sorted: bars for one run, a dot for each of several.

    Args:
        runs: What to draw.
        labels: A name for each.

    Returns:
        A PNG file.

    Raises:
        ValueError: If there is no run, or not one label for each.
    """
    if not runs or len(runs) != len(labels):
        raise ValueError(f"labels: expected one a run ({len(runs)}), got {len(labels)}")
    last = [_last_with_classes(run) for run in runs]
    num_classes = max((len(_ious(found)) for found in last if found), default=0)
    with_tables = sum(bool(validation.per_class) for validation in runs[0].validations)
    as_lines = len(runs) == 1 and num_classes <= _MAX_LINES and with_tables > 1
    columns = max(1, math.ceil(num_classes / _BARS_PER_COLUMN))
    rows = math.ceil(num_classes / columns)
    lower = 0.0 if not num_classes else 5.0 if as_lines else 1.2 + 0.21 * rows

    figure = Figure(figsize=(15, 4.2 + lower), dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    if lower:
        upper_figure, lower_figure = figure.subfigures(2, 1, height_ratios=(4.2, lower))
    else:
        upper_figure = figure
    loss, rate, metric = upper_figure.subplots(1, 3)
    colors = [_RUN_COLORS[index % len(_RUN_COLORS)] for index in range(len(runs))]
    for run, label, color in zip(runs, labels, colors, strict=True):
        _draw_loss(loss, run, label, color)
        rate.plot(*run.series("lr"), color=color, label=label)
        _draw_metric(metric, run, label, color)
    _finish_upper(loss, rate, metric, legend=len(runs) > 1)
    if lower and as_lines:
        _draw_class_lines(lower_figure.subplots(), runs[0])
    elif lower:
        axes = lower_figure.subplots(1, columns, squeeze=False)[0]
        step = {found.step for found in last if found}
        at = f"at iteration {step.pop():,}" if len(step) == 1 else "at the last validation"
        lower_figure.suptitle(f"IoU of each class {at}, %", fontsize=11)
        _draw_class_bars(axes, last, colors, rows)
    figure.suptitle(labels[0] if len(runs) == 1 else None, fontsize=13, fontweight="bold")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _ious(validation: Validation) -> dict[str, float]:
    return validation.per_class.get("IoU", {})


def _last_with_classes(run: TrainingLog) -> Validation | None:
    return next((found for found in reversed(run.validations) if _ious(found)), None)


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Centered moving average over a thirtieth of the values."""
    values = np.asarray(values, np.float64)
    half = max(1, len(values) // 60)
    kernel = np.ones(2 * half + 1)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), kernel, mode="full")[half:-half]
    count = np.convolve(finite.astype(float), kernel, mode="full")[half:-half]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _draw_loss(axes: Axes, run: TrainingLog, label: str, color: str) -> None:
    steps, values = run.series("loss")
    if len(values) < 10:
        axes.plot(steps, values, color=color, label=label, marker="o", markersize=3)
        return
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(values), color=color, label=label, linewidth=1.8)


def _main_metric(run: TrainingLog) -> str | None:
    known = {key for validation in run.validations for key in validation.metrics}
    return next((key for key in _MAIN_METRICS if key in known), None)


def _draw_metric(axes: Axes, run: TrainingLog, label: str, color: str) -> None:
    key = _main_metric(run)
    points = [(v.step, v.metrics[key]) for v in run.validations if key in v.metrics]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    best = int(np.nanargmax(values)) if not np.all(np.isnan(values)) else 0
    axes.plot(
        steps, values, color=color, marker="o", markersize=4, label=f"{label}: {values[best]:.1f}"
    )
    axes.set_title(f"val {key}, %", loc="left", fontsize=11)
    axes.plot(steps[best], values[best], marker="*", markersize=13, color=color)


def _finish_upper(loss: Axes, rate: Axes, metric: Axes, *, legend: bool) -> None:
    loss.set_title("training loss", loc="left", fontsize=11)
    rate.set_title("learning rate", loc="left", fontsize=11)
    if not metric.lines:
        metric.set_title("no validation yet", loc="left", fontsize=11)
    values = np.concatenate([line.get_ydata() for line in loss.lines] or [[]])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 30 * np.median(values):
        loss.set_yscale("log")
    rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    last = max((line.get_xdata()[-1] for axes in (loss, metric) for line in axes.lines), default=1)
    for axes in (loss, rate, metric):
        _style(axes)
        axes.set_xlim(0, 1.02 * last)
        axes.set_xlabel("iteration", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    handles, names = metric.get_legend_handles_labels()
    if handles:
        note = names if legend else [f"best {names[0].rsplit(': ', 1)[1]}"]
        metric.legend(handles, note, loc="best", fontsize=9, frameon=False)
        bottom, top = metric.get_ylim()
        if top - bottom < 4:  # no drama about tenths
            metric.set_ylim((bottom + top) / 2 - 2, (bottom + top) / 2 + 2)
    if legend:
        loss.legend(loc="upper right", fontsize=9, frameon=False)


def _style(axes: Axes) -> None:
    axes.grid(color="#e0e0e0", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def _draw_class_lines(axes: Axes, run: TrainingLog) -> None:
    """One line a class over the iterations, named at its end."""
    tables = [validation for validation in run.validations if _ious(validation)]
    names = list(_ious(tables[-1]))
    steps = [validation.step for validation in tables]
    colors = distinct_palette(len(names)) / 255 * 0.85
    ends = {}
    for name, color in zip(names, colors, strict=True):
        values = [_ious(validation).get(name, math.nan) for validation in tables]
        axes.plot(
            steps, values, color=color, marker="o", markersize=3, linewidth=1.4, clip_on=False
        )
        if not math.isnan(values[-1]):
            ends[name] = (values[-1], color)
    axes.set_ylim(-2, 102)
    ordered = sorted(ends.items(), key=lambda item: item[1][0])
    places = _spread([value for _, (value, _) in ordered], gap=4.8, low=0.0, high=100.0)
    for (name, (value, color)), place in zip(ordered, places, strict=True):
        axes.annotate(
            f"{name} {value:.1f}",
            xy=(1.0, place),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            color=color,
            fontsize=9,
            va="center",
            annotation_clip=False,
        )
    axes.set_xlim(0, steps[-1])
    axes.set_title("val IoU of each class, %", loc="left", fontsize=11)
    axes.set_xlabel("iteration", fontsize=9)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _style(axes)


def _spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move sorted positions apart to at least `gap`; those that crowd stay around their mean."""
    groups: list[tuple[float, int]] = []  # lowest position and number of labels
    for value in values:
        start, size = value, 1
        while groups and groups[-1][0] + gap * groups[-1][1] > start:
            below, count = groups.pop()
            middle = count * (below + gap * (count - 1) / 2) + size * (start + gap * (size - 1) / 2)
            size += count
            start = middle / size - gap * (size - 1) / 2
        start = max(low, min(start, high - gap * (size - 1)))
        groups.append((start, size))
    return [start + gap * index for start, size in groups for index in range(size)]


def _draw_class_bars(
    axes: Sequence[Axes], last: Sequence[Validation | None], colors: Sequence[str], rows: int
) -> None:
    """The last IoU of every class, best first, down the columns."""
    ious = [_ious(found) if found else {} for found in last]
    names = list(dict.fromkeys(name for values in ious for name in values))
    table = np.array([[values.get(name, math.nan) for values in ious] for name in names])
    present = np.isfinite(table).any(axis=1)
    # Classes that occur in no label have no IoU; they come last, without a bar.
    score = np.where(present, np.nanmean(np.where(present[:, None], table, 0), axis=1), -1.0)
    order = np.argsort(-score, kind="stable")
    for column, ax in enumerate(axes):
        chosen = order[column * rows : (column + 1) * rows]
        places = np.arange(len(chosen))
        values = table[chosen]
        if len(ious) == 1:
            ax.barh(places, np.nan_to_num(values[:, 0]), height=0.72, color=colors[0])
            for place, value in zip(places, values[:, 0], strict=True):
                text = "not in the data" if math.isnan(value) else f"{value:.1f}"
                ax.text(np.nan_to_num(value) + 1, place, text, va="center", fontsize=7.5)
        else:
            for place, row in zip(places, values, strict=True):
                if np.isfinite(row).any():
                    ends = (np.nanmin(row), np.nanmax(row))
                    ax.plot(ends, (place, place), color="#bdc1c6", linewidth=2, zorder=1)
            for run, color in enumerate(colors):
                ax.scatter(values[:, run], places, color=color, s=28, zorder=2)
        ax.set_yticks(places, [names[index] for index in chosen], fontsize=8)
        ax.set_ylim(rows - 0.4, -0.6)
        ax.set_xlim(0, 108 if len(ious) == 1 else 100)
        ax.set_xticks(range(0, 101, 20))
        _style(ax)
        ax.grid(axis="y", visible=len(ious) > 1)
        ax.tick_params(axis="y", length=0, labelsize=8)
