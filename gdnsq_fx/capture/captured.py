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
        # Unpickling would trace anew with this class, which wants an example input.
        self._tracer_cls = None
        _adopt(self, root)

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        twin: CapturedModule = super().__deepcopy__(memo)  # type: ignore[assignment]
        # The memo already holds a copy of every child; this only fetches them.
        tree = nn.Module()
        for kind in _REGISTRIES:
            setattr(tree, kind, copy.deepcopy(getattr(self, kind), memo))
        tree._non_persistent_buffers_set = self._non_persistent_buffers_set
        tree.training = self.training
        _adopt(twin, tree)
        return twin


_REGISTRIES = ("_modules", "_parameters", "_buffers")


def _adopt(graph_module: GraphModule, root: nn.Module) -> None:
    """Give a graph module all that a model registers, in the model's order.

    What only the graph has (constants that tracing met) follows as non-persistent
    buffers, so that ``state_dict()`` has the model's keys and no other.
    """
    constants = set(graph_module._buffers) - set(root._buffers)
    for kind in _REGISTRIES:
        mine, theirs = getattr(graph_module, kind), getattr(root, kind)
        rest = {name: value for name, value in mine.items() if name not in theirs}
        mine.clear()
        mine.update(theirs)
        mine.update(rest)
    hidden = set(root._non_persistent_buffers_set) | constants
    graph_module._non_persistent_buffers_set = hidden
    graph_module.training = root.training
