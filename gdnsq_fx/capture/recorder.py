"""`Recorder`: writes down, as graph nodes, what a model does to its tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from gdnsq_fx.capture.calls import (
    DATA_READS,
    attribute_of,
    is_setter,
    is_tensor_attribute,
    spelled,
)
from gdnsq_fx.capture.location import calling_line, in_torch
from gdnsq_fx.capture.opened import OPENED_FUNCTIONS
from gdnsq_fx.capture.scalars import TracedFloat, TracedInt, plain, traced
from gdnsq_fx.capture.values import Untraceable, map_argument, map_parts

# They change what the calls after them do, and are no calls on values themselves.
_STATE = frozenset({"_set_grad_enabled", "set_grad_enabled"})


class NeedsRealValues(Exception):
    """The model reads data, which fake tensors do not have."""


@dataclass(frozen=True)
class Specialization:
    """A value that the graph keeps as it was on the example input.

    Attributes:
        kind: ``branch`` (a comparison of sizes), ``number`` (a size made a plain
            number), ``data`` (a value read from a tensor) or ``argument``.
        value: what it was, as text.
        source: ``file.py:line`` of the model.
    """

    kind: str
    value: str
    source: str


class Mark(NamedTuple):
    """A point in the recording to which it can be undone."""

    node: Node | None
    changes: int
    specialized: int


class Recorder(TorchFunctionMode):
    """Sees every torch function that runs while it is entered, and adds a node for it.

    Values are plain tensors, fake or real; which node one came from is looked up by
    identity. Sizes are `TracedInt`, so that arithmetic on them is recorded as well.

    Args:
        root: the model; parameters and buffers of it become ``get_attr`` nodes.
        fake: the mode that makes values fake; None to compute real values.
        constants: further tensors, by name, that an earlier recording met.
    """

    def __init__(
        self,
        root: nn.Module,
        fake: FakeTensorMode | None,
        constants: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.root = root
        self.fake = fake
        self.graph = Graph()
        self.needs_real = False
        self.active = True
        self.hidden = False
        self.anchor: tuple[Tensor, Node] | None = None
        self.specialized: list[Specialization] = []
        self.scopes: dict[str, tuple[str, type]] = {}
        self.constants = dict(constants)
        every = (*root.named_parameters(), *root.named_buffers(), *constants.items())
        self._named = {id(tensor): (name, tensor) for name, tensor in every}
        # Value of each node that stands for a number.
        self.numbers: dict[Node, Any] = {}
        self._attributes: dict[str, Node] = {}
        self._inputs_end: Node | None = None
        self._nodes: dict[int, tuple[Tensor, Node]] = {}
        self._changes: list[tuple[int, tuple[Tensor, Node] | None]] = []
        self.disposable: set[Node] = set()
        self._detached: dict[Node, Node] = {}
        self._gradless: set[Node] = set()
        self._leaky: set[Node] = set()

    # --- what torch calls ------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Record one call of a torch function, and compute its value."""
        del types
        kwargs = kwargs or {}
        opened = OPENED_FUNCTIONS.get(func)
        if opened is not None:
            with self:
                return opened(*args, **kwargs)
        name = str(getattr(func, "__name__", func))
        attribute = attribute_of(func)
        if is_setter(func) and attribute != "requires_grad":
            raise Untraceable(f"assigns to an attribute of a tensor ({name})")
        if attribute is not None and not is_tensor_attribute(attribute):
            return self._fact(func, args, kwargs, attribute)
        if name in _STATE:
            return func(*args, **kwargs)
        if name in DATA_READS:
            return self._data(func, args, kwargs)
        return self._call(func, args, kwargs, name)

    def _call(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str,
    ) -> Any:
        before = self.versions((args, kwargs))
        value = self.compute(func, args, kwargs)
        if value is None and name not in ("__setitem__",):
            return None
        if not _holds_tensor(value) and value is not None:
            return self._number(func, args, kwargs, name, value)
        node = self.call_node(*spelled(func, args, kwargs))
        return self.track(value, node, before)

    def _fact(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
    ) -> Any:
        """An attribute that is no tensor: symbolic if a size, else a constant."""
        value = func(*args, **kwargs)
        if name != "shape" or not self.knows(args[0]):
            return value
        node = self._scalar_node("call_function", getattr, (args[0], "shape"), {})
        return self._sizes(value, node)

    def _number(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str,
        value: Any,
    ) -> Any:
        """A result without tensors: symbolic where it is a size or an item."""
        if name == "__len__" and self.knows(args[0]):
            self._keep(
                self._scalar_node("call_method", "size", (args[0], 0), {}), value
            )
            return value
        sized = name in ("size", "numel", "nelement", "item", "broadcast_shapes")
        known = any(
            self.knows(leaf) or isinstance(leaf, TracedInt | TracedFloat)
            for leaf in tree_leaves((args, kwargs))
        )
        if not sized or not known:
            return value
        if isinstance(value, bool):
            self.specialize("data", value)
            return value
        node = self._scalar_node(*spelled(func, args, kwargs))
        return self._sizes(value, node)

    def _sizes(self, value: Any, node: Node) -> Any:
        if not isinstance(value, torch.Size):
            self.numbers[node] = value
            return traced(value, node, self)
        parts: list[Any] = []
        for index, size in enumerate(value):
            part = self.part(node, index)
            self.numbers[part] = size
            parts.append(traced(size, part, self))
        return torch.Size(parts)

    def _data(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A look at the data of a tensor: its outcome is fixed in the graph."""
        if self.fake is not None:
            self.need_real()
        value = self.compute(func, args, kwargs)
        if any(self.knows(leaf) for leaf in tree_leaves((args, kwargs))):
            self.specialize("data", value)
        return value

    # --- what others record ----------------------------------------------------------

    def scalar(
        self, function: Callable[..., Any], args: tuple[Any, ...], value: Any
    ) -> Any:
        """Record arithmetic on traced numbers (see `scalars.ScalarRecorder`)."""
        if not self.active:
            return value
        try:
            node = self._scalar_node("call_function", function, args, {})
        except Untraceable:
            return value
        self.numbers[node] = value
        return traced(value, node, self)

    def number(self, function: Callable[..., Any], source: Any, value: Any) -> None:
        """Record the call, though its result will be met as a plain number."""
        if self.active:
            node = self._scalar_node("call_function", function, (source,), {})
            self._keep(node, value)

    def _keep(self, node: Node, value: Any) -> None:
        self.numbers[node] = value
        self.specialize("number", value)

    def specialize(self, kind: str, value: object) -> None:
        """Note that the graph keeps a value which the model's own code looked at."""
        if not self.active or in_torch():
            return
        text = " ".join(str(value).split())
        short = text if len(text) <= 40 else text[:37] + "..."
        self.specialized.append(Specialization(kind, short, calling_line().short))

    def need_real(self) -> None:
        """Give up on fake values.

        Raises:
            NeedsRealValues: always; remembered, should the model's code catch it.
        """
        self.needs_real = True
        raise NeedsRealValues

    def compute(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a call on plain values, unrecorded and without gradients."""
        args, kwargs = tree_map(plain, (args, kwargs))
        outer, self.hidden = self.hidden, True
        try:
            with torch.no_grad(), torch._C.DisableTorchFunction():
                return func(*args, **kwargs)
        except Exception:
            if self.fake is not None:
                self.need_real()
            raise
        finally:
            self.hidden = outer

    def placeholder(self, name: str) -> Node:
        """A new input of the graph."""
        node = self.graph.placeholder(name)
        self._inputs_end = node
        return node

    def call_node(
        self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Node:
        """A new node, with the model's source line and module path.

        Raises:
            Untraceable: an argument cannot stand in a graph.
        """
        args, kwargs = self.argument(args), self.argument(kwargs)
        node = self.graph.create_node(op, target, args, kwargs)
        node.stack_trace = calling_line().trace
        node.meta["nn_module_stack"] = dict(self.scopes)
        return node

    def argument(self, value: Any) -> Any:
        """A value as an argument of a node.

        Raises:
            Untraceable: it cannot stand in a graph.
        """
        return map_argument(value, self._leaf, self.call_node)

    def track(self, value: Any, node: Node, before: dict[int, int]) -> Any:
        """Remember which node made each tensor of a value.

        A tensor that the call handed through gets a twin, so that both nodes can be
        told apart; one that the call wrote into stands for the new node from now on.
        """
        if isinstance(value, Tensor):
            written = before.get(id(value), value._version) != value._version
            known = id(value) in self._nodes or id(value) in before
            if known and written and not torch.is_grad_enabled():
                return value  # its history stays that of the node it had
            if known and not written:
                with torch.no_grad(), torch._C.DisableTorchFunction():
                    value = torch.ops.aten.alias.default(value)
            self._remember(value, node)
            return value
        return map_parts(
            value,
            lambda part, key: self.track(part, self.part(node, key), before),
            lambda part, name: self.track(part, self.field(node, name), before),
        )

    # --- going back ------------------------------------------------------------------

    def mark(self) -> Mark:
        """The present end of the recording."""
        last = next(iter(reversed(self.graph.nodes)), None)
        return Mark(last, len(self._changes), len(self.specialized))

    def nodes_since(self, mark: Mark) -> list[Node]:
        """What was recorded after a mark, latest first."""
        found: list[Node] = []
        for node in reversed(self.graph.nodes):
            if node is mark.node:
                break
            found.append(node)
        return found

    def undo(self, mark: Mark) -> None:
        """Forget what was recorded after a mark."""
        for node in self.nodes_since(mark):
            if node.op not in ("placeholder", "get_attr"):
                self.graph.erase_node(node)
                self.disposable.discard(node)
                self.numbers.pop(node, None)
                self._gradless.discard(node)
                self._detached = {
                    k: v for k, v in self._detached.items() if v is not node
                }
        while len(self._changes) > mark.changes:
            key, previous = self._changes.pop()
            if previous is None:
                del self._nodes[key]
            else:
                self._nodes[key] = previous
        del self.specialized[mark.specialized :]

    def finish(self, output: Any) -> Graph:
        """Close the graph."""
        self.graph.output(map_argument(output, self._leaf, self.call_node, exact=True))
        self.active = False
        return self.graph

    # --- values and nodes ------------------------------------------------------------

    def _leaf(self, value: Any) -> Any:
        """A tensor or traced number as its node; anything else as it is."""
        if isinstance(value, Tensor):
            return self._as_read(self._node_of(value))
        if isinstance(value, TracedInt | TracedFloat):
            return value.node if value.recorder is self else plain(value)
        return value

    def _node_of(self, value: Tensor) -> Node:
        known = self._nodes.get(id(value))
        if known is not None:
            return known[1]
        named = self._named.get(id(value))
        if named is not None:
            return self.attribute(named[0])
        if self.fake is not None:  # made by something that was not seen
            self.need_real()
        return self._constant(value)

    def _constant(self, value: Tensor) -> Node:
        """A tensor that the model holds elsewhere than in a parameter or buffer."""
        name = f"_tensor_constant{len(self.constants)}"
        while hasattr(self.root, name) or name in self.constants:
            name += "_"
        self.constants[name] = value
        self._named[id(value)] = name, value
        return self.attribute(name)

    def attribute(self, name: str) -> Node:
        """The ``get_attr`` node of a parameter, among those at the graph's start."""
        node = self._attributes.get(name)
        if node is None:
            after = self._inputs_end
            scope: AbstractContextManager[Any] = (
                self.graph.inserting_before(next(iter(self.graph.nodes), None))
                if after is None
                else self.graph.inserting_after(after)
            )
            with scope:
                node = self.graph.get_attr(name)
            self._attributes[name] = self._inputs_end = node
        return node

    def _as_read(self, node: Node) -> Node:
        """Detached where it is read under ``no_grad``: the graph has no such region."""
        reads_history = torch.is_grad_enabled() and node not in self._leaky
        if reads_history or node in self._gradless:
            return node
        if node not in self._detached:
            made = self.graph.call_method("detach", (node,))
            made.meta["nn_module_stack"] = dict(self.scopes)
            self._detached[node] = made
            self._gradless.add(made)
        return self._detached[node]

    def _remember(self, value: Tensor, node: Node) -> None:
        self._changes.append((id(value), self._nodes.get(id(value))))
        self._nodes[id(value)] = value, node
        if not value.is_floating_point():
            self._gradless.add(node)
        elif not torch.is_grad_enabled():
            # A module's own parameters were not detached: what it returns must be.
            inside = node.op == "call_module" or (
                node.all_input_nodes[:1]
                and (node.all_input_nodes[0].op == "call_module")
            )
            (self._leaky if inside else self._gradless).add(node)

    def knows(self, value: Any) -> bool:
        return isinstance(value, Tensor) and id(value) in self._nodes

    def _scalar_node(
        self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Node:
        node = self.call_node(op, target, args, kwargs)
        self.disposable.add(node)
        return node

    def part(self, node: Node, key: Any) -> Node:
        made = self.graph.call_function(operator.getitem, (node, key))
        made.stack_trace = node.stack_trace
        made.meta["nn_module_stack"] = dict(self.scopes)
        self.disposable.add(made)
        return made

    def field(self, node: Node, name: str) -> Node:
        made = self.graph.call_function(getattr, (node, name))
        made.meta["nn_module_stack"] = dict(self.scopes)
        self.disposable.add(made)
        return made

    def versions(self, tree: Any) -> dict[int, int]:
        """How often each tensor of a call was written into, to see what it writes."""
        return {
            id(leaf): leaf._version
            for leaf in tree_leaves(tree)
            if isinstance(leaf, Tensor) and not leaf.is_inference()
        }


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
