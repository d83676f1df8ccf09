"""The cut that keeps the smallest share of what floating point sends across it.

The narrowest values of a network (its head) are narrow in any precision, so cuts are
also compared by their share: bits of the quantized model over bits of floating point.
Shares are compared over *clean* cuts, where what is known on the near side needs
nothing from the far side, and every value is read on one side only: beyond the cut
where it is part of it, on its own side where it is not. No value of a clean cut can be
computed from the others, so none is there only to lower the share.

With x = 1 on the near side, a clean cut costs ``sum_v w_v (x_tail(v) - x_head(v))``,
linear in x for weights of either sign. For ``w = bits - share * float_bits`` the
cheapest one is a minimum closure (Picard, Management Science 22, 1976), which a
maximum flow finds, and Dinkelbach's iteration (Management Science 13, 1967) brings
``share`` down to the smallest one.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import networkx as nx

from gdnsq_fx.analysis.cuts import (
    SINK,
    SOURCE,
    MinimumCut,
    cut_of,
    units,
    upstream_of_quantizers,
)

# Cuts whose shares differ by less than one part in a million are level: of those, the
# one with the fewest bits is wanted.
TIE = 1e-6
MAX_ITERATIONS = 100


def relative_cut(graph: nx.DiGraph[str]) -> MinimumCut | None:
    """The clean cut of the smallest share; None where there is no clean cut.

    Args:
        graph: as `capacity_graph` makes it. Values after the last quantizer cannot be
            cut; a cut has a share where floating point sends at least one bit.
    """
    arcs, sides = _segments(graph)
    if not arcs:
        return None
    weights = {name: units(graph.nodes[name]["float_bits"]) for name in arcs}
    best = _cheapest(arcs, sides, weights)
    for _ in range(MAX_ITERATIONS):
        share = cut_of(graph, best).share
        weights = {name: _weight(graph, name, share) for name in arcs}
        found = _cheapest(arcs, sides, weights)
        if sum(weights[n] for n in found) >= sum(weights[n] for n in best):
            break
        best = found
    return cut_of(graph, best) if best else None


def _weight(graph: nx.DiGraph[str], name: str, share: float) -> int:
    data = graph.nodes[name]
    return units(data["bits"] * (1.0 + TIE) - share * data["float_bits"])


def _segments(
    graph: nx.DiGraph[str],
) -> tuple[dict[str, tuple[int, int]], tuple[int, int]]:
    """Values as arcs between segments, which no clean cut divides; and its two ends.

    The segments are acyclic. Values that no clean cut holds have no arc.
    """
    nets: nx.Graph[Hashable] = nx.Graph()
    useful = _between_ends(graph)
    cuttable = upstream_of_quantizers(graph)
    for name in useful:
        data = graph.nodes[name]
        nets.add_nodes_from([f"{name}:in", f"{name}:out"])
        nets.add_edges_from(
            (f"{name}:out", f"{reader}:in")
            for reader in graph[name]
            if reader in useful
        )
        if name not in cuttable:
            nets.add_edge(f"{name}:in", f"{name}:out")
        if data["op"] == "placeholder":
            nets.add_edge(SOURCE, f"{name}:in")
        if data["op"] == "output":
            nets.add_edge(f"{name}:out", SINK)
    if SOURCE not in nets or SINK not in nets:
        return {}, (0, 0)
    net_of = _numbered(nx.connected_components(nets))
    flow: nx.DiGraph[int] = nx.DiGraph()
    flow.add_nodes_from(net_of.values())
    flow.add_edges_from((net_of[f"{n}:in"], net_of[f"{n}:out"]) for n in useful)
    loop_of = _numbered(nx.strongly_connected_components(flow))
    ends = {n: (net_of[f"{n}:in"], net_of[f"{n}:out"]) for n in useful}
    arcs = {n: (loop_of[tail], loop_of[head]) for n, (tail, head) in ends.items()}
    sides = (loop_of[net_of[SOURCE]], loop_of[net_of[SINK]])
    if sides[0] == sides[1]:
        return {}, sides
    return {n: arc for n, arc in arcs.items() if arc[0] != arc[1]}, sides


def _between_ends(graph: nx.DiGraph[str]) -> list[str]:
    """Values that lead from an input to the output."""
    outputs = [n for n, d in graph.nodes(data=True) if d["op"] == "output"]
    useful = set(outputs)
    for output in outputs:
        useful |= nx.ancestors(graph, output)
    return [n for n in graph if n in useful]


def _numbered(groups: Iterable[Iterable[Hashable]]) -> dict[Hashable, int]:
    return {member: n for n, group in enumerate(groups) for member in group}


def _cheapest(
    arcs: dict[str, tuple[int, int]], sides: tuple[int, int], weights: dict[str, int]
) -> list[str]:
    """The clean cut of the least total weight, as a minimum closure.

    Segment s costs ``weight out - weight in`` on the near side. The maximum flow
    chooses: a capacity from the source is what leaving it far would forgo, one to the
    sink what taking it near costs, and an arc without limit takes along what a segment
    needs.
    """
    cost: dict[int, int] = dict.fromkeys(sides, 0)
    for name, (tail, head) in arcs.items():
        cost[tail] = cost.get(tail, 0) + weights[name]
        cost[head] = cost.get(head, 0) - weights[name]
    network: nx.DiGraph[int | str] = nx.DiGraph()
    network.add_edge(SOURCE, sides[0])
    network.add_edge(sides[1], SINK)
    for segment, value in cost.items():
        if segment in sides:  # fixed already
            continue
        if value < 0:
            network.add_edge(SOURCE, segment, capacity=-value)
        elif value > 0:
            network.add_edge(segment, SINK, capacity=value)
    for tail, head in arcs.values():
        network.add_edge(head, tail)
    _, (near, _) = nx.minimum_cut(network, SOURCE, SINK)
    return [n for n, (tail, head) in arcs.items() if tail in near and head not in near]
