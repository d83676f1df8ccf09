"""How much each value could lose before it becomes part of the minimum cut.

By max-flow min-cut, the minimum cut keeps its bits while some maximum flow passes with
less through the value. So with f_v the flow through v in one maximum flow,

    slack_v = (bits_v - f_v) + min(f_v, what the residual network can carry round v),

and 0 marks the values of a minimum cut. One maximum flow serves all values; only those
whose flow has another way need a second, small one in its residual network.
"""

from __future__ import annotations

import math
from typing import Any

import networkx as nx
from networkx.algorithms.flow import edmonds_karp, preflow_push

from gdnsq_fx.analysis.cuts import SINK, SOURCE, UNITS, split_values, units


def slack_of(graph: nx.DiGraph[str]) -> dict[str, float]:
    """Slack of every quantized value, bits per sample, by its label.

    A value that keeps out of the minimum cut even with no bits left has all its bits as
    slack. Where several values share a label, the least slack counts.

    Args:
        graph: as `capacity_graph` makes it.

    Returns:
        Empty where the network has no minimum cut.
    """
    split = split_values(graph)
    if SOURCE not in split or SINK not in split:
        return {}
    try:
        flow = preflow_push(split, SOURCE, SINK)
    except nx.NetworkXUnbounded:
        return {}
    residual = _residual(flow)
    loops = nx.strongly_connected_components(_open_arcs(residual))
    loop_of = {name: n for n, loop in enumerate(loops) for name in loop}
    found: dict[str, float] = {}
    for name, data in graph.nodes(data=True):
        ends = (f"{name}:in", f"{name}:out")
        if not data["quantized"] or "capacity" not in split.edges[ends]:
            continue
        through = flow.edges[ends]["flow"]
        slack = units(data["bits"]) - through
        if through > 0 and loop_of[ends[0]] == loop_of[ends[1]]:
            slack += _round_about(residual, *ends, through)
        label = data["label"]
        found[label] = min(slack / UNITS, found.get(label, math.inf))
    return found


def _residual(flow: nx.DiGraph[str]) -> nx.DiGraph[str]:
    """What a maximum flow leaves, in the form that networkx's algorithms work on."""
    residual: nx.DiGraph[str] = nx.DiGraph(inf=flow.graph["inf"])
    for tail, head, data in flow.edges(data=True):
        left = data["capacity"] - data["flow"]
        residual.add_edge(tail, head, capacity=left, flow=0)
    return residual


def _open_arcs(residual: nx.DiGraph[str]) -> nx.DiGraph[str]:
    """The arcs that can carry more."""
    arcs = residual.edges(data="capacity")
    opened: nx.DiGraph[str] = nx.DiGraph()
    opened.add_nodes_from(residual)
    opened.add_edges_from((tail, head) for tail, head, left in arcs if left > 0)
    return opened


def _round_about(residual: nx.DiGraph[str], tail: str, head: str, wanted: int) -> int:
    """How much of the wanted flow from tail to head can leave the arc between them."""
    arcs: list[dict[str, Any]] = [
        residual.edges[tail, head],
        residual.edges[head, tail],
    ]
    kept = [arc["capacity"] for arc in arcs]
    for arc in arcs:
        arc["capacity"] = 0
    done = edmonds_karp(residual, tail, head, residual=residual, cutoff=wanted)
    for arc, capacity in zip(arcs, kept, strict=True):
        arc["capacity"] = capacity
    return min(done.graph["flow_value"], wanted)
