"""What an operation costs, and what that means for each edge that it reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from gdnsq_fx.analysis.capacity import FLOAT_BITS
from gdnsq_fx.annotations import facts
from gdnsq_fx.sites import quantizer_behind, weight_sites


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
    for node in graph_module.graph.nodes:
        macs = facts(node).macs
        if not macs:
            continue
        bops = bit_operations(graph_module, node, bits_of)
        read = {quantizer_behind(graph_module, value) for value in multiplied(node)}
        for quantizer in read - {None}:
            assert quantizer is not None
            known = found.get(quantizer.edge, EdgeCost())
            found[quantizer.edge] = EdgeCost(
                known.macs + macs, known.bops + bops, known.parameters
            )
    return found


def bit_operations(
    graph_module: GraphModule, node: Node, bits_of: Mapping[str, int]
) -> int:
    """MACs * weight bits * activation bits of one operation, per sample.

    MACs inside a fused call have an operand in floating point.
    """
    found = facts(node)
    bits = _operand_bits(graph_module, node, bits_of)
    bops = (found.macs - found.inner_macs) * math.prod(bits)
    return bops + found.inner_macs * FLOAT_BITS * max(bits)


def multiplied(node: Node) -> list[object]:
    """What an operation multiplies: its activations and weights, where known."""
    op = facts(node).op
    if op is None or not op.is_compute:
        return [None, None]
    operands = op.operands(op.bind(node))
    return [o.value for o in operands if o.role in ("activation", "weight")]


def _operand_bits(
    owner: GraphModule, node: Node, bits_of: Mapping[str, int]
) -> list[int]:
    """Bit-widths of the two widest operands; floating point counts as 32."""
    bits: list[int] = []
    for value in multiplied(node):
        quantizer = quantizer_behind(owner, value)
        edge = None if quantizer is None else quantizer.edge
        bits.append(FLOAT_BITS if edge is None else bits_of.get(edge, FLOAT_BITS))
    return sorted(bits)[-2:]
