"""One graph for evaluation and training out of a recording of each.

Where the two differ in a value (``F.dropout(x, training=...)``) a `ByMode` node
chooses; calls that only one makes (auxiliary heads) move into an `InMode` node.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from typing import Any, cast

from torch import nn
from torch.fx import Graph, Node

from gdnsq_fx.capture.alignment import aligned, scope_of
from gdnsq_fx.capture.helpers import ByMode, InMode, add_helper
from gdnsq_fx.capture.pickled import PickledByNodes


def merged(root: nn.Module, evaluation: Graph, training: Graph) -> Graph:
    """A graph that does what one graph does in evaluation, the other in training.

    Args:
        root: the model; helper modules are added to it where the two graphs differ.
        evaluation, training: recordings of the same model on the same example.
    """
    return _Merger(root, evaluation, training).run()


class _Merger:
    def __init__(self, root: nn.Module, evaluation: Graph, training: Graph) -> None:
        self.root = root
        self.graphs = (evaluation, training)
        self.graph = Graph()
        # For each mode: its nodes -> nodes of the merged graph.
        self.known: tuple[dict[Node, Node], dict[Node, Node]] = ({}, {})
        self.choices: dict[tuple[Any, ...], Node] = {}
        self.count = 0

    def run(self) -> Graph:
        """Merge."""
        self._inputs()
        for block in aligned(*self.graphs):
            if block.matched:
                for one, two in zip(block.first, block.second, strict=True):
                    self._common(one, two)
            else:
                mode = not block.first
                self._one_mode(block.first or block.second, mode)
        outputs = [next(iter(g.find_nodes(op="output"))) for g in self.graphs]
        one, two = (node.args[0] for node in outputs)
        self.graph.output(self._argument(one, two, outputs[0]))
        return self.graph

    def _inputs(self) -> None:
        for kind in ("placeholder", "get_attr"):
            made: dict[Any, Node] = {}
            for graph, known in zip(self.graphs, self.known, strict=True):
                for node in graph.find_nodes(op=kind):
                    if node.target not in made:
                        made[node.target] = self.graph.node_copy(node)
                    known[node] = made[node.target]

    def _common(self, one: Node, two: Node) -> None:
        args = self._argument(one.args, two.args, one)
        kwargs = self._argument(one.kwargs, two.kwargs, one)
        made = self.graph.create_node(one.op, one.target, args, kwargs, one.name)
        made.meta = dict(one.meta)
        self.known[0][one] = self.known[1][two] = made

    def _argument(self, one: Any, two: Any, reader: Node) -> Any:
        """An argument that is right in both modes."""
        if isinstance(one, Node) and isinstance(two, Node):
            mine, other = self.known[0].get(one), self.known[1].get(two)
            return mine if mine is other else self._choice(mine, other, reader)
        if type(one) is type(two):
            parts = _parts(one, two)
            if parts is not None:
                build, pairs = parts
                return build([self._argument(*pair, reader) for pair in pairs])
            if one == two:
                return one
        return self._choice(self._of(one, False), self._of(two, True), reader)

    def _of(self, value: Any, mode: bool) -> Any:
        """An argument of one mode, in terms of the merged graph."""
        if isinstance(value, Node):
            return self.known[mode].get(value)
        parts = _parts(value, value)
        if parts is None:
            return value
        build, pairs = parts
        return build([self._of(part, mode) for part, _ in pairs])

    def _choice(self, evaluation: Any, training: Any, reader: Node) -> Node:
        scope = scope_of(reader)
        key = (repr(evaluation), repr(training), scope)
        if key not in self.choices:
            name = f"by_mode_{scope}" if scope else "by_mode"
            target = add_helper(self.root, name, ByMode(self._scope(scope)))
            node = self.graph.call_module(target, (evaluation, training))
            node.stack_trace = reader.stack_trace
            node.meta["nn_module_stack"] = reader.meta.get("nn_module_stack", {})
            self.choices[key] = node
        return self.choices[key]

    def _scope(self, path: str) -> nn.Module | None:
        return self.root.get_submodule(path) if path else None

    def _one_mode(self, nodes: list[Node], mode: bool) -> None:
        """Calls of one mode as a node of their own."""
        known = self.known[mode]
        region = set(nodes)
        given = list(dict.fromkeys(i for n in nodes for i in n.all_input_nodes))
        inputs = [node for node in given if node not in region]
        outputs = [n for n in nodes if any(user not in region for user in n.users)]
        body = Graph()
        inner = {node: body.placeholder(node.name) for node in inputs}
        for node in nodes:
            inner[node] = body.node_copy(node, inner.__getitem__)
        body.output(tuple(inner[node] for node in outputs))
        path = os.path.commonpath(["/" + scope_of(n).replace(".", "/") for n in nodes])
        scope = path.strip("/").replace("/", ".")
        module = InMode(
            self._scope(scope), PickledByNodes(self.root, body), mode, len(outputs)
        )
        name = f"{'training' if mode else 'evaluation'}_only_{self.count}"
        self.count += 1
        target = add_helper(self.root, name, module)
        made = self.graph.call_module(target, tuple(known[node] for node in inputs))
        made.stack_trace = nodes[0].stack_trace
        for index, node in enumerate(outputs):
            known[node] = self.graph.call_function(operator.getitem, (made, index))


def _parts(one: Any, two: Any) -> tuple[Any, Iterator[tuple[Any, Any]]] | None:
    """How to rebuild a container, and its items in pairs; None for anything else."""
    if isinstance(one, tuple | list) and len(one) == len(two):
        kind: Any = type(one)
        build = kind._make if hasattr(one, "_make") else kind
        return build, zip(one, two, strict=True)
    if isinstance(one, dict) and list(one) == list(two):
        names = list(cast(dict[Any, Any], one))

        def named(parts: list[Any]) -> dict[Any, Any]:
            return dict(zip(names, parts, strict=True))

        return named, ((one[name], two[name]) for name in names)
    if isinstance(one, slice):
        ends = ("start", "stop", "step")
        return (
            _slice,
            ((getattr(one, end), getattr(two, end)) for end in ends),
        )
    return None


def _slice(ends: list[Any]) -> slice:
    return slice(*ends)
