"""The network as a zoomable plotly figure, coloured by predicted divergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log10
from typing import Any

import networkx as nx

from gdnsq_fx.analysis.cuts import MinimumCut
from gdnsq_fx.analysis.edge_report import EdgeReport, Findings
from gdnsq_fx.analysis.hover import hover_of, label_of
from gdnsq_fx.analysis.layout import Layout, Point, layered_layout
from gdnsq_fx.analysis.palette import (
    BACKGROUND,
    CUT,
    FAINT,
    FONT,
    HEAT,
    INK,
    LINE,
    QUANTIZED_LINE,
    RELATIVE_CUT,
)
from gdnsq_fx.analysis.shown import divergence_shares
from gdnsq_fx.analysis.sketch import END, JOIN, OPERATION, VALUE, sketch_of
from gdnsq_fx.extras import required

LEAST_SHARE = 1e-4  # the lightest colour; shares run over four decades
LANE_PIXELS = 52
LEAST_HEIGHT = 270  # for the colour bar
_SYMBOLS = {VALUE: "circle", OPERATION: "square", JOIN: "diamond", END: "circle-open"}
_SIZES = {VALUE: 13, OPERATION: 22, JOIN: 13, END: 13}


def network_figure(report: Findings, slack: Mapping[str, float]) -> Any:
    """A ``plotly.graph_objects.Figure``.

    Squares are operations, coloured by the share of the weights they read; circles are
    quantized activations; diamonds join several values. Grey is floating point.

    Raises:
        MissingExtraError: plotly or igraph is not installed.
    """
    plotly = required("plotly.graph_objects", "the HTML report")
    sketch = sketch_of(report.graph)
    layout = layered_layout(sketch)
    figure = plotly.Figure()
    for trace in _lines(sketch, layout):
        figure.add_trace(plotly.Scatter(**trace))
    cuts = ((report.relative_cut, RELATIVE_CUT, 34), (report.cut, CUT, 27))
    for cut, (name, colour), size in cuts:
        trace = _cut_trace(sketch, layout, cut, name, colour, size)
        figure.add_trace(plotly.Scatter(**trace))
    for trace in _nodes(sketch, layout, report.edges, slack):
        figure.add_trace(plotly.Scatter(**trace))
    figure.update_layout(**_page_layout(layout))
    return figure


def _lines(sketch: nx.DiGraph[str], layout: Layout) -> list[dict[str, Any]]:
    """One trace for the values in floating point, one for those on a grid."""
    traces: list[dict[str, Any]] = []
    for quantized, colour in ((False, LINE), (True, QUANTIZED_LINE)):
        x: list[float | None] = []
        y: list[float | None] = []
        for edge, pieces in layout.lines.items():
            if sketch.nodes[edge[0]]["quantized"] is not quantized:
                continue
            for piece in pieces:
                x += [*(p[0] for p in piece), None]
                y += [*(p[1] for p in piece), None]
        line = {"color": colour, "width": 2.5 if quantized else 1.5}
        name = "quantized" if quantized else "floating point"
        traces.append(
            {"x": x, "y": y, "mode": "lines", "line": line, "hoverinfo": "skip"}
            | {"name": name, "showlegend": True}
        )
    return traces


def _cut_trace(
    sketch: nx.DiGraph[str],
    layout: Layout,
    cut: MinimumCut | None,
    name: str,
    colour: str,
    size: int,
) -> dict[str, Any]:
    """Rings round the values of a cut, and a stroke through each."""
    wanted = set(cut.values) if cut is not None else set[str]()
    found = [
        layout.points[n] for n, d in sketch.nodes(data=True) if wanted & {*d["folded"]}
    ]
    x: list[float | None] = []
    y: list[float | None] = []
    for place, lane in found:
        x += [place, place, place, None]
        y += [lane - 0.48, lane, lane + 0.48, None]
    sizes = [0, size, 0, 0] * len(found)
    ring = {"symbol": "circle-open", "size": sizes, "color": colour}
    return {
        "x": x, "y": y, "name": name, "mode": "lines+markers", "hoverinfo": "skip",
        "line": {"color": colour, "width": 1.5, "dash": "dot"},
        "marker": {**ring, "line": {"color": colour, "width": 2.5}, "opacity": 1},
        "showlegend": bool(found),
    }  # fmt: skip


def _nodes(
    sketch: nx.DiGraph[str],
    layout: Layout,
    edges: Sequence[EdgeReport],
    slack: Mapping[str, float],
) -> list[dict[str, Any]]:
    """One trace for each kind of node; the last one brings the colour bar."""
    by_name = {edge.name: edge for edge in edges}
    shares = divergence_shares(edges)
    traces: list[dict[str, Any]] = []
    for kind in (END, JOIN, VALUE, OPERATION):
        names = [n for n, d in sketch.nodes(data=True) if d["kind"] == kind]
        points = [layout.points[n] for n in names]
        data = [sketch.nodes[n] for n in names]
        shown = [_edges_of(d, by_name) for d in data]
        marker = _marker(kind, [[shares[e.name] for e in found] for found in shown])
        traces.append(
            _scatter(points, marker)
            | {
                "name": kind,
                "text": [label_of(d) if kind in (OPERATION, END) else "" for d in data],
                "hovertext": [
                    hover_of(d, found, shares, slack)
                    for d, found in zip(data, shown, strict=True)
                ],
            }
        )
    return traces


def _scatter(points: Sequence[Point], marker: dict[str, Any]) -> dict[str, Any]:
    return {
        "x": [p[0] for p in points],
        "y": [p[1] for p in points],
        "mode": "markers+text",
        "marker": marker,
        "textposition": "bottom center",
        "textfont": {"size": 9.5, "color": INK},
        "hoverinfo": "text",
        "showlegend": False,
    }


def _marker(kind: str, shares: list[list[float]]) -> dict[str, Any]:
    heat = [log10(max(sum(s), LEAST_SHARE)) if s else None for s in shares]
    plain = INK if kind == END else FAINT  # of an open circle it is the outline
    marker: dict[str, Any] = {
        "symbol": _SYMBOLS[kind],
        "size": _SIZES[kind],
        "color": [plain if h is None else _colour(h) for h in heat],
        "line": {"color": INK, "width": 1},
        "opacity": 1,
    }
    if kind == OPERATION:
        ticks = range(round(log10(LEAST_SHARE)), 1)
        marker |= {
            "cmin": log10(LEAST_SHARE),
            "cmax": 0.0,
            "colorscale": HEAT,
            "showscale": True,
            "colorbar": {
                "title": {"text": "share of divergence", "side": "right"},
                "tickvals": list(ticks),
                "ticktext": [f"{100 * 10.0**t:g}%" for t in ticks],
                "thickness": 12,
                "lenmode": "pixels",
                "len": 190,
                "y": 1.0,
                "yanchor": "top",
                "outlinewidth": 0,
            },
        }
    return marker


def _colour(heat: float) -> str:
    """The colour of a logarithm of a share, between the stops of the scale."""
    at = min(max(1.0 - heat / log10(LEAST_SHARE), 0.0), 1.0) * (len(HEAT) - 1)
    low = min(int(at), len(HEAT) - 2)
    ends = (HEAT[low][1], HEAT[low + 1][1])
    parts = [[int(end[i : i + 2], 16) for i in (1, 3, 5)] for end in ends]
    mixed = [round(a + (b - a) * (at - low)) for a, b in zip(*parts, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _edges_of(
    data: Mapping[str, Any], by_name: Mapping[str, EdgeReport]
) -> list[EdgeReport]:
    """Quantized edges that a node stands for."""
    names = [data["label"]] if data["quantized"] else data["weights"]
    return [by_name[name] for name in names if name in by_name]


def _page_layout(layout: Layout) -> dict[str, Any]:
    axis = {"visible": False, "showgrid": False, "zeroline": False}
    top, bottom = -0.75, layout.height - 0.6
    return {
        "height": max(round(110 + LANE_PIXELS * (bottom - top)), LEAST_HEIGHT),
        "xaxis": {**axis, "range": [-0.9, layout.columns - 0.1]},
        "yaxis": {**axis, "range": [bottom, top]},
        "plot_bgcolor": BACKGROUND,
        "paper_bgcolor": BACKGROUND,
        "margin": {"l": 10, "r": 10, "t": 50, "b": 10},
        "dragmode": "pan",
        "hoverlabel": {"bgcolor": "white", "align": "left", "font": {"size": 12}},
        "font": {"family": FONT, "color": INK, "size": 12},
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
    }
