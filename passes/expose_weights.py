"""ExposeWeights: layers with weights become function calls on explicit weight edges.

    %y = call_module[conv1](%x)
      ->
    %conv1_weight = get_attr[conv1.weight]
    %conv1 = call_function[conv2d](%x, %conv1_weight, %conv1_bias, **settings)

The modules stay in the tree, so parameters keep their names; a parameter used twice is
one ``get_attr`` node, whatever its names. A parametrized weight is the call of its
parametrization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.utils.parametrize import is_parametrized

from gdnsq_fx.annotations import annotate, facts
from gdnsq_fx.nested import joined, path_of
from gdnsq_fx.operands import Call, Stored
from gdnsq_fx.opinfo import OpInfo, OpTable
from gdnsq_fx.optable import DEFAULT_TABLE

from ._base import Pass, has_hooks, rewrite_each


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
        return rewrite_each(graph_module, self._expose)

    def _expose(self, graph_module: GraphModule) -> bool:
        sources = _Sources(graph_module)
        modified = sources.merge()
        for node in list(graph_module.graph.find_nodes(op="call_module")):
            op = facts(node).op
            if op is None or not op.is_compute:
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
        path = str(node.target)
        call = _opened(owner.get_submodule(path), op, node)
        args, kwargs = self._emitted(owner, node, call, sources)
        # The node itself turns from a module call into a function call: its name, its
        # place and its facts stay.
        node.op, node.target = "call_function", call.function
        node.args, node.kwargs = args, kwargs

    def _emitted(
        self, owner: GraphModule, node: Node, call: Call, sources: _Sources
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a call as nodes: stored tensors, and calls within it."""
        path = str(node.target)
        module = owner.get_submodule(path)

        def emitted(value: Any) -> Any:
            if isinstance(value, Stored):
                return sources.of(path, module, value.name)
            if not isinstance(value, Call):
                return value
            args, kwargs = self._emitted(owner, node, value, sources)
            with owner.graph.inserting_before(node):
                made = owner.graph.call_function(value.function, args, kwargs)
            layer = joined(path_of(owner), path)
            annotate(made, op=self.table.find(made, owner), layer=layer)
            return made

        args = tuple(_mapped(value, emitted) for value in call.args)
        return args, {k: _mapped(v, emitted) for k, v in call.kwargs.items()}


class _Sources:
    """One node for each parameter, placed after the inputs."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.owner = graph_module
        self.graph = graph_module.graph
        self.nodes: dict[int, Node] = {}
        self.twins: list[tuple[Node, Node]] = []
        for node in self.graph.find_nodes(op="get_attr"):
            value = _attribute(graph_module, str(node.target))
            known = self.nodes.setdefault(id(value), node)
            if known is not node and isinstance(value, Tensor):
                self.twins.append((known, node))
        self.names = {
            id(p): name
            for name, p in graph_module.named_parameters(remove_duplicate=True)
        }

    def merge(self) -> bool:
        """Let one node stand for a tensor that several nodes hold."""
        for node, twin in self.twins:
            twin.replace_all_uses_with(node)
            self.graph.erase_node(twin)
        return bool(self.twins)

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


def _opened(module: nn.Module, op: OpInfo, node: Node) -> Call:
    assert op.open is not None
    return op.open(module, op.bind(node))


def _refusal(module: nn.Module, op: OpInfo, node: Node) -> str | None:
    """Why this layer must stay a module, None where it need not."""
    if op.open is None:
        return "is a module that the op table cannot open into a call"
    if has_hooks(module):
        return "has hooks, which a function call would drop; remove them before prepare"
    if op.refusal is None:
        return None
    call = _opened(module, op, node)
    return op.refusal(op.named(call.args, call.kwargs, target=call.function))


def _mapped(value: Any, change: Any) -> Any:
    """A value, or the items of a list or tuple, changed."""
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    if isinstance(value, tuple):
        return tuple(_mapped(item, change) for item in value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    return change(value)


def _attribute(owner: nn.Module, path: str) -> Any:
    prefix, _, name = path.rpartition(".")
    return getattr(owner.get_submodule(prefix), name)
