"""What one recording of a model found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from gdnsq_fx.capture.specialized import Specialization


@dataclass(frozen=True, eq=False)
class Trace:
    """A recorded graph and what was learnt on the way.

    Attributes:
        graph: one node for each call.
        specialized: what the graph keeps as it was on the example.
        opaque: path of a module that could not be looked into -> why.
        constants: tensors that are neither parameters nor buffers, by their new name.
        real: real values were needed.
        numbers: what each node that stands for a number was on the example.
        disposable: nodes without effect, to be dropped where nothing reads them.
        readers: paths of the modules whose own code reads data.
        drawing: paths of the modules whose own code draws random numbers outside torch.
        training: the mode of the model.
    """

    graph: Graph
    specialized: tuple[Specialization, ...]
    opaque: dict[str, str]
    constants: dict[str, Tensor]
    real: bool
    numbers: dict[Node, Any]
    disposable: set[Node]
    readers: frozenset[str]
    drawing: frozenset[str]
    training: bool

    def pruned(self) -> Graph:
        """The graph without numbers, attributes and parameters that nothing reads."""
        for node in reversed(self.graph.nodes):
            idle = node in self.disposable or node.op == "get_attr"
            if idle and not node.users:
                self.graph.erase_node(node)
        return self.graph
