"""InsertQuantizers: one quantizer node on each chosen edge.

    %conv1 = conv2d(%x, %conv1_weight, ...)
      ->
    %conv1_input_q  = call_module[quantizers.conv1_input](%x)
    %conv1_weight_q = call_module[quantizers.conv1_weight](%conv1_weight)
    %conv1 = conv2d(%conv1_input_q, %conv1_weight_q, ...)

A tensor read by several quantized layers gets one quantizer, and so does a weight used
twice. Where their settings differ, those with the larger bit-width hold (no layer loses
what it was promised).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.fx import GraphModule, Node

from gdnsq_fx.annotations import annotate, compute_nodes, described, facts, shape_facts
from gdnsq_fx.errors import NothingToQuantizeError, PassError
from gdnsq_fx.opinfo import PER_TENSOR, ChannelLayout, OpInfo, writes_in_place
from gdnsq_fx.quantize.quantizer import ActivationQuantizer, Quantizer, WeightQuantizer
from gdnsq_fx.sites import stored_value
from gdnsq_fx.spec import QuantConfig, QuantSpec

from ._base import Pass
from ._signs import nonnegative_values, storage_root

CONTAINER = "quantizers"
EXCLUDED = "excluded by the configuration"


@dataclass(frozen=True)
class _Edge:
    """A place for a quantizer: the consumers that read one producer."""

    name: str
    producer: Node
    spec: QuantSpec
    layout: ChannelLayout | None  # None for an activation
    readers: tuple[tuple[Node, str], ...]


@dataclass(frozen=True, eq=False)
class InsertQuantizers(Pass):
    """Insert quantizers as the configuration says.

    Attributes:
        config: bits, estimators, include / exclude and overrides.
    """

    config: QuantConfig = field(default_factory=QuantConfig)

    def requires(self, graph_module: GraphModule) -> None:
        """Operations must be annotated and their weights exposed."""
        self.require_annotations(graph_module)
        for node in compute_nodes(graph_module):
            if node.op == "call_module" and facts(node).skip is None:
                raise PassError(
                    f"{self.name} quantizes explicit weights, and {described(node)} is "
                    "still a module; run ExposeWeights first"
                )

    def ensures(self, graph_module: GraphModule) -> None:
        """At least one quantizer stands in the graph."""
        if not any(isinstance(m, Quantizer) for m in graph_module.modules()):
            raise PassError(f"{self.name} inserted no quantizer")

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Insert what is missing; False where every edge has its quantizer already."""
        every = compute_nodes(graph_module)
        nodes = [n for n in every if n.op != "call_module"]
        self._check_model(graph_module, nodes)
        self.config.check_patterns([(facts(n).layer, _op(n).name) for n in every])
        boundary = _boundary(nodes)
        edges = [
            edge
            for node in self._selected(nodes, boundary)
            for edge in _edges(node, self._for(node, boundary))
        ]
        merged = _merge(graph_module, edges)
        nonnegative = nonnegative_values(graph_module)
        for edge in merged:
            _insert(graph_module, edge, edge.producer in nonnegative)
        return bool(merged)

    def _check_model(self, graph_module: GraphModule, nodes: list[Node]) -> None:
        if not nodes:
            raise NothingToQuantizeError(
                "the model has no operation that can be quantized (convolution, "
                f"linear, matrix product).{_reasons(graph_module)} Prepare a "
                "sub-module that has one"
            )

    def _for(self, node: Node, boundary: set[Node]) -> QuantConfig:
        return self.config.for_layer(
            facts(node).layer, _op(node).name, boundary=node in boundary
        )

    def _selected(self, nodes: list[Node], boundary: set[Node]) -> list[Node]:
        """Nodes to quantize; the others get their reason."""
        chosen: list[Node] = []
        for node in nodes:
            reason = self._reason_to_skip(node, boundary)
            annotate(node, skip=reason)
            if reason is None:
                chosen.append(node)
        if not chosen:
            raise NothingToQuantizeError(
                "every layer was left out: "
                + "; ".join(f"{described(n)}: {facts(n).skip}" for n in nodes[:5])
            )
        return chosen

    def _reason_to_skip(self, node: Node, boundary: set[Node]) -> str | None:
        if not self.config.selects(facts(node).layer, _op(node).name):
            return EXCLUDED
        if self.config.first_last == "exclude" and node in boundary:
            return "first convolution or last linear layer (first_last='exclude')"
        return None


def _op(node: Node) -> OpInfo:
    op = facts(node).op
    assert op is not None
    return op


