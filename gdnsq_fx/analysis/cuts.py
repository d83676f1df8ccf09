"""The network as a flow of bits: its graph and its minimum cut (networkx).

Every value of the graph is a node that carries so many bits per sample: the capacity of
its quantizer, or 32 bits an element where it is floating point. A value read twice
still carries its bits once, so capacities belong to nodes; for the cut each node is
split.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch.fx import GraphModule, Node

from gdnsq_fx.analysis.capacity import FLOAT_BITS
from gdnsq_fx.annotations import facts
from gdnsq_fx.sites import sites

SOURCE, SINK = "source", "sink"
# Bits are real numbers (N log2 3), and networkx's flows are exact on whole ones only:
# capacities are counted in 2^-32 bit.
UNITS = 1 << 32


@dataclass(frozen=True)
class MinimumCut:
    """A narrowest set of values between the model's inputs and its last quantizer.

    Attributes:
        values: names of edges (or nodes, where the value is floating point) in the cut.
        bits: bits per sample that they carry together.
        float_bits: bits per sample that floating point sends across the same cut.
    """

    values: tuple[str, ...]
    bits: float
    float_bits: float

    @property
    def share(self) -> float:
        """Bits of the quantized model over those of floating point, 0..1."""
        return self.bits / self.float_bits if self.float_bits else 0.0


def capacity_graph(graph_module: GraphModule) -> nx.DiGraph[str]:
    """Values that flow from the inputs to the output, as a directed graph.

    Nodes carry ``label`` (edge or layer name), ``operation`` (its name in the op
    table), ``macs`` and ``bits`` and ``float_bits`` per sample, ``weights`` (names of
    the weight edges it reads), and ``quantized``; edges carry ``capacity``, the bits of
    their producer. Nodes stand in topological order.
    """
    graph: nx.DiGraph[str] = nx.DiGraph()
    flowing: set[Node] = set()
    shares = _shares(graph_module)
    for node in graph_module.graph.nodes:
        producers = [p for p in node.all_input_nodes if p in flowing]
        enters = node.op == "placeholder"
        leaves = node.op == "output"
        if not (enters or producers) or not (leaves or facts(node).elements):
            continue
        flowing.add(node)
        others = [p for p in node.all_input_nodes if p not in flowing]
        graph.add_node(
            node.name,
            op=node.op,
            weights=[facts(p).layer for p in others if facts(p).edge is not None],
            **_bits(node, shares.get(node, 1.0)),
        )
        for producer in producers:
            capacity = graph.nodes[producer.name]["bits"]
            graph.add_edge(producer.name, node.name, capacity=capacity)
    return graph


def minimum_cut(graph: nx.DiGraph[str]) -> MinimumCut | None:
    """The narrowest cut upstream of the last quantizers; None without a path.

    Values after the last quantizer (the logits, which are narrow in any precision)
    cannot be cut.
    """
    split = split_values(graph)
    if SOURCE not in split or SINK not in split:
        return None
    try:
        _, (near, far) = nx.minimum_cut(split, SOURCE, SINK)
    except nx.NetworkXUnbounded:
        return None
    return cut_of(graph, [n for n in graph if f"{n}:in" in near and f"{n}:out" in far])


def split_values(graph: nx.DiGraph[str]) -> nx.DiGraph[str]:
    """Each value ``v`` as an arc ``v:in`` -> ``v:out`` of its bits, between two ends.

    Capacities are in `UNITS`. The other arcs, and values after the last quantizer,
    have no ``capacity``: they cannot be cut.
    """
    split: nx.DiGraph[str] = nx.DiGraph()
    cuttable = upstream_of_quantizers(graph)
    for name, data in graph.nodes(data=True):
        limit = {"capacity": units(data["bits"])} if name in cuttable else {}
        split.add_edge(f"{name}:in", f"{name}:out", **limit)
        if data["op"] == "placeholder":
            split.add_edge(SOURCE, f"{name}:in")
        if data["op"] == "output":
            split.add_edge(f"{name}:out", SINK)
    for producer, consumer in graph.edges:
        split.add_edge(f"{producer}:out", f"{consumer}:in")
    return split


def units(bits: float) -> int:
    """Bits as a whole number of `UNITS`."""
    return round(bits * UNITS)


def cut_of(graph: nx.DiGraph[str], names: Iterable[str]) -> MinimumCut:
    """What the values of these names carry together."""
    data = [graph.nodes[n] for n in names]
    return MinimumCut(
        tuple(d["label"] for d in data),
        float(sum(d["bits"] for d in data)),
        float(sum(d["float_bits"] for d in data)),
    )


def _shares(graph_module: GraphModule) -> dict[Node, float]:
    """What each call of a quantizer holds of the elements of all its calls."""
    found: dict[Node, float] = {}
    for site in sites(graph_module):
        elements = sum(facts(node).elements for node in site.nodes)
        for node in site.nodes:
            found[node] = facts(node).elements / elements if elements else 1.0
    return found


def _bits(node: Node, share: float) -> dict[str, Any]:
    found = facts(node)
    float_bits = float(found.elements * FLOAT_BITS)
    quantized = found.edge is not None
    return {
        "label": found.layer or node.name,
        "operation": found.op.name if found.op is not None else "",
        "macs": found.macs,
        "bits": share * found.edge.capacity if found.edge is not None else float_bits,
        "float_bits": float_bits,
        "quantized": quantized,
    }


def upstream_of_quantizers(graph: nx.DiGraph[str]) -> set[str]:
    """Quantized values and all before them; nodes stand in topological order."""
    found: set[str] = set()
    for name in reversed(list(graph)):
        if graph.nodes[name]["quantized"] or not found.isdisjoint(graph[name]):
            found.add(name)
    return found
