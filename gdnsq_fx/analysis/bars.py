"""A bar for each edge at the right of the plain-text report, coloured on a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from math import ceil

from gdnsq_fx.analysis.edge_report import EdgeReport

LEAST_BAR, WIDEST_BAR = 4, 16
HEADER_LINES = 2
_FULL, _PARTS = "█", " ▏▎▍▌▋▊▉"
_RED, _YELLOW, _PLAIN = "\x1b[31m", "\x1b[33m", "\x1b[0m"


def with_bars(
    table: Sequence[str], edges: Sequence[EdgeReport], width: int, colour: bool
) -> list[str]:
    """Lines of a table with bars as long as the predicted divergences.

    Args:
        table: two lines of header, then one for each edge.
        edges: in the order of the lines.
        width: columns of the whole.
        colour: bottlenecks red, the others yellow.
    """
    used = max(len(line) for line in table)
    cells = min(width - used - 1, WIDEST_BAR)
    worst = max((e.predicted_divergence for e in edges), default=0.0)
    if cells < LEAST_BAR or worst <= 0.0:
        return list(table)
    lines = list(table[:HEADER_LINES])
    for line, edge in zip(table[HEADER_LINES:], edges, strict=True):
        drawn = bar(edge.predicted_divergence / worst, cells)
        if colour and drawn:
            drawn = f"{_RED if edge.bottleneck else _YELLOW}{drawn}{_PLAIN}"
        lines.append(f"{line:<{used}} {drawn}".rstrip())
    return lines


def bar(share: float, cells: int) -> str:
    """A bar of eighths of a cell; any share above 0 shows at least one.

    Args:
        share: 0..1 of the cells.
    """
    eighths = min(ceil(share * cells * 8), cells * 8)
    full, part = divmod(eighths, 8)
    return _FULL * full + (_PARTS[part] if part else "")


def prints_colour() -> bool:
    """Whether standard output is a terminal whose user has not set ``NO_COLOR``."""
    # https://no-color.org: any value that is not empty counts.
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    is_terminal = getattr(sys.stdout, "isatty", None)  # without a console: None
    return is_terminal is not None and bool(is_terminal())


def printable(text: str) -> str:
    """The text with bars of ``#`` where standard output has no block characters."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return text.translate({ord(c): "#" for c in _FULL + _PARTS.strip()})
    return text
