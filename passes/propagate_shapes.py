"""PropagateShapes: run the example once and note the shape of every value, and MACs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from gdnsq_fx.annotations import annotate, facts
from gdnsq_fx.inputs import batch_size
from gdnsq_fx.state import preserved_state

from ._base import Pass, placeholder_values


@dataclass(frozen=True)
class PropagateShapes(Pass):
    """Write ``shape``, ``batch`` and ``macs`` (per sample).

    Attributes:
        args, kwargs: an example input.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Facts only; buffers and the random state are left as they were."""
        values = placeholder_values(graph_module, self.args, self.kwargs)
        batch = batch_size(self.args, self.kwargs)
        with preserved_state(graph_module), torch.no_grad():
            graph_module.eval()
            _ShapeRecorder(graph_module, batch).run(*values)
        for node in graph_module.graph.nodes:
            annotate(node, macs=_macs_per_sample(node))
        return False


class _ShapeRecorder(Interpreter):
    def __init__(self, graph_module: GraphModule, batch: int) -> None:
        super().__init__(graph_module)
        self.batch = batch

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        elements = sum(t.numel() for t in tensors) // max(self.batch, 1)
        annotate(n, shape=shape, batch=self.batch, elements=elements)
        return value


def _macs_per_sample(node: Node) -> int:
    found = facts(node)
    if found.op is None or found.op.macs is None or found.shape is None:
        return 0
    shapes = {
        name: shape
        for name, value in found.op.bind(node).items()
        if isinstance(value, Node) and (shape := facts(value).shape) is not None
    }
    return found.op.macs(shapes, found.shape) // max(found.batch, 1)
