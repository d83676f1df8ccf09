"""A GraphModule that keeps every parameter, buffer and module of its model."""

# The registries of a module have no public way to be handed over whole.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule


class CapturedModule(GraphModule):
    """`torch.fx.GraphModule` over the model's own module tree.

    Torch's class copies only what the graph refers to, at construction and again at
    every deep copy, so that ``state_dict()`` would lose keys. This one keeps the whole
    tree: an original checkpoint loads, and fine-tuned weights load back.
    """

    def __init__(self, root: nn.Module, graph: Graph, class_name: str = "") -> None:
        super().__init__(root, graph, class_name or type(root).__name__)
        adopt_tree(self, root)

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        twin: CapturedModule = super().__deepcopy__(memo)  # type: ignore[assignment]
        # The memo already holds a copy of every child; this only fetches them.
        children = copy.deepcopy(self._modules, memo)
        parameters = copy.deepcopy(self._parameters, memo)
        buffers = copy.deepcopy(self._buffers, memo)
        twin._modules.update(children)
        twin._parameters.update(parameters)
        twin._buffers.update(buffers)
        twin._non_persistent_buffers_set = set(self._non_persistent_buffers_set)
        twin.training = self.training
        return twin


def adopt_tree(graph_module: GraphModule, root: nn.Module) -> None:
    """Give a graph module all children, parameters and buffers of a model."""
    graph_module._modules.update(root._modules)
    graph_module._parameters.update(root._parameters)
    graph_module._buffers.update(root._buffers)
    graph_module._non_persistent_buffers_set = set(root._non_persistent_buffers_set)
    graph_module.training = root.training
