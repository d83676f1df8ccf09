"""InsertQuantizers: one quantizer node on each chosen edge.

    %conv1 = conv2d(%x, %conv1_weight, ...)
      ->
    %conv1_input_q  = call_module[quantizers.conv1_input](%x)
    %conv1_weight_q = call_module[quantizers.conv1_weight](%conv1_weight)
    %conv1 = conv2d(%conv1_input_q, %conv1_weight_q, ...)

A tensor read by several quantized layers gets one quantizer, and so does a weight used
twice, be it through views such as ``weight.t()`` or ``weight.chunk(3)``. Where their
settings differ, those with the larger bit-width hold (no layer loses what it was
promised). What the scope ``full`` adds stands in `QuantConfig`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from gdnsq_fx.annotations import annotate, compute_nodes, described, facts
from gdnsq_fx.errors import NothingToQuantizeError, PassError
from gdnsq_fx.inputs import model_device
from gdnsq_fx.nested import alike, graphs_of, nested_graphs, path_of
from gdnsq_fx.quantize.quantizer import Quantizer
from gdnsq_fx.spec import QuantConfig
from gdnsq_fx.stored import weight_values

from ._base import Pass, rewrite_each
from ._grids import activation_grids, weight_grids
from ._inserter import Inserter
from ._signs import nonnegative_values
from ._skips import EXCLUDED, check_skips, operation_name, skipped_nodes
from ._slots import GRIDDED, Slot, compute_slots, op_of, value_slots, wrong_dtype
from ._weights import view_chain


@dataclass(frozen=True, eq=False)
class InsertQuantizers(Pass):
    """Insert quantizers as the configuration says.

    Attributes:
        config: bits, estimators, scope, include / exclude and overrides.
    """

    config: QuantConfig = field(default_factory=QuantConfig)

    def requires(self, graph_module: GraphModule) -> None:
        """Operations must be annotated and their weights exposed."""
        self.require_annotations(graph_module)
        for node in _compute_nodes(graph_module):
            if node.op == "call_module" and facts(node).skip is None:
                raise PassError(
                    f"{self.name} quantizes explicit weights, and {described(node)} is "
                    "still a module; run ExposeWeights first"
                )
        if self.config.scope == "full" and not _has_shapes(graph_module):
            raise PassError(
                f"{self.name} with scope='full' needs to know which values are "
                "tensors; run PropagateShapes first"
            )

    def ensures(self, graph_module: GraphModule) -> None:
        """At least one quantizer stands in the graph."""
        if not any(isinstance(m, Quantizer) for m in graph_module.modules()):
            raise PassError(f"{self.name} inserted no quantizer")

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Insert what is missing; False where every edge has its quantizer already."""
        chosen, boundary = self._chosen(graph_module)
        taken = {m.edge for m in graph_module.modules() if isinstance(m, Quantizer)}
        device = model_device(graph_module) or torch.device("cpu")

        def insert(one: GraphModule) -> bool:
            weights = weight_values(one)
            nonnegative = nonnegative_values(one)
            inserter = Inserter(one, nonnegative, weights, taken, device)
            return self._insert(inserter, chosen, boundary)

        return rewrite_each(graph_module, insert)

    def _insert(
        self, inserter: Inserter, chosen: set[Node], boundary: set[Node]
    ) -> bool:
        """Insert the quantizers of one graph."""
        graph_module, weights = inserter.owner, inserter.weights
        nodes = [n for n in graph_module.graph.nodes if n in chosen]
        slots = [s for n in nodes for s in self._slots(n, weights, boundary)]
        full = self.config.scope == "full"
        data = [s for s in slots if not _is_weight(s, weights)]
        grids = [
            *weight_grids(
                graph_module, [s for s in slots if _is_weight(s, weights)], weights
            ),
            *activation_grids(graph_module, data, weights, full=full),
        ]
        for grid in grids:
            inserter.insert(grid)
        inserter.erase_unread()
        return bool(grids)

    def _chosen(self, graph_module: GraphModule) -> tuple[set[Node], set[Node]]:
        """What is to be quantized, and its first and last; the rest gets a reason."""
        every = _compute_nodes(graph_module)
        nodes = [n for n in every if n.op != "call_module"]
        skipped = skipped_nodes(graph_module)
        self._check_model(graph_module, nodes)
        values = self._value_nodes(graph_module)
        known = dict.fromkeys([*every, *skipped, *values])
        self.config.check_patterns(
            [(facts(n).layer, operation_name(graph_module, n)) for n in known]
        )
        boundary = _boundary(graph_module)
        chosen = self._selected(nodes, boundary)
        self._excuse(graph_module, skipped)
        if self.config.strict:
            check_skips(graph_module)
        return {*chosen, *filter(self._selects, values)}, boundary

    def _slots(
        self, node: Node, weights: set[Node], boundary: set[Node]
    ) -> Iterable[Slot]:
        config = self.config.for_layer(
            facts(node).layer, op_of(node).name, boundary=node in boundary
        )
        if op_of(node).is_compute:
            return compute_slots(node, config)
        return value_slots(node, config, weights)

    def _check_model(self, graph_module: GraphModule, nodes: list[Node]) -> None:
        if not nodes:
            raise NothingToQuantizeError(
                "the model has no operation that can be quantized (convolution, "
                f"linear, matrix product).{_reasons(graph_module)} Prepare a "
                "sub-module that has one"
            )

    def _value_nodes(self, graph_module: GraphModule) -> list[Node]:
        """Operations that only the scope ``full`` quantizes."""
        if self.config.scope != "full":
            return []
        nodes = [n for one in graphs_of(graph_module) for n in one.graph.nodes]
        ops = [(n, facts(n).op) for n in nodes]
        return [n for n, op in ops if op is not None and op.kind in GRIDDED]

    def _selects(self, node: Node) -> bool:
        return self.config.selects(facts(node).layer, op_of(node).name)

    def _selected(self, nodes: list[Node], boundary: set[Node]) -> list[Node]:
        """Nodes to quantize; the others get their reason."""
        chosen: list[Node] = []
        for node in nodes:
            asked = self._asked_to_skip(node, boundary)
            reason = asked or _cannot(node)
            annotate(node, skip=reason, asked=asked is not None)
            if reason is None:
                chosen.append(node)
        if not chosen:
            raise NothingToQuantizeError(
                "every layer was left out: "
                + "; ".join(f"{described(n)}: {facts(n).skip}" for n in nodes[:5])
            )
        return chosen

    def _asked_to_skip(self, node: Node, boundary: set[Node]) -> str | None:
        if not self._selects(node):
            return EXCLUDED
        if self.config.first_last == "exclude" and node in boundary:
            return "first convolution or last linear layer (first_last='exclude')"
        return None

    def _excuse(self, graph_module: GraphModule, skipped: list[Node]) -> None:
        """What cannot be quantized anyway may have been excluded by name, too."""
        for node in skipped:
            layer, operation = facts(node).layer, operation_name(graph_module, node)
            if not self.config.selects(layer, operation):
                annotate(node, skip=EXCLUDED, asked=True)


