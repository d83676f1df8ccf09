"""PropagateShapes: run the example once and note the shape of every value, and MACs."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gdnsq_fx.annotations import KEY, annotate, facts
from gdnsq_fx.inputs import batch_size
from gdnsq_fx.quantize.quantizer import Quantizer
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
        known = KEY not in n.meta or facts(n).op is not None
        unknown = n.op.startswith("call_") and not known
        value = self._counted(n) if unknown else super().run_node(n)
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        elements = sum(t.numel() for t in tensors) // max(self.batch, 1)
        dtype = value.dtype if isinstance(value, Tensor) else None
        annotate(n, shape=shape, dtype=dtype, batch=self.batch, elements=elements)
        return value

    def _counted(self, n: Node) -> Any:
        """Run what the op table does not know and count its MACs all the same.

        Torch's counter knows matrix products inside; a layer with weights that it
        counts as nothing (LSTM) uses each weight at least once for each sample.
        """
        weights = _weight_elements(self.submodules.get(str(n.target)))
        if n.op == "call_module" and not weights:
            return super().run_node(n)
        counter = FlopCounterMode(display=False)
        with _without_fast_path(), counter:
            value = super().run_node(n)
        counted = counter.get_total_flops() // 2 // max(self.batch, 1)
        if counted or weights:
            name = getattr(n.target, "__name__", n.target)
            reason = facts(n).skip or f"{name} is not in the op table"
            annotate(n, macs=max(counted, weights), skip=reason)
        return value


def _weight_elements(module: nn.Module | None) -> int:
    """Elements of matrices and kernels of a module, quantizers of ours aside."""
    if module is None or isinstance(module, Quantizer | ParametrizationList):
        return 0
    return sum(p.numel() for p in module.parameters() if p.ndim >= 2)


@contextmanager
def _without_fast_path() -> Generator[None]:
    """The fused attention hides its matrix products from the counter."""
    mha = torch.backends.mha
    enabled = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        mha.set_fastpath_enabled(enabled)


def _macs_per_sample(node: Node, owner: GraphModule) -> int:
    found = facts(node)
    if found.op is None:
        return found.macs
    if found.op.macs is None or found.shape is None:
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
