"""Pictures of segmentations."""

from cgspn_seg.visualization.overlay import (
    LegendEntry,
    blend,
    colorize,
    enlarge,
    legend_entries,
    legend_panel,
    overlay_with_legend,
    panel_grid,
)
from cgspn_seg.visualization.palette import distinct_palette

__all__ = [
    "LegendEntry",
    "blend",
    "colorize",
    "distinct_palette",
    "enlarge",
    "legend_entries",
    "legend_panel",
    "overlay_with_legend",
    "panel_grid",
]
