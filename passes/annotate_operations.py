"""AnnotateOperations: each call node gets its row of the op table and a layer name.

    %conv1 = call_module[conv1](%x)    ->    meta: op=conv2d, layer="conv1"

What holds weights and has no row gets the reason why it is skipped.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule, Node

from gdnsq_fx.annotations import annotate, facts
from gdnsq_fx.nested import joined, path_of
from gdnsq_fx.opinfo import OpInfo, OpTable
from gdnsq_fx.optable import DEFAULT_TABLE
from gdnsq_fx.quantize.frozen import FrozenActivation, FrozenWeight
from gdnsq_fx.quantize.quantizer import Quantizer
from gdnsq_fx.stored import weight_values

from ._base import Pass, rewrite_each
from ._weights import viewed


@dataclass(frozen=True, eq=False)
class AnnotateOperations(Pass):
    """Write ``op``, ``layer`` and, where nothing is known, the reason for a skip.

    Attributes:
        table: the op table to ask.
    """

    table: OpTable = DEFAULT_TABLE

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Facts only: the graph stays as it is."""
        return rewrite_each(graph_module, self._annotate)

    def _annotate(self, graph_module: GraphModule) -> bool:
        weights = weight_values(graph_module)
        for node in graph_module.graph.nodes:
            if not node.op.startswith("call_"):
                annotate(node)  # marks the graph as annotated
                continue
            op = self.table.find(node, graph_module)
            prefix = path_of(graph_module)
            layer = facts(node).layer or _layer_name(node, op, weights, prefix)
            annotate(node, op=op, layer=layer, skip=_unknown(node, op, graph_module))
        _number_repeated_layers(graph_module)
        return False


def _layer_name(node: Node, op: OpInfo | None, weights: set[Node], prefix: str) -> str:
    """Module path where there is one; else that of the weight; else the node name.

    All of them as in the whole model, in which the graph stands at ``prefix``.
    """
    if node.op == "call_module":
        return joined(prefix, str(node.target))
    if op is not None and op.is_compute:
        for operand in op.operands(op.bind(node)):
            owner = _owner_of(operand.value, weights)
            # A nested graph may be a layer itself, and hold its weight.
            if owner is not None and (owner or prefix):
                return joined(prefix, owner)
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return joined(joined(prefix, path), node.name)


def _owner_of(value: object, weights: set[Node]) -> str | None:
    """Path of the module that holds a weight, through whatever is computed from it."""
    while isinstance(value, Node) and value.all_input_nodes:
        is_view = viewed(value) is not None or _is_quantizer_call(value)
        if value not in weights and not is_view:
            return None
        value = value.all_input_nodes[0]
    if not isinstance(value, Node) or value not in weights:
        return None
    path, found, _ = f".{value.target}".partition(".parametrizations.")
    return (path if found else path.rpartition(".")[0]).removeprefix(".")


def _is_quantizer_call(node: Node) -> bool:
    owner = node.graph.owning_module
    if node.op != "call_module" or owner is None:
        return False
    return isinstance(owner.get_submodule(str(node.target)), Quantizer)


def _number_repeated_layers(graph_module: GraphModule) -> None:
    """A module called twice is two nodes: ``conv`` and ``conv#2``."""
    seen: Counter[str] = Counter()
    for node in graph_module.graph.nodes:
        found = facts(node)
        if found.op is None or not found.op.is_compute:
            continue
        base = found.layer.partition("#")[0]
        seen[base] += 1
        if seen[base] > 1:
            annotate(node, layer=f"{base}#{seen[base]}")


def _unknown(node: Node, op: OpInfo | None, owner: GraphModule) -> str | None:
    """Why a node that holds weights is not quantized, None where it may be."""
    if node.op != "call_module" or (op is not None and op.is_compute):
        return facts(node).skip
    module = owner.get_submodule(str(node.target))
    ours = isinstance(module, Quantizer | FrozenActivation | FrozenWeight)
    if ours or not node.all_input_nodes:
        return None
    if not _has_weights(module):
        return facts(node).skip if op is None else None
    if op is not None:
        return f"{op.name} is not quantized"
    # Capture may have left a better reason.
    return facts(node).skip or f"{type(module).__name__} is not in the op table"


def _has_weights(module: nn.Module) -> bool:
    """Matrices or kernels, not the vectors of a normalization."""
    return any(p.ndim >= 2 for p in module.parameters())