def _boundary(nodes: list[Node]) -> set[Node]:
    """The first convolution and the last linear layer of the model."""
    first = [n for n in nodes if _op(n).boundary == "first"][:1]
    last = [n for n in nodes if _op(n).boundary == "last"][-1:]
    return {*first, *last}


def _edges(node: Node, config: QuantConfig) -> Iterable[_Edge]:
    """The edges of one compute node that need a quantizer."""
    op = _op(node)
    bound = op.bind(node)
    for argument, role in op.roles.items():
        producer = bound.get(argument)
        if role == "bias" or not isinstance(producer, Node):
            continue
        name = f"{facts(node).layer}.{argument}"
        reader = ((node, argument),)
        if not _holds_parameter(producer):
            yield _Edge(name, producer, config.act_spec(), None, reader)
            continue
        per_channel = config.per_channel and role == "weight" and op.layout is not None
        layout = op.layout(bound) if per_channel and op.layout else PER_TENSOR
        yield _Edge(name, producer, config.weight_spec(), layout, reader)


def _holds_parameter(producer: Node) -> bool:
    """A stored tensor, or the output of its parametrization."""
    return producer.op == "get_attr" or (
        producer.op == "call_module"
        and "parametrizations" in str(producer.target).split(".")
    )


def _merge(owner: GraphModule, edges: list[_Edge]) -> list[_Edge]:
    """One edge for each producer; edges that end in a quantizer are done already."""
    by_value: dict[tuple[Node, int], list[_Edge]] = {}
    for edge in edges:
        if not _is_quantizer(owner, edge.producer):
            by_value.setdefault((edge.producer, _writes_before(edge)), []).append(edge)
    merged: list[_Edge] = []
    for (producer, _), same in by_value.items():
        layouts = {e.layout for e in same}
        merged.append(
            _Edge(
                same[0].name,
                producer,
                max((e.spec for e in same), key=lambda spec: spec.bits),
                same[0].layout if len(layouts) == 1 else PER_TENSOR,
                tuple(reader for e in same for reader in e.readers),
            )
        )
    return merged


def _writes_before(edge: _Edge) -> int:
    """In-place writes that the first reader sees: after each it is another value."""
    reader = edge.readers[0][0]
    root = storage_root(edge.producer)
    return sum(
        write < reader and storage_root(write.all_input_nodes[0]) is root
        for write in edge.producer.graph.nodes
        if write.all_input_nodes and writes_in_place(write)
    )


def _is_quantizer(owner: GraphModule, node: Node) -> bool:
    return node.op == "call_module" and isinstance(
        owner.get_submodule(str(node.target)), Quantizer
    )


def _insert(owner: GraphModule, edge: _Edge, nonnegative: bool) -> None:
    container = _container(owner)
    key = edge.name.replace(".", "_").replace("#", "_")
    while key in container:
        key += "_"
    container[key] = _make(owner, edge, nonnegative)
    # Right before its first reader: an in-place operation may stand in between.
    first = min(reader for reader, _ in edge.readers)
    with owner.graph.inserting_before(first):
        node = owner.graph.create_node(
            "call_module", f"{CONTAINER}.{key}", (edge.producer,), {}, f"{key}_q"
        )
    node.meta["nn_module_stack"] = edge.producer.meta.get("nn_module_stack", {})
    annotate(node, **shape_facts(edge.producer), layer=edge.name)
    for reader, argument in edge.readers:
        _op(reader).with_argument(reader, argument, node)


def _container(owner: GraphModule) -> nn.ModuleDict:
    if not hasattr(owner, CONTAINER):
        owner.add_module(CONTAINER, nn.ModuleDict())
    container = getattr(owner, CONTAINER)
    if not isinstance(container, nn.ModuleDict):
        raise PassError(
            f"the model has an attribute named {CONTAINER!r}, which this library needs "
            "for its quantizers; rename it"
        )
    return container


def _make(owner: GraphModule, edge: _Edge, nonnegative: bool) -> Quantizer:
    if edge.layout is None:
        made = ActivationQuantizer(edge.name, edge.spec, nonnegative=nonnegative)
        made.to(_device(owner))
    else:
        weight = stored_value(owner, edge.producer).detach()
        made = WeightQuantizer(edge.name, edge.spec, edge.layout, weight)
    made.train(owner.training)
    return made


def _device(owner: GraphModule) -> torch.device:
    for tensor in (*owner.parameters(), *owner.buffers()):
        return tensor.device
    return torch.device("cpu")


def _reasons(graph_module: GraphModule) -> str:
    found = [
        f" {described(n)}: {facts(n).skip}."
        for n in graph_module.graph.nodes
        if facts(n).skip
    ]
    return "".join(found[:5])
