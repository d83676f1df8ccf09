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
from gdnsq_fx.state import cloned, preserved_state

from ._base import Pass, placeholder_values


@dataclass(frozen=True, eq=False)
class PropagateShapes(Pass):
    """Write ``shape``, ``batch`` and ``macs`` (per sample).

    Attributes:
        args, kwargs: an example input.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Facts only; buffers and the random state are left as they were."""
        args, kwargs = cloned((self.args, self.kwargs))
        values = placeholder_values(graph_module, args, kwargs)
        batch = batch_size(self.args, self.kwargs)
        with preserved_state(graph_module), torch.no_grad():
            graph_module.eval()
            _ShapeRecorder(graph_module, batch).run(*values)
        for node in graph_module.graph.nodes:
            annotate(node, macs=_macs_per_sample(node, graph_module))
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
        dtype = value.dtype if isinstance(value, Tensor) else None
        annotate(n, shape=shape, dtype=dtype, batch=self.batch, elements=elements)
        return value


def _macs_per_sample(node: Node, owner: GraphModule) -> int:
    found = facts(node)
    if found.op is None or found.op.macs is None or found.shape is None:
        return 0
    shapes = {
        name: shape
        for name, value in found.op.bind(node).items()
        if isinstance(value, Node) and (shape := facts(value).shape) is not None
    }
    if node.op == "call_module":  # a layer that could not be opened has its weight
        module: Any = owner.get_submodule(str(node.target))
        shapes["weight"] = tuple(module.weight.shape)
    return found.op.macs(shapes, found.shape) // max(found.batch, 1)