def _is_weight(slot: Slot, weights: set[Node]) -> bool:
    """Tensors side by side share a grid, be they stored or not."""
    return op_of(slot.node).kind != "concat" and bool(
        view_chain(slot.producer, weights)
    )


def _cannot(node: Node) -> str | None:
    """Why an operation cannot be quantized, None where it can."""
    op = op_of(node)
    refused = None if op.refusal is None else op.refusal(op.bind(node))
    return refused or wrong_dtype(node)


def _has_shapes(graph_module: GraphModule) -> bool:
    return any(facts(n).shape is not None for n in graph_module.graph.nodes)


def _compute_nodes(graph_module: GraphModule) -> list[Node]:
    return [n for one in graphs_of(graph_module) for n in compute_nodes(one)]


def _boundary(graph_module: GraphModule) -> set[Node]:
    """The first convolution and the last linear layer of the model.

    One of several alike, as an expert is, is neither.
    """
    inside = [g for g in nested_graphs(graph_module) if not alike(graph_module, g)]
    nodes: list[Node] = []
    for node in graph_module.graph.nodes:
        op, path = facts(node).op, f"{node.target}."
        if node.op == "call_module":
            under = [g for g in inside if path_of(g).startswith(path)]
            nodes += [n for g in under for n in compute_nodes(g)]
        elif op is not None and op.is_compute:
            nodes.append(node)
    nodes = [n for n in nodes if n.op != "call_module"]
    first = [n for n in nodes if op_of(n).boundary == "first"][:1]
    last = [n for n in nodes if op_of(n).boundary == "last"][-1:]
    return {*first, *last}


def _reasons(graph_module: GraphModule) -> str:
    found = [
        f" {described(n)}: {facts(n).skip}."
        for one in graphs_of(graph_module)
        for n in one.graph.nodes
        if facts(n).skip
    ]
    return "".join(found[:5])
