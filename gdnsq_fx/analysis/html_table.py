"""The table of edges of the HTML report, sortable by a click on a header."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import prod

from gdnsq_fx.analysis.edge_report import EdgeReport
from gdnsq_fx.analysis.notation import bits_of, divergence, quantity
from gdnsq_fx.analysis.shown import divergence_shares, more_facts


@dataclass(frozen=True)
class _Cell:
    """One cell: what it shows, and what it is sorted by."""

    column: str
    shown: str
    value: str | float | None
    bar: float | None = None

    @property
    def is_text(self) -> bool:
        return isinstance(self.value, str)


def edge_table(edges: Sequence[EdgeReport], slack: Mapping[str, float]) -> str:
    """One row for each edge, in the order given; bottlenecks are marked."""
    shares = divergence_shares(edges)
    widest = max(shares.values(), default=0.0) or 1.0
    rows = [_cells(e, shares[e.name], widest, slack.get(e.name)) for e in edges]
    columns = dict[str, bool]()
    for row in rows:
        columns |= {cell.column: cell.is_text for cell in row}
    head = "".join(_header(column, text) for column, text in columns.items())
    body = "\n".join(
        _row(row, columns, edge.bottleneck)
        for row, edge in zip(rows, edges, strict=True)
    )
    return (
        f'<div class="wide"><table id="edges"><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _cells(
    edge: EdgeReport, share: float, widest: float, slack: float | None
) -> list[_Cell]:
    predicted, measured = edge.predicted_divergence, edge.measured_divergence
    cells = [
        _Cell("edge", edge.name, edge.name),
        _Cell("op", edge.op, edge.op),
        _Cell("shape", "×".join(str(n) for n in edge.shape), float(prod(edge.shape))),
        _Cell("bits", bits_of(edge), edge.bits),
        _Cell("capacity, bit", quantity(edge.capacity), edge.capacity),
        _Cell("entropy, bit", quantity(edge.entropy), edge.entropy),
        _Cell("used", f"{edge.utilisation:.0%}", edge.utilisation),
        _Cell("SQNR, dB", f"{edge.sqnr_db:.1f}", edge.sqnr_db),
        _Cell("slack, bit", "" if slack is None else quantity(slack), slack),
        _Cell("divergence, nat", f"{predicted:.2e}", predicted),
        _Cell("share", f"{share:.1%}", share, bar=share / widest),
    ]
    if measured is not None:
        cells.append(_Cell("measured, nat", divergence(measured), measured))
    more = more_facts(edge).items()
    return [*cells, *(_Cell(k.replace("_", " "), f"{v:.3g}", v) for k, v in more)]


def _header(column: str, is_text: bool) -> str:
    kind = ' class="text"' if is_text else ""
    order = ' aria-sort="descending"' if column == "divergence, nat" else ""
    return (
        f'<th{kind}{order} scope="col"><button type="button">{escape(column)}'
        "</button></th>"
    )


def _row(cells: Sequence[_Cell], columns: Mapping[str, bool], bottleneck: bool) -> str:
    by_column = {cell.column: cell for cell in cells}
    mark = ' class="bottleneck"' if bottleneck else ""
    data = "".join(
        _data(by_column.get(column, _Cell(column, "", None)), is_text)
        for column, is_text in columns.items()
    )
    return f"<tr{mark}>{data}</tr>"


def _data(cell: _Cell, is_text: bool) -> str:
    kind = ' class="text"' if is_text else ""
    value = "" if cell.value is None else escape(str(cell.value))
    bar = ""
    if cell.bar is not None:
        bar = f'<span class="bar"><i style="width:{100 * cell.bar:.1f}%"></i></span>'
    return f'<td{kind} data-value="{value}">{escape(cell.shown)}{bar}</td>'
