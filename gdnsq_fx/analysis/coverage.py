"""How much of a model is quantized, what it weighs and what it costs to run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.utils.parametrize import ParametrizationList

from gdnsq_fx.analysis.capacity import FLOAT_BITS
from gdnsq_fx.annotations import facts, source_of
from gdnsq_fx.quantize.quantizer import Quantizer, WeightQuantizer
from gdnsq_fx.sites import bit_width, weight_sites
from gdnsq_fx.state import in_evaluation


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
        macs: share of multiply-accumulates whose tensors are all quantized, 0..1.
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
    nodes = list(graph_module.graph.nodes)
    macs = sum(facts(n).macs for n in nodes)
    done = sum(facts(n).macs for n in nodes if _is_quantized(graph_module, n))
    covered = sum(w.numel() for w, _ in _quantized_weights(graph_module))
    weights = sum(w.numel() for w in _stored(graph_module) if w.ndim >= 2)
    skipped = tuple(
        Skip(facts(n).layer or n.name, str(facts(n).skip), source_of(n))
        for n in graph_module.graph.nodes
        if facts(n).skip
    )
    return Coverage(
        done / macs if macs else 0.0, covered / weights if weights else 0.0, skipped
    )


def totals_of(graph_module: GraphModule) -> Totals:
    """Size in bytes and bit operations of the graph, at the bit-widths it has now."""
    every = sum(w.numel() for w in _stored(graph_module))
    quantized = _quantized_weights(graph_module)
    packed = sum(_packed_bytes(w, q) for w, q in quantized)
    floats = every - sum(w.numel() for w, _ in quantized)
    macs, bops = 0, 0
    for node in graph_module.graph.nodes:
        macs += facts(node).macs
        bops += facts(node).macs * math.prod(_argument_bits(node))
    return Totals(
        size_bytes=packed + 4 * floats,
        float_size_bytes=4 * every,
        macs=macs,
        bops=bops,
        float_bops=macs * FLOAT_BITS**2,
    )


def _stored(graph_module: GraphModule) -> list[Tensor]:
    """Tensors that the deployed model stores, each once: parameters of the model.

    Instead of the parameters behind a parametrization stands the tensor it makes.
    """
    left_out: set[int] = set()
    made: list[Tensor] = []
    for module in graph_module.modules():
        if isinstance(module, ParametrizationList):
            with torch.no_grad(), in_evaluation(module):
                made.append(module())
        if isinstance(module, ParametrizationList | Quantizer):
            left_out |= {id(p) for p in module.parameters()}
    plain: dict[int, Tensor] = {
        id(p): p for p in graph_module.parameters() if id(p) not in left_out
    }
    for site in weight_sites(graph_module):  # a buffer or a constant may be one, too
        source = site.node.args[0]
        if isinstance(source, Node) and source.op == "get_attr":
            weight = site.weight()
            plain.setdefault(id(weight), weight)
    return [*plain.values(), *made]


def _quantized_weights(
    graph_module: GraphModule,
) -> list[tuple[Tensor, WeightQuantizer]]:
    return [(s.weight().detach(), s.quantizer) for s in weight_sites(graph_module)]


def _packed_bytes(weight: Tensor, quantizer: WeightQuantizer) -> int:
    levels = quantizer.levels(weight)
    codes = weight.numel() * bit_width(int(levels.max()))
    return math.ceil(codes / 8) + 8 * levels.numel()


def _quantizer_of(owner: GraphModule, value: object) -> Quantizer | None:
    if not isinstance(value, Node) or value.op != "call_module":
        return None
    module = owner.get_submodule(str(value.target))
    return module if isinstance(module, Quantizer) else None


def _operands(node: Node) -> list[object]:
    """What an operation multiplies: its activations and weights, where known."""
    op = facts(node).op
    if op is None:
        return [None, None]
    bound = op.bind(node)
    return [bound.get(name) for name, role in op.roles.items() if role != "bias"]


def _is_quantized(owner: GraphModule, node: Node) -> bool:
    return all(_quantizer_of(owner, value) is not None for value in _operands(node))


def _argument_bits(node: Node) -> list[int]:
    """Bit-widths of the two operands; floating point counts as 32."""
    bits: list[int] = []
    for value in _operands(node):
        edge = facts(value).edge if isinstance(value, Node) else None
        bits.append(edge.bits if edge is not None else FLOAT_BITS)
    return bits
