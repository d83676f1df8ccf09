"""The capacity profile: what crosses the network at each position along its depth."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx


@dataclass(frozen=True)
class Position:
    """What is still to be read once one more value has been computed.

    Attributes:
        label: the value computed last (edge or layer name).
        bits: bits per sample that cross here. A quantized copy adds nothing where its
            original crosses as well.
        float_bits: what floating point sends across the same position; it has no
            quantized copies, so original and copies count once.
        values: how many values cross.
    """

    label: str
    bits: float
    float_bits: float
    values: int

    @property
    def share(self) -> float:
        """Bits of the quantized model over those of floating point, 0..1."""
        return self.bits / self.float_bits if self.float_bits else 0.0


def capacity_profile(graph: nx.DiGraph[str]) -> tuple[Position, ...]:
    """One position for each value, in topological order; the output has none.

    Args:
        graph: as `capacity_graph` makes it.
    """
    order = {name: place for place, name in enumerate(graph)}
    last_read = {
        name: max((order[reader] for reader in graph[name]), default=-1)
        for name in graph
    }
    alive: set[str] = set()
    found: list[Position] = []
    for place, name in enumerate(graph):
        data = graph.nodes[name]
        alive = {v for v in (*alive, name) if last_read[v] > place}
        if data["op"] != "output" and alive:
            found.append(_position(graph, data["label"], alive))
    return tuple(found)


def _position(graph: nx.DiGraph[str], label: str, alive: set[str]) -> Position:
    bits: dict[str, float] = {}
    float_bits: dict[str, float] = {}
    for name in alive:
        data = graph.nodes[name]
        origin = _origin(graph, name)
        bits[origin] = max(bits.get(origin, 0.0), data["bits"])
        float_bits[origin] = max(float_bits.get(origin, 0.0), data["float_bits"])
    return Position(label, sum(bits.values()), sum(float_bits.values()), len(alive))


def _origin(graph: nx.DiGraph[str], name: str) -> str:
    """The value that a quantizer copies; any other value is its own."""
    if not graph.nodes[name]["quantized"]:
        return name
    return next(iter(graph.predecessors(name)), name)
