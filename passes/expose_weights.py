"""ExposeWeights: layers with weights become function calls on explicit weight edges.

    %y = call_module[conv1](%x)
      ->
    %conv1_weight = get_attr[conv1.weight]
    %conv1 = call_function[conv2d](%x, %conv1_weight, %conv1_bias, **settings)

The modules stay in the tree, so parameters keep their names; a parameter used twice is
one ``get_attr`` node. A parametrized weight is the call of its parametrization.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.utils.parametrize import is_parametrized

from gdnsq_fx.annotations import annotate, facts
from gdnsq_fx.opinfo import OpInfo, OpTable
from gdnsq_fx.optable import DEFAULT_TABLE

from ._base import Pass, has_hooks


@dataclass(frozen=True, eq=False)
class ExposeWeights(Pass):
    """Open every layer whose row of the op table says how, or say why not.

    Attributes:
        table: the op table, for nodes that opening adds.
    """

    table: OpTable = DEFAULT_TABLE

    def requires(self, graph_module: GraphModule) -> None:
        """Operations must be annotated."""
        self.require_annotations(graph_module)

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Replace module calls by function calls; True if there were any."""
        sources = _Sources(graph_module)
        modified = False
        for node in list(graph_module.graph.find_nodes(op="call_module")):
            op = facts(node).op
            if op is None or op.open is None:
                continue
            module = graph_module.get_submodule(str(node.target))
            reason = _refusal(module, op, node)
            if reason is not None:
                annotate(node, skip=reason)
                continue
            self._open(graph_module, node, op, sources)
            modified = True
        return modified

    def _open(
        self, owner: GraphModule, node: Node, op: OpInfo, sources: _Sources
    ) -> None:
        assert op.open is not None
        path = str(node.target)
        module = owner.get_submodule(path)
        call = op.open(module)
        value = op.bind(node)["input"]
        weight = sources.of(path, module, "weight")
        bias = sources.of(path, module, "bias")
        with owner.graph.inserting_before(node):
            if call.pad:
                arguments = (value, call.pad, call.pad_mode)
                value = owner.graph.call_function(F.pad, arguments)
                annotate(value, op=self.table.find(value, owner), layer=path)
        # The node itself turns from a module call into a function call: its name, its
        # place and its facts stay.
        node.op, node.target = "call_function", call.function
        node.args, node.kwargs = (value, weight, bias), dict(call.settings)


class _Sources:
    """One node for each parameter, placed after the inputs."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.owner = graph_module
        self.graph = graph_module.graph
        self.nodes: dict[int, Node] = {}
        for node in self.graph.find_nodes(op="get_attr"):
            self.nodes.setdefault(id(_attribute(graph_module, str(node.target))), node)
        self.names = {
            id(p): name
            for name, p in graph_module.named_parameters(remove_duplicate=True)
        }

    def of(self, path: str, module: nn.Module, name: str) -> Node | None:
        """The node that holds ``module.name``; None where that is None."""
        if is_parametrized(module, name):
            return self._once(f"{path}.parametrizations.{name}", "call_module")
        value = getattr(module, name)
        if value is None:
            return None
        known = self.nodes.get(id(value))
        if known is not None:
            self._move_up(known)
            return known
        node = self._once(self.names.get(id(value), f"{path}.{name}"), "get_attr")
        self.nodes[id(value)] = node
        return node

    def _once(self, target: str, kind: str) -> Node:
        found = list(self.graph.find_nodes(op=kind, target=target))
        if found:
            self._move_up(found[0])
            return found[0]
        with self.graph.inserting_before(self._first_call()):
            name = target.replace(".", "_")
            return self.graph.create_node(kind, target, (), {}, name)

    def _first_call(self) -> Node:
        return next(
            n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr")
        )

    def _move_up(self, node: Node) -> None:
        """A parameter read late in the forward may be needed earlier."""
        first = self._first_call()
        if first < node:
            first.prepend(node)


def _refusal(module: nn.Module, op: OpInfo, node: Node) -> str | None:
    """Why this layer must stay a module, None where it need not."""
    if has_hooks(module):
        return "has hooks, which a function call would drop; remove them before prepare"
    extra = set(op.bind(node)) - {"input"}
    if extra or len(node.args) > 1:
        return "is called with more than its input, such as output_size"
    return None


def _attribute(owner: nn.Module, path: str) -> Any:
    prefix, _, name = path.rpartition(".")
    return getattr(owner.get_submodule(prefix), name)
