"""The network as it is drawn: operations, quantized values, joins; the rest folded in.

Normalizations, activations and reshapes between them have one input and no bits of
their own to show, so each is drawn as part of the value it reads.
"""

from __future__ import annotations

import networkx as nx

VALUE, OPERATION, JOIN, END = "value", "operation", "join", "end"


def sketch_of(graph: nx.DiGraph[str]) -> nx.DiGraph[str]:
    """What is drawn of a capacity graph, with the same names and data.

    Nodes carry ``kind`` as well: `VALUE` (quantized), `OPERATION` (reads weights or
    multiplies), `JOIN` (several inputs) or `END` (input or output), and ``folded``, the
    labels of what they stand for. They are in topological order.
    """
    sketch: nx.DiGraph[str] = nx.DiGraph()
    drawn_as: dict[str, str] = {}
    for name in graph:
        readings = {drawn_as[p]: None for p in graph.predecessors(name)}
        kind = _kind(graph, name, len(readings))
        if kind is None:
            drawn_as[name] = next(iter(readings))
            sketch.nodes[drawn_as[name]]["folded"].append(graph.nodes[name]["label"])
            continue
        drawn_as[name] = name
        data = graph.nodes[name]
        sketch.add_node(name, **data, kind=kind, folded=[data["label"]])
        sketch.add_edges_from((reading, name) for reading in readings)
    return sketch


def _kind(graph: nx.DiGraph[str], name: str, readings: int) -> str | None:
    """How a value is drawn; None where it is folded into the one it reads."""
    data = graph.nodes[name]
    if data["op"] in ("placeholder", "output"):
        return END
    if data["quantized"]:
        return VALUE
    if data["weights"] or data["macs"]:
        return OPERATION
    return None if readings == 1 else JOIN
