"""How much of a model is quantized, what it weighs and what it costs to run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.utils.parametrize import ParametrizationList

from gdnsq_fx.analysis.capacity import FLOAT_BITS
from gdnsq_fx.analysis.costs import bit_operations, multiplied, operations
from gdnsq_fx.annotations import facts, source_of
from gdnsq_fx.nested import graphs_of, path_of
from gdnsq_fx.quantize.quantizer import Quantizer
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer
from gdnsq_fx.sites import bit_width, quantizer_behind, sites, weight_sites
from gdnsq_fx.state import in_evaluation
from gdnsq_fx.stored import ancestors, attribute


@dataclass(frozen=True)
class Skip:
    """A node that was left in floating point, and why."""

    name: str
    reason: str
    source: str


@dataclass(frozen=True)
class Coverage:
    """Share of the model that is quantized.

    Attributes:
        macs: share of multiply-accumulates whose tensors are all quantized, 0..1. What
            a fused call keeps to itself (the hidden state of an LSTM) is not.
        weights: share of the elements of matrices and kernels, 0..1.
        skipped: what was left out, with reasons.
    """

    macs: float
    weights: float
    skipped: tuple[Skip, ...]


@dataclass(frozen=True)
class Totals:
    """Size and cost of the whole model.

    Attributes:
        size_bytes: all parameters, quantized weights at their bit-width and one step
            and offset (8 bytes) for each scale group.
        float_size_bytes: all parameters in 32 bits.
        macs: multiply-accumulates per sample.
        bops: bit operations per sample, sum of MACs * weight bits * activation bits.
        float_bops: the same at 32 bits.
    """

    size_bytes: int
    float_size_bytes: int
    macs: int
    bops: int
    float_bops: int


def coverage_of(graph_module: GraphModule) -> Coverage:
    """Shares of MACs and weights that are quantized, and the reasons for the rest."""
    nodes = _nodes(graph_module)
    macs = sum(facts(n).macs for n in nodes)
    quantized = [
        n
        for one in graphs_of(graph_module)
        for n in one.graph.nodes
        if _is_quantized(one, n)
    ]
    done = sum(facts(n).macs - facts(n).inner_macs for n in quantized)
    covered = sum(w.numel() for w, _ in _quantized_weights(graph_module))
    weights = sum(w.numel() for w in _stored(graph_module) if w.ndim >= 2)
    skipped = [(n, str(facts(n).skip)) for n in nodes if facts(n).skip]
    skipped += [(n, _inner_reason(n)) for n in quantized if facts(n).inner_macs]
    return Coverage(
        done / macs if macs else 0.0,
        covered / weights if weights else 0.0,
        tuple(Skip(facts(n).layer or n.name, why, source_of(n)) for n, why in skipped),
    )


def totals_of(graph_module: GraphModule) -> Totals:
    """Size in bytes and bit operations of the graph, at the bit-widths it has now."""
    every = sum(w.numel() for w in _stored(graph_module))
    quantized = _quantized_weights(graph_module)
    packed = sum(_packed_bytes(w, q) for w, q in quantized)
    floats = every - sum(w.numel() for w, _ in quantized)
    measured = [(s.quantizer, facts(s.node).edge) for s in sites(graph_module)]
    bits_of = {q.edge: edge.bits for q, edge in measured if edge is not None}
    macs, bops = 0, 0
    for owner, node in operations(graph_module):
        macs += facts(node).macs
        bops += bit_operations(owner, node, bits_of)
    return Totals(
        size_bytes=packed + 4 * floats,
        float_size_bytes=4 * every,
        macs=macs,
        bops=bops,
        float_bops=macs * FLOAT_BITS**2,
    )


def _nodes(graph_module: GraphModule) -> list[Node]:
    return [n for one in graphs_of(graph_module) for n in one.graph.nodes]


def _inner_reason(node: Node) -> str:
    """What of a quantized operation stays in floating point."""
    found = facts(node)
    assert found.op is not None
    share = 100 * found.inner_macs / found.macs
    return (
        f"in floating point inside the fused call: {found.op.inner} ({share:.0f}% of "
        f"the MACs of this {found.op.name})"
    )


def _stored(graph_module: GraphModule) -> list[Tensor]:
    """Tensors that the deployed model stores, each once.

    Instead of what a quantized weight was computed from stands the weight; instead of
    the parameters behind any other parametrization, the tensor it makes.
    """
    quantized = weight_sites(graph_module)
    read: set[int] = set()
    live: set[int] = set()
    for one in graphs_of(graph_module):
        replaced = _replaced_nodes(one, [s.node for s in quantized if s.owner is one])
        read |= {id(p) for n in replaced for p in _tensors_of(one, n)}
        nodes = [n for n in one.graph.nodes if n not in replaced]
        kept = [n for n in nodes if n.op in ("get_attr", "call_module")]
        live |= {id(p) for n in kept for p in _tensors_of(one, n)}
    read -= live
    made: list[Tensor] = [site.weight().detach() for site in quantized]
    for module in graph_module.modules():
        if isinstance(module, Quantizer):
            read |= {id(p) for p in module.parameters()}
        if isinstance(module, ParametrizationList):
            behind = {id(p) for p in module.parameters()}
            if behind and not behind <= read:
                with torch.no_grad(), in_evaluation(module):
                    made.append(module())
            read |= behind
    return [*(p for p in graph_module.parameters() if id(p) not in read), *made]


def _replaced_nodes(graph_module: GraphModule, quantizers: list[Node]) -> set[Node]:
    """What nothing but the given quantizers reads, directly or not."""
    behind = ancestors(quantizers) - set(quantizers)
    found: set[Node] = set(quantizers)
    for node in reversed(list(graph_module.graph.nodes)):
        if node in behind and found.issuperset(node.users):
            found.add(node)
    return found - set(quantizers)


def _tensors_of(graph_module: GraphModule, node: Node) -> list[Tensor]:
    """Stored tensors that one node reads."""
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        graphs = [m for m in module.modules() if isinstance(m, GraphModule)]
        inside = {id(p) for g in graphs if path_of(g) for p in g.parameters()}
        return [p for p in module.parameters() if id(p) not in inside]
    value = attribute(graph_module, str(node.target)) if node.op == "get_attr" else None
    return [value] if isinstance(value, Tensor) else []


def _quantized_weights(
    graph_module: GraphModule,
) -> list[tuple[Tensor, WeightQuantizer]]:
    return [(s.weight().detach(), s.quantizer) for s in weight_sites(graph_module)]


def _packed_bytes(weight: Tensor, quantizer: WeightQuantizer) -> int:
    levels = quantizer.levels(weight)
    codes = weight.numel() * bit_width(int(levels.max()))
    return math.ceil(codes / 8) + 8 * levels.numel()


def _is_quantized(owner: GraphModule, node: Node) -> bool:
    operands = multiplied(node)
    return all(quantizer_behind(owner, value) is not None for value in operands)
