"""Curves of a distillation: how close each layer of a student is to its teacher's."""

from __future__ import annotations

import io

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, PercentFormatter

from cgspn_seg.visualization.training_log import TrainingLog

__all__ = ["draw_layer_curves", "has_layers"]

_COLORS = colormaps["viridis"].resampled(256)
_TITLES = {"mixer": "what a block's first half adds", "block": "the stream after a block"}


def has_layers(run: TrainingLog) -> bool:
    """Whether a run is a distillation with validations, which :func:`draw_layer_curves` draws."""
    return any(validation.per_layer for validation in run.validations)


def draw_layer_curves(run: TrainingLog, label: str) -> bytes:
    """Draw a distillation.

    At the top the training loss, of each layer where it was logged. Then a row for each kind of
    tap: relative error of each layer over the iterations, its cosine similarity with the teacher,
    and the error of each layer at the end.

    Args:
        run: What to draw.
        label: Its name.

    Returns:
        A PNG file.

    Raises:
        ValueError: If the run has no validation by layers.
    """
    validations = [found for found in run.validations if found.per_layer]
    if not validations:
        raise ValueError(f"{run.name}: no validation compares layers with a teacher's")
    shape = {key: len(values) for key, values in validations[-1].per_layer.items()}
    # A folder may have runs of both stages.
    validations = [v for v in validations if {k: len(x) for k, x in v.per_layer.items()} == shape]
    taps = list(dict.fromkeys(key.split("/")[0] for key in validations[-1].per_layer))
    figure = Figure(figsize=(15, 3.6 * (1 + len(taps))), dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.12)
    top, *rows = figure.subfigures(1 + len(taps), 1, squeeze=False)[:, 0]
    _draw_losses(top.subplots(1, 2), run)
    steps = [found.step for found in validations]
    for subfigure, tap in zip(rows, taps, strict=True):
        subfigure.suptitle(f"Student against teacher: {_TITLES.get(tap, tap)}", fontsize=11)
        error, cosine, last = subfigure.subplots(1, 3)
        for axes, key in ((error, f"{tap}/error"), (cosine, f"{tap}/cosine")):
            _draw_lines(axes, steps, [found.per_layer[key] for found in validations])
        error.set(ylabel="relative error", yscale="log", xlabel="iteration")
        error.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        error.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7)))
        error.yaxis.set_minor_formatter(PercentFormatter(1.0, decimals=0))
        cosine.set(ylabel="cosine similarity", xlabel="iteration")
        _draw_bars(last, validations[-1].per_layer[f"{tap}/error"], steps[-1])
    figure.suptitle(label, fontsize=13, fontweight="bold")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _color(layer: int, count: int) -> tuple:
    return _COLORS(0.92 * layer / max(1, count - 1))


def _draw_losses(axes: tuple[Axes, Axes], run: TrainingLog) -> None:
    total, layers = axes
    total.plot(*run.series("loss"), color="#1a73e8")
    total.set(title="Training loss", xlabel="iteration", yscale="log")
    keys = sorted({key for record in run.train for key in record if key.startswith("loss_")})
    numbered = bool(keys) and all(key.removeprefix("loss_").isdigit() for key in keys)
    for i, key in enumerate(keys):
        color = _color(i, len(keys)) if numbered else f"C{i}"
        layers.plot(*run.series(key), color=color, label=None if numbered else key, linewidth=1)
    layers.set(title="Training loss of each layer" if numbered else "Its parts")
    layers.set(xlabel="iteration", yscale="log")
    if numbered:
        _add_depth(layers, len(keys))
    elif keys:
        layers.legend(fontsize=8)
    for part in axes:
        part.grid(alpha=0.3, which="both")
        part.xaxis.set_major_formatter(EngFormatter())


def _draw_lines(axes: Axes, steps: list[int], values: list[list[float]]) -> None:
    count = len(values[0])
    for layer, line in enumerate(zip(*values, strict=True)):
        axes.plot(steps, line, color=_color(layer, count), linewidth=1.2, marker=".", markersize=3)
    axes.grid(alpha=0.3, which="both")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter())
    _add_depth(axes, count)


def _add_depth(axes: Axes, count: int) -> None:
    scale = Normalize(0, (count - 1) / 0.92 if count > 1 else 1)
    bar = axes.figure.colorbar(ScalarMappable(scale, _COLORS), ax=axes, fraction=0.04, pad=0.02)
    bar.ax.set_ylim(0, max(count - 1, 1))
    bar.set_label("layer", fontsize=8)
    bar.ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))


def _draw_bars(axes: Axes, errors: list[float], step: int) -> None:
    count = len(errors)
    colors = [_color(layer, count) for layer in range(count)]
    bars = axes.bar(range(count), errors, color=colors)
    if count <= 16:
        axes.bar_label(bars, [f"{100 * error:.1f}" for error in errors], fontsize=7, padding=1)
    axes.set(title=f"At iteration {step:,}", xlabel="layer", ylabel="relative error")
    axes.title.set_fontsize(10)
    axes.margins(y=0.1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3, axis="y")
