"""PropagateShapes: note the shape of every value for an example input, and MACs.

Runs on fake tensors (shapes without data), and on the example itself where the graph
reads data.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node, map_arg
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from gdnsq_fx.annotations import KEY, annotate, described, facts
from gdnsq_fx.capture.captured import capture_facts
from gdnsq_fx.errors import PassError
from gdnsq_fx.inputs import batch_size
from gdnsq_fx.nested import alike, graphs_of, joined, nested_graphs, path_of
from gdnsq_fx.opinfo import OpInfo
from gdnsq_fx.quantize.quantizer import Quantizer
from gdnsq_fx.state import cloned, preserved_state, without_fast_path

from ._base import Pass, placeholder_values
from ._nested_calls import Arguments, Calls, calls_of

_NORMALIZATIONS = (F.batch_norm, torch.batch_norm)


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
        batch = max(batch_size(self.args, self.kwargs), 1)
        counts = self._faked(graph_module, batch) if _is_torchs(graph_module) else None
        if counts is None:
            counts = _Counts(graph_module, batch)
            self._run(graph_module, counts, None)
        counts.write()
        return False

    def _faked(self, graph_module: GraphModule, batch: int) -> _Counts | None:
        """Counts of a run on fake tensors; None where it reads data."""
        counts = _Counts(graph_module, batch)
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as fake:
                self._run(graph_module, counts, fake)
        except Exception:  # it reads data, or an operation has no fake version
            return None
        return counts

    def _run(
        self, graph_module: GraphModule, counts: _Counts, fake: FakeTensorMode | None
    ) -> None:
        example = (self.args, self.kwargs)
        if fake is not None:
            example = tree_map_only(Tensor, fake.from_tensor, example)
        with preserved_state(graph_module), torch.no_grad():
            graph_module.eval()
            with calls_of(nested_graphs(graph_module)) as calls:
                counts.run(graph_module, example)
            for one in nested_graphs(graph_module):
                for call in calls[one]:
                    counts.run(one, call)
                if not calls[one]:
                    counts.run_unreached(one, calls)


def _is_torchs(graph_module: GraphModule) -> bool:
    """Whether all that it calls is torch's, Python's or ours.

    Other code may keep what it computed in a cache of its own, and hand it out again:
    no fake tensor must get there.
    """
    for one in graphs_of(graph_module):
        for node in one.graph.nodes:
            called: Any = node.target
            if node.op == "call_module":
                called = type(one.get_submodule(str(node.target)))
            elif node.op != "call_function":
                continue
            room = str(getattr(called, "__module__", None) or "torch").partition(".")[0]
            if room not in ("torch", "_operator", "builtins", "math", "gdnsq_fx"):
                return False
    return True


class _Counts:
    """Shapes, and MACs of all calls of all graphs; those inside may run many times."""

    def __init__(self, graph_module: GraphModule, batch: int) -> None:
        self.graph_module = graph_module
        self.batch = batch
        self.macs: Counter[Node] = Counter()
        self.inner: Counter[Node] = Counter()
        # What the op table does not know, as torch counts it.
        self.unknown: Counter[Node] = Counter()

    def run(self, one: GraphModule, call: Arguments, *, counts: bool = True) -> None:
        """Run one graph once."""
        args, kwargs = cloned(call)
        recorder = _ShapeRecorder(one, self.batch)
        recorder.run(*placeholder_values(one, args, kwargs))
        if not counts:
            return
        self.unknown.update(recorder.unknown)
        for node in one.graph.nodes:
            macs, inner = _macs(node, one)
            self.macs[node] += macs
            self.inner[node] += inner

    def run_unreached(self, one: GraphModule, calls: Calls) -> None:
        """Shapes of what the example does not reach, from its like; no MACs."""
        groups = alike(self.graph_module, one)
        likely = [c for group in groups for other in group for c in calls[other]]
        for call in likely[:1]:
            self.run(one, call, counts=False)

    def write(self) -> None:
        """MACs per sample, and the reason where an unknown node has some.

        Graphs within an opaque module count for themselves; it keeps the rest.
        """
        for one in reversed(graphs_of(self.graph_module)):
            for node in one.graph.nodes:
                if node in self.unknown:
                    self._write_unknown(one, node)
                else:
                    macs, inner = self.macs[node], self.inner[node]
                    annotate(
                        node, macs=macs // self.batch, inner_macs=inner // self.batch
                    )

    def _write_unknown(self, one: GraphModule, node: Node) -> None:
        inside = self._inside(one, node)
        counted = self.unknown[node]
        if inside:
            calls = [n for n in self.unknown if _same_call(n, node)]
            counted = sum(self.unknown[n] for n in calls)
            counted -= sum(self.macs[n] for g in inside for n in g.graph.nodes)
            counted = max(counted, 0) // len(calls)
        self.macs[node] = counted
        weights = _weight_elements(one, node)
        macs = max(counted // self.batch, weights)
        name = getattr(node.target, "__name__", node.target)
        skip = facts(node).skip or f"{name} is not in the op table"
        if macs:
            annotate(node, macs=macs, skip=skip)
        else:  # all that could be quantized inside has a graph, or there is nothing
            annotate(node, macs=0, skip=None)

    def _inside(self, one: GraphModule, node: Node) -> list[GraphModule]:
        if node.op != "call_module":
            return []
        path = joined(path_of(one), str(node.target)) + "."
        graphs = nested_graphs(self.graph_module)
        return [g for g in graphs if path_of(g).startswith(path)]


class _ShapeRecorder(Interpreter):
    def __init__(self, graph_module: GraphModule, batch: int) -> None:
        super().__init__(graph_module)
        self.batch = batch
        self.unknown: dict[Node, int] = {}

    def run_node(self, n: Node) -> Any:
        op = facts(n).op
        known = KEY not in n.meta or (op is not None and not _is_refused(n, op))
        unknown = n.op.startswith("call_") and not known
        value = self._counted(n) if unknown else super().run_node(n)
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        elements = sum(t.numel() for t in tensors) // self.batch
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
        owner = self.module
        assert isinstance(owner, GraphModule)
        silent = n.op == "call_module" and not _holds_weights(owner, n)
        # The counter takes a normalization apart, for as long as all else together.
        if n.target in _NORMALIZATIONS or (silent and not _is_opaque(owner, n)):
            return super().run_node(n)
        counter = FlopCounterMode(display=False)
        with without_fast_path(), counter:
            value = super().run_node(n)
        counted = counter.get_total_flops() // 2
        if counted or _is_opaque(owner, n) or _weight_elements(owner, n):
            self.unknown[n] = counted
        return value


def _is_opaque(owner: GraphModule, node: Node) -> bool:
    return node.op == "call_module" and node.target in capture_facts(owner).opaque


def _same_call(one: Node, other: Node) -> bool:
    return one.graph is other.graph and one.target == other.target


def _holds_weights(owner: GraphModule, node: Node) -> bool:
    module = owner.get_submodule(str(node.target))
    ours = isinstance(module, Quantizer | ParametrizationList)
    return not ours and any(p.ndim >= 2 for p in module.parameters())


def _weight_elements(owner: GraphModule, node: Node) -> int:
    """Elements of matrices and kernels that a module call alone can account for.

    Not those of quantizers of ours, nor what belongs to a graph inside the module.
    """
    if node.op != "call_module" or not _holds_weights(owner, node):
        return 0
    module = owner.get_submodule(str(node.target))
    graphs = [m for m in module.modules() if isinstance(m, GraphModule)]
    inside = {id(p) for g in graphs if path_of(g) for p in g.parameters()}
    weights = [p for p in module.parameters() if p.ndim >= 2]
    return sum(p.numel() for p in weights if id(p) not in inside)


def _macs(node: Node, owner: GraphModule) -> tuple[int, int]:
    """MACs of a node whose row has a formula, and how many of them no edge holds."""
    found = facts(node)
    op = found.op
    if op is None:
        return 0, 0
    shapes = _shapes_of_arguments(node, op, owner)
    output = found.shape if found.shape is not None else _first_shape(node)
    if op.macs is None or output is None or _is_refused(node, op):
        return 0, 0
    try:
        macs = op.macs(shapes, output)
        inner = op.inner_macs(shapes, output) if op.inner_macs and _is_call(node) else 0
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise PassError(
            f"PropagateShapes: the MACs formula of the op table row {op.name!r} fails "
            f"on {described(node)}: {error!r}. It is given {shapes}; mend the formula"
        ) from error
    return macs, inner


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
