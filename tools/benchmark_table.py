"""The tables of the benchmarks."""

import math
from collections.abc import Callable, Sequence
from itertools import groupby

from rich.table import Table

from cgspn_seg.ops import DIRECTIONS

WIDTH = 120  # of a table that goes to a file or a pipe, in characters


def three_digits(value: float) -> str:
    """A positive number with three digits that count, or all those before its point."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def ratio(key: str) -> Callable[[dict], str]:
    """Shows the ratio with this key, with a star where the other's time was not measured here."""
    return lambda f: three_digits(f[f"{key}_ratio"]) + "×" + "*" * f.get(f"{key}_quoted", False)


# Header, the figure without which a pass has a dash there, and how it is shown.
OP_COLUMNS: tuple[tuple[str, str, Callable[[dict], str]], ...] = (
    ("time", "ms", lambda f: three_digits(f["ms"])),
    ("MB", "min_bytes", lambda f: three_digits(f["min_bytes"] * 1e-6)),
    ("GB/s", "gb_per_s", lambda f: three_digits(f["gb_per_s"])),
    ("of copy", "copy_share", lambda f: f"{f['copy_share']:.1%}"),
    ("µs/line", "us_per_line", lambda f: three_digits(f["us_per_line"])),
    ("reference", "reference_ms", lambda f: three_digits(f["reference_ms"])),
    ("ratio", "reference_ratio", ratio("reference")),
    ("GSPN", "original_ms", lambda f: three_digits(f["original_ms"])),
    ("ratio", "original_ratio", ratio("original")),
)


def op_table(figures: dict) -> Table:
    """What benchmark_op measured, a row for each case; columns that no case fills are left out."""
    passes = [f for row in figures["rows"] for f in row["passes"].values()]
    columns = [column for column in OP_COLUMNS if any(column[1] in f for f in passes)]
    title = f"line_scan, {figures['device']}; median milliseconds, "
    if "copy_gb_per_s" in figures:
        title += f"{figures['runs']} runs; a copy moves {figures['copy_gb_per_s']:.0f} GB/s"
    else:
        title += f"{figures['threads']} threads"
    table = Table(title=title, show_lines=True)
    table.add_column("B×H×W×C")
    table.add_column()
    for header, _, _ in columns:
        table.add_column(header, justify="right")
    for row in figures["rows"]:
        names = row["directions"]
        directions = "all four" if len(names) == len(DIRECTIONS) else " + ".join(names)
        table.add_row(
            "×".join(map(str, row["shape"]))
            + f"\n{row['dtype']}, {directions}, G = {row['groups']}",
            "\n".join(name.replace("_", " + ") for name in row["passes"]),
            *(
                "\n".join(show(f) if key in f else "–" for f in row["passes"].values())
                for _, key, show in columns
            ),
        )
    if any(f.get("original_quoted") for f in passes):
        table.caption = "* against times measured on one H200, not in this run"
    return table


def shown_time(row: dict) -> str:
    """The time, or why there is none; with a star where Python's launches may be part of it."""
    if "error" in row:
        return row["error"]
    return three_digits(row["ms"]) + "*" * (row["timing"] == "events")


PARAMETERS = ("Mparams", "parameters", lambda r: three_digits(r["parameters"] * 1e-6))
IMAGES_PER_S = ("images/s", "images_per_s", lambda r: three_digits(r["images_per_s"]))
PEAK = ("peak GiB", "peak_gib", lambda r: three_digits(r["peak_gib"]))

# As OP_COLUMNS; the last two are there whether or not a row could be measured.
MODEL_COLUMNS: tuple[tuple[str, str, Callable[[dict], str]], ...] = (
    IMAGES_PER_S,
    ("time vs\nattention", "vs_attention", lambda r: three_digits(r["vs_attention"]) + "×"),
    PEAK,
    (
        "memory vs\nattention",
        "memory_vs_attention",
        lambda r: three_digits(r["memory_vs_attention"]) + "×",
    ),
    PARAMETERS,
    ("GFLOP/image", "flops_per_image", lambda r: three_digits(r["flops_per_image"] * 1e-9)),
)
ENCODER_COLUMNS: tuple[tuple[str, str, Callable[[dict], str]], ...] = (
    IMAGES_PER_S,
    PEAK,
    PARAMETERS,
    ("GMAC/image", "macs_per_image", lambda r: three_digits(r["macs_per_image"] * 1e-9)),
    ("library", "library", lambda r: r["library"]),
)


def encoder_of(figures: dict) -> str:
    """What was measured, in a few words."""
    if figures["part"] == "block":
        return f"block of {figures['arch']}"
    return f"{figures['arch']}, {figures['layers']} layers"


def case_of(row: dict) -> str:
    """What a row has in common with those beside it."""
    case = "{mode}, {size} px, batch {batch}" if "mode" in row else "{size} px"
    return case.format(**row)


def row_table(
    figures: dict, title: str, first: str, columns: Sequence, notes: Sequence[str] = ()
) -> Table:
    """Rows by mode, size and batch; columns that no row fills are left out.

    Args:
        figures: with `rows`.
        title: what stands above.
        first: the header of the contenders' column.
        columns: like OP_COLUMNS, those after the time.
        notes: lines that stand below, with one about times if one is needed.
    """
    rows = figures["rows"]
    columns = [column for column in columns if any(column[1] in row for row in rows)]
    if any("mode" in row for row in rows):
        columns = [("ms", "contender", shown_time), *columns]
    elif any("error" in row for row in rows):
        columns = [*columns, ("", "contender", lambda row: row.get("error", ""))]
    table = Table(title=title)
    table.add_column(first, overflow="fold")
    for header, _, _ in columns:
        table.add_column(header, justify="right")
    for case, members in groupby(rows, case_of):
        table.add_row(case, style="bold")
        for row in members:
            cells = (show(row) if key in row else "–" for _, key, show in columns)
            table.add_row(row["contender"], *cells)
        table.add_section()
    if any(row.get("timing") == "events" for row in rows):
        notes = [*notes, "* launched by Python, not replayed from a CUDA graph"]
    table.caption = "\n".join(notes) or None
    return table


def shown_threads(figures: dict) -> str:
    """The number of the CPU's threads, where it counts."""
    return f", {figures['threads']} threads" if "threads" in figures else ""


def model_table(figures: dict) -> Table:
    """What benchmark_model measured."""
    title = (
        f"{encoder_of(figures)}, {figures['patch_size']}-pixel patches, {figures['dtype']}, "
        f"{figures['device']}{shown_threads(figures)}; time of a batch, medians"
    )
    notes = []
    if any("vs_attention" in row for row in figures["rows"]):
        notes = ["vs attention: what its fastest backend takes, over what this takes"]
    return row_table(figures, title, "mixer", MODEL_COLUMNS, notes)


def encoder_table(figures: dict) -> Table:
    """What benchmark_encoders measured, or count_encoders counted."""
    title = "encoders, without heads"
    if any("mode" in row for row in figures["rows"]):
        title += f", {figures['dtype']}, {figures['device']}{shown_threads(figures)}"
        title += "; time of a batch, medians"
    return row_table(figures, title, "encoder", ENCODER_COLUMNS)
