"""What an operation costs, and what that means for each edge that it reads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from gdnsq_fx.analysis.capacity import FLOAT_BITS
from gdnsq_fx.annotations import facts
from gdnsq_fx.nested import graphs_of
from gdnsq_fx.sites import quantizer_behind, weight_sites

# The edges of two factors, None in floating point.
Factors = tuple[str | None, str | None]


@dataclass(frozen=True)
class EdgeCost:
    """Cost of one edge per sample; as in `EdgeFacts`."""

    macs: int = 0
    bops: int = 0
    parameters: int = 0


def edge_costs(
    graph_module: GraphModule, bits_of: Mapping[str, int]
) -> dict[str, EdgeCost]:
    """MACs and bit operations of the readers of each edge, and its weight elements.

    Args:
        graph_module: a prepared one, with MACs on its nodes.
        bits_of: hard bit-width of each edge, by name.

    Returns:
        By name; an edge that no counted operation reads is left out. An operation
        counts at each edge that it reads, so costs of edges do not add up to a total.
    """
    elements = {s.edge: s.weight().numel() for s in weight_sites(graph_module)}
    found = {name: EdgeCost(parameters=count) for name, count in elements.items()}
    for owner, node in operations(graph_module):
        macs = facts(node).macs
        bops = bit_operations(owner, node, bits_of)
        read = {quantizer_behind(owner, value) for value in multiplied(node)}
        for quantizer in read - {None}:
            assert quantizer is not None
            known = found.get(quantizer.edge, EdgeCost())
            found[quantizer.edge] = EdgeCost(
                known.macs + macs, known.bops + bops, known.parameters
            )
    return found


def operations(graph_module: GraphModule) -> Iterator[tuple[GraphModule, Node]]:
    """The nodes that cost MACs, each with the graph module whose graph holds it."""
    for owner in graphs_of(graph_module):
        for node in owner.graph.nodes:
            if facts(node).macs:
                yield owner, node


def bit_operations(
    graph_module: GraphModule, node: Node, bits_of: Mapping[str, int]
) -> int:
    """MACs * weight bits * activation bits of one operation, per sample.

    Edges that ``bits_of`` does not name count as floating point.
    """
    return sum(
        macs * math.prod(_bits(edge, bits_of) for edge in factors)
        for factors, macs in factored_macs(graph_module, node)
    )


def _bits(edge: str | None, bits_of: Mapping[str, int]) -> int:
    return FLOAT_BITS if edge is None else bits_of.get(edge, FLOAT_BITS)


def factored_macs(graph_module: GraphModule, node: Node) -> list[tuple[Factors, int]]:
    """The MACs of one operation by the pairs of edges that they multiply.

    MACs inside a fused call multiply its last operand (the values of attention, the
    recurrent weight of an LSTM) by something in floating point.
    """
    found = facts(node)
    behind = [quantizer_behind(graph_module, value) for value in multiplied(node)]
    names = [None if quantizer is None else quantizer.edge for quantizer in behind]
    first, second, *_ = (*names, None, None)
    last = names[-1] if names else None
    pairs: list[tuple[Factors, int]] = [
        ((first, second), found.macs - found.inner_macs)
    ]
    if found.inner_macs:
        pairs.append(((last, None), found.inner_macs))
    return pairs


def multiplied(node: Node) -> list[object]:
    """What an operation multiplies: its activations and weights, where known."""
    op = facts(node).op
    if op is None or not op.is_compute:
        return [None, None]
    operands = op.operands(op.bind(node))
    return [o.value for o in operands if o.role in ("activation", "weight")]
