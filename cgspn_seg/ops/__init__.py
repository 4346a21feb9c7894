"""The propagation operator: one line scan for GSPN, GSPN-2 and C-GSPN."""

from cgspn_seg.ops.line_scan import DIRECTIONS, channels_to_add, direction_indices, line_scan
from cgspn_seg.ops.reference import line_scan_reference

__all__ = [
    "DIRECTIONS",
    "channels_to_add",
    "direction_indices",
    "line_scan",
    "line_scan_reference",
]
