"""The plot of `benchmark.py block` and `model`: time of an image against its resolution."""

import io
from collections import Counter
from collections.abc import Sequence

from benchmark_table import encoder_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

# Mixers have a color each in every plot; attention's backends are shades of one.
COLORS = {
    "cgspn": "#1a73e8",
    "cgspn-lean": "#12a4b8",
    "hybrid": "#188038",
    "attention (flash)": "#b3261e",
    "attention (cudnn)": "#e8710a",
    "attention (efficient)": "#d01884",
    "attention (math)": "#8a8d91",
}
OTHER_COLORS = ("#8430ce", "#7a5c00", "#3c4043", "#5e97f6", "#9c7bd4")
TITLES = dict(forward="forward", train="training step (forward and backward)")


def draw_times(figures: dict) -> bytes:
    """Draws milliseconds per image against the side of the image, both axes logarithmic.

    There is a panel for each mode and a line for each contender, at the smallest batch. Crosses
    above a panel mark the sizes at which the memory ran out. What ran nowhere is left out.

    Args:
        figures: as `benchmark.py` writes them.

    Returns:
        A PNG file.
    """
    rows = figures["rows"]
    batch = min(row["batch"] for row in rows)
    rows = [row for row in rows if row["batch"] == batch]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    shown = [row for row in rows if "ms" in row or row["error"] == "out of memory"]
    labels = list(dict.fromkeys(row["contender"] for row in shown))
    others = [label for label in labels if label not in COLORS]
    colors = COLORS | {o: OTHER_COLORS[i % len(OTHER_COLORS)] for i, o in enumerate(others)}

    figure = Figure(figsize=(1 + 6 * len(modes), 6), dpi=120, layout="constrained")
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        of_mode = [row for row in rows if row["mode"] == mode]
        for label in labels:
            points = [(r["size"], r["ms"] / batch) for r in of_mode if _has_time(r, label)]
            if points:
                axes.plot(*zip(*points, strict=True), color=colors[label], marker="o", markersize=4)
        crosses = _draw_crosses(axes, of_mode, colors)
        axes.set_title(TITLES[mode], loc="left", fontsize=11, pad=6 + 13 * crosses)
        _style(axes, sorted({row["size"] for row in rows}))
    handles = [Line2D([], [], color=colors[label], marker="o", label=label) for label in labels]
    if any(row.get("error") == "out of memory" for row in rows):
        handles.append(
            Line2D([], [], color="#5f6368", marker="x", linestyle="", label="out of memory")
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle(
        f"{encoder_of(figures)}, {figures['patch_size']}-pixel patches, batch {batch}, "
        f"{figures['dtype']}, {figures['device']}",
        fontsize=12,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _has_time(row: dict, contender: str) -> bool:
    return row["contender"] == contender and "ms" in row


def _draw_crosses(axes: Axes, rows: Sequence[dict], colors: dict[str, str]) -> int:
    """Marks the rows without memory in piles; returns the height of the highest."""
    piles = Counter()
    for row in rows:
        if row.get("error") == "out of memory":
            # Above the axes, since there is no time to put them at.
            height = 1.02 + 0.03 * piles[row["size"]]
            piles[row["size"]] += 1
            axes.plot(
                row["size"],
                height,
                "x",
                color=colors[row["contender"]],
                transform=axes.get_xaxis_transform(),
                clip_on=False,
            )
    return max(piles.values(), default=0)


def _style(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("side of the image, pixels", fontsize=10)
    axes.set_ylabel("time per image, ms", fontsize=10)
    axes.grid(which="major", color="#dadce0", linewidth=0.8)
    axes.grid(which="minor", color="#eceff1", linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
