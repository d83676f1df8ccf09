"""`GradientHistory`: which recorded values have no gradient history, and how it ends.

A graph has no ``no_grad`` regions. What the model reads inside of one is read through a
``detach`` instead, one for each value.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import Graph, Node


class GradientHistory:
    """Knows which nodes no gradient flows through, and detaches others where needed.

    Args:
        graph: the graph under construction, which each ``detach`` is added to.
        scopes: the modules whose ``forward`` runs, kept up to date by their owner.
    """

    def __init__(self, graph: Graph, scopes: Mapping[str, tuple[str, type]]) -> None:
        self._graph = graph
        self._scopes = scopes
        # Twin of each node that was read, nodes without a history, and outputs of
        # modules made under ``no_grad``, whose own parameters were not detached.
        self._detached: dict[Node, Node] = {}
        self._gradless: set[Node] = set()
        self._leaky: set[Node] = set()

    def note(self, value: Tensor, node: Node) -> None:
        """Take note of a value that a node made just now."""
        if not value.is_floating_point():
            self._gradless.add(node)
        elif not torch.is_grad_enabled():
            # A module's own parameters were not detached: what it returns must be.
            inside = node.op == "call_module" or (
                node.all_input_nodes[:1]
                and (node.all_input_nodes[0].op == "call_module")
            )
            (self._leaky if inside else self._gradless).add(node)

    def reaches(self, node: Node) -> bool:
        """Whether a gradient may flow through a node, read at this point of the model.

        The inputs of the graph have no history.
        """
        if node.op == "placeholder":
            return False
        return torch.is_grad_enabled() and node not in self._gradless

    def as_read(self, node: Node) -> Node:
        """The node, or its detached twin where it is read without its history."""
        reads_history = torch.is_grad_enabled() and node not in self._leaky
        if reads_history or node in self._gradless:
            return node
        if node not in self._detached:
            made = self._graph.call_method("detach", (node,))
            made.meta["nn_module_stack"] = dict(self._scopes)
            self._detached[node] = made
            self._gradless.add(made)
        return self._detached[node]

    def forget(self, node: Node) -> None:
        """Leave out a node that is erased from the graph."""
        self._gradless.discard(node)
        self._detached = {k: v for k, v in self._detached.items() if v is not node}
