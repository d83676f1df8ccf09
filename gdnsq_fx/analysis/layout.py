"""Where the nodes of a drawing stand: in layers, folded into rows as text is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, inf

import networkx as nx

from gdnsq_fx.extras import required

MAX_COLUMNS = 26  # layers in a row: some 45 pixels each on a page
ROW_GAP = 1.7  # in lanes, for the labels below a row
Point = tuple[float, float]
# A node, or where its value passes a layer on the way to readers further on.
Stop = str | tuple[str, int]


@dataclass(frozen=True)
class Layout:
    """Coordinates, x to the right in layers, y downwards in lanes.

    Attributes:
        points: of every node.
        lines: for every edge the pieces of its line, one for each row it runs through.
        columns: width of a row, layers.
        height: of all rows, lanes.
    """

    points: dict[str, Point]
    lines: dict[tuple[str, str], list[list[Point]]]
    columns: int
    height: float


def layered_layout(graph: nx.DiGraph[str]) -> Layout:
    """Sugiyama's layered layout (igraph), its layers folded into rows.

    Args:
        graph: acyclic.

    Raises:
        MissingExtraError: igraph is not installed.
    """
    generations = list(nx.topological_generations(graph))
    layer = {name: n for n, names in enumerate(generations) for name in names}
    rows = max(ceil(len(generations) / MAX_COLUMNS), 1)
    columns = max(ceil(len(generations) / rows), 1)
    stops = {
        (tail, head): [
            tail,
            *((tail, n) for n in range(layer[tail] + 1, layer[head])),
            head,
        ]
        for tail, head in graph.edges
    }
    places: dict[Stop, int] = {**layer}
    places |= {s: s[1] for run in stops.values() for s in run if isinstance(s, tuple)}
    lanes = _lanes(places, stops.values())
    points, height = _folded(places, lanes, columns, rows)
    return Layout(
        {name: points[name] for name in graph},
        {edge: _pieces([points[s] for s in run]) for edge, run in stops.items()},
        columns,
        height,
    )


def _lanes(
    places: Mapping[Stop, int], runs: Iterable[Sequence[Stop]]
) -> dict[Stop, float]:
    """Position of every stop within its layer, with few crossings."""
    igraph = required("igraph", "the drawing of the network")
    number = {stop: n for n, stop in enumerate(places)}
    drawn = igraph.Graph(len(number), directed=True)
    drawn.add_edges(
        list({(number[a], number[b]) for run in runs for a, b in pairwise(run)})
    )
    laid_out = drawn.layout_sugiyama(layers=list(places.values()))
    return _spread(places, {stop: float(laid_out[n][0]) for stop, n in number.items()})


def _spread(
    places: Mapping[Stop, int], lanes: Mapping[Stop, float]
) -> dict[Stop, float]:
    """At least one lane between the stops of a layer: igraph may leave half of one."""
    spread: dict[Stop, float] = {}
    lowest: dict[int, float] = {}
    for stop in sorted(lanes, key=lanes.__getitem__):
        layer = places[stop]
        spread[stop] = max(lanes[stop], lowest.get(layer, -inf) + 1.0)
        lowest[layer] = spread[stop]
    return spread


def _folded(
    places: Mapping[Stop, int], lanes: Mapping[Stop, float], columns: int, rows: int
) -> tuple[dict[Stop, Point], float]:
    """Points with the rows below each other, and the height of all."""
    points: dict[Stop, Point] = {}
    height = 0.0
    for row in range(rows):
        inside = [s for s, place in places.items() if place // columns == row]
        heights = _packed([lanes[stop] for stop in inside])
        for stop in inside:
            at = height + heights[lanes[stop]]
            points[stop] = (float(places[stop] % columns), at)
        height += max(heights.values(), default=0.0) + ROW_GAP
    return points, height


def _packed(lanes: Iterable[float]) -> dict[float, float]:
    """Lanes from 0 on in the same order, gaps of more than one lane closed to one."""
    ordered = sorted(set(lanes))
    packed = dict.fromkeys(ordered[:1], 0.0)
    for before, after in pairwise(ordered):
        packed[after] = packed[before] + min(after - before, 1.0)
    return packed


def _pieces(run: Sequence[Point]) -> list[list[Point]]:
    """A line through these points, broken where it goes on in the next row."""
    pieces = [[run[0]]]
    for before, after in pairwise(run):
        if after[0] < before[0]:
            pieces[-1].append((before[0] + 0.5, before[1]))
            pieces.append([(-0.5, after[1])])
        pieces[-1].append(after)
    return pieces
