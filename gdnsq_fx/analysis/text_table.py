"""The table of edges as plain text, with as many columns as fit its width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tabulate import SEPARATING_LINE, tabulate

from gdnsq_fx.analysis.bars import LEAST_BAR, with_bars
from gdnsq_fx.analysis.edge_report import EdgeReport
from gdnsq_fx.analysis.notation import bits_of, divergence, quantity, shortened

MARK = "<<"
LONGEST_NAME, LEAST_NAME = 40, 16
_LEFT = 3  # edge, op and shape are text; the rest are numbers

Column = tuple[str, Callable[[EdgeReport], str]]

ENTROPY = "entropy"
JOINT = "joint"


def edge_table(
    edges: Sequence[EdgeReport], width: int, colour: bool
) -> tuple[list[str], set[str]]:
    """One line for each edge, a bar at its end.

    Columns that say what others imply are left out where there is no room, then names
    are shortened.

    Args:
        edges: in the order to show them.
        width: columns of the whole.
        colour: with ANSI colours, for a terminal.

    Returns:
        Lines, and the headers that they have.
    """
    room = width - LEAST_BAR - 1
    lines: list[str] = []
    columns: list[Column] = []
    for columns in _choices(edges):
        for name in range(LONGEST_NAME, LEAST_NAME - 1, -1):
            lines = _drawn(columns, edges, (name, 16, 10))
            if max(map(len, lines)) <= room:
                return with_bars(lines, edges, width, colour), _headers(columns)
    lines = _drawn(columns, edges, (8, 11, 8))
    return with_bars(lines, edges, width, colour), _headers(columns)


def _headers(columns: Sequence[Column]) -> set[str]:
    return {header for header, _ in columns}


def _choices(edges: Sequence[EdgeReport]) -> Iterator[list[Column]]:
    """From all columns to the least; entropy is capacity times the share used."""
    joint = any(edge.joint_divergence is not None for edge in edges)
    for with_joint in (True, False) if joint else (False,):
        for with_entropy in (True, False):
            yield _columns(edges, with_entropy, with_joint)


def _columns(
    edges: Sequence[EdgeReport], with_entropy: bool, with_joint: bool
) -> list[Column]:
    measured = any(edge.measured_divergence is not None for edge in edges)
    columns: list[Column] = [
        ("edge", lambda e: e.name),
        ("op", lambda e: e.op),
        ("shape", lambda e: "x".join(str(n) for n in e.shape)),
        ("bits", bits_of),
        ("capacity", lambda e: quantity(e.capacity)),
    ]
    if with_entropy:
        columns.append((ENTROPY, lambda e: quantity(e.entropy)))
    columns.append(("used", lambda e: f"{100 * e.utilisation:.0f}%"))
    columns.append(("SQNR", lambda e: f"{e.sqnr_db:.1f}"))
    columns.append(("alone", lambda e: divergence(e.predicted_divergence)))
    if measured:
        columns.append(("measured", lambda e: divergence(e.measured_divergence)))
    if with_joint:
        columns.append((JOINT, lambda e: divergence(e.joint_divergence, 1)))
    return [*columns, ("", lambda e: MARK if e.bottleneck else "")]


def _drawn(
    columns: Sequence[Column], edges: Sequence[EdgeReport], widths: tuple[int, int, int]
) -> list[str]:
    """Lines of the table with edge, shape and op of at most these widths."""
    align = ["left"] * _LEFT + ["right"] * (len(columns) - _LEFT - 1) + ["left"]
    name, shape, op = widths
    rows = [[cell(edge) for _, cell in columns] for edge in edges]
    body = [
        [
            shortened(row[0], name),
            shortened(row[1], op),
            shortened(row[2], shape),
            *row[_LEFT:],
        ]
        for row in rows
    ]
    # The header is a row of its own: tabulate pads real headers by two.
    table = tabulate(
        [[header for header, _ in columns], SEPARATING_LINE, *body],
        tablefmt="simple",
        colalign=align,
        disable_numparse=True,
    )
    return [line.rstrip() for line in table.splitlines()[1:-1]]
