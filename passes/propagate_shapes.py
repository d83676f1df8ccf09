"""PropagateShapes: note the shape of every value for an example input, and MACs.

Runs on fake tensors (shapes without data), and on the example itself where the graph
reads data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node, map_arg
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from gdnsq_fx.annotations import KEY, annotate, described, facts
from gdnsq_fx.errors import PassError
from gdnsq_fx.inputs import batch_size
from gdnsq_fx.opinfo import OpInfo
from gdnsq_fx.quantize.quantizer import Quantizer
from gdnsq_fx.state import cloned, preserved_state, without_fast_path

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
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as fake:
                self._run(graph_module, fake)
        except Exception:  # it reads data, or an operation has no fake version
            self._run(graph_module, None)
        for node in graph_module.graph.nodes:
            _count_macs(node, graph_module)
        return False

    def _run(self, graph_module: GraphModule, fake: FakeTensorMode | None) -> None:
        """Real values are cloned: a forward may write into its input."""
        example = (self.args, self.kwargs)
        args, kwargs = cloned(example) if fake is None else _faked(example, fake)
        values = placeholder_values(graph_module, args, kwargs)
        with preserved_state(graph_module), torch.no_grad():
            graph_module.eval()
            batch = batch_size(self.args, self.kwargs)
            _ShapeRecorder(graph_module, batch).run(*values)


def _faked(tree: Any, fake: FakeTensorMode) -> Any:
    return tree_map_only(Tensor, fake.from_tensor, tree)


class _ShapeRecorder(Interpreter):
    def __init__(self, graph_module: GraphModule, batch: int) -> None:
        super().__init__(graph_module)
        self.batch = batch

    def run_node(self, n: Node) -> Any:
        op = facts(n).op
        known = KEY not in n.meta or (op is not None and not _is_refused(n, op))
        unknown = n.op.startswith("call_") and not known
        value = self._counted(n) if unknown else super().run_node(n)
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        elements = sum(t.numel() for t in tensors) // max(self.batch, 1)
        dtype = value.dtype if isinstance(value, Tensor) else None
        shapes = tuple(tuple(t.shape) for t in tensors)
        annotate(n, shape=shape, shapes=shapes, dtype=dtype)
        number = value if isinstance(value, int) else None
        annotate(n, number=number, batch=self.batch, elements=elements)
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
        with without_fast_path(), counter:
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


def _count_macs(node: Node, owner: GraphModule) -> None:
    """MACs of a node whose row has a formula."""
    found = facts(node)
    op = found.op
    if op is None:
        return
    shapes = _shapes_of_arguments(node, op, owner)
    output = found.shape if found.shape is not None else _first_shape(node)
    if op.macs is None or output is None or _is_refused(node, op):
        return
    try:
        macs = op.macs(shapes, output)
        inner = op.inner_macs(shapes, output) if op.inner_macs and _is_call(node) else 0
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise PassError(
            f"PropagateShapes: the MACs formula of the op table row {op.name!r} fails "
            f"on {described(node)}: {error!r}. It is given {shapes}; mend the formula"
        ) from error
    batch = max(found.batch, 1)
    annotate(node, macs=macs // batch, inner_macs=inner // batch)


def _is_refused(node: Node, op: OpInfo) -> bool:
    return op.refusal is not None and op.refusal(op.bind(node)) is not None


def _is_call(node: Node) -> bool:
    return node.op != "call_module"


def _shapes_of_arguments(node: Node, op: OpInfo, owner: GraphModule) -> dict[str, Any]:
    """The bound arguments of a call with the shape in the place of each tensor."""
    mapped: Any = map_arg(op.bind(node), lambda one: facts(one).shape)
    shapes: dict[str, Any] = dict(mapped)
    if node.op != "call_module":
        return shapes
    # A layer that could not be opened has its weights.
    module = owner.get_submodule(str(node.target))
    matrices = [tuple(p.shape) for p in module.parameters() if p.ndim > 1]
    for name, role in op.roles.items():
        if role == "weight":
            shapes[name] = matrices.pop(0)
        elif callable(role) and name not in shapes:
            shapes[name] = matrices
    return shapes


def _first_shape(node: Node) -> tuple[int, ...] | None:
    """Shape of the first tensor of a tuple."""
    return next(iter(facts(node).shapes), None)
