"""`Ledger`: the graph under construction, and which node each tensor came from."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import gc
import operator
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from gdnsq_fx.capture.gradient_history import GradientHistory
from gdnsq_fx.capture.location import calling_line
from gdnsq_fx.capture.scalars import TracedFloat, TracedInt, plain
from gdnsq_fx.capture.values import Untraceable, map_argument, map_parts


class NeedsRealValues(Exception):
    """The model reads data, which fake tensors do not have."""


class Mark(NamedTuple):
    """A point in the recording to which it can be undone."""

    node: Node | None
    changes: int


def living_tensors() -> dict[int, Tensor]:
    """All tensors that exist, by identity; kept alive, or others took their ids."""
    return {id(o): o for o in gc.get_objects() if issubclass(type(o), Tensor)}


class Ledger:
    """Nodes of a graph, and the tensors and numbers that stand for them.

    Tensors are looked up by identity; one that is neither known nor a parameter or
    buffer becomes a constant.

    Args:
        root: the model; parameters and buffers of it become ``get_attr`` nodes.
        fake: values are fake, so that a constant cannot be told from a lost value.
        constants: further tensors, by name, that an earlier recording met.

    Attributes:
        graph: the graph.
        scopes: the modules whose ``forward`` runs, outermost first.
        constants: tensors that are neither parameters nor buffers, by new name.
        numbers: value of each node that stands for a number.
        disposable: nodes without effect, to be dropped where nothing reads them.
        needs_real: a value was met that fake tensors do not have.
    """

    def __init__(
        self, root: nn.Module, fake: bool, constants: Mapping[str, Tensor]
    ) -> None:
        self.graph = Graph()
        self.scopes: dict[str, tuple[str, type]] = {}
        self.constants = dict(constants)
        self.numbers: dict[Node, Any] = {}
        self.disposable: set[Node] = set()
        self.needs_real = False
        self._root = root
        self._before = None if fake else living_tensors()
        self._fake = fake
        every = (*root.named_parameters(), *root.named_buffers(), *constants.items())
        self._named = {id(tensor): (name, tensor) for name, tensor in every}
        self._attributes: dict[str, Node] = {}
        self._inputs_end: Node | None = None
        self._nodes: dict[int, tuple[Tensor, Node]] = {}
        self._changes: list[tuple[int, tuple[Tensor, Node] | None]] = []
        self._history = GradientHistory(self.graph, self.scopes)

    # --- nodes -----------------------------------------------------------------------

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

    def scalar_node(
        self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Node:
        """A node for a number or a fact of a tensor."""
        node = self.call_node(op, target, args, kwargs)
        self.disposable.add(node)
        return node

    def part(self, node: Node, key: Any) -> Node:
        """A node for an item of a value."""
        return self._derived(node, operator.getitem, key)

    def field(self, node: Node, name: str) -> Node:
        """A node for an attribute of a value."""
        return self._derived(node, getattr, name)

    def _derived(self, node: Node, function: Any, key: Any) -> Node:
        made = self.graph.call_function(function, (node, key))
        made.stack_trace = node.stack_trace
        made.meta["nn_module_stack"] = dict(self.scopes)
        self.disposable.add(made)
        return made

    def add_living(self, value: Tensor) -> None:
        """Take a tensor for one that existed before."""
        if self._before is not None:
            self._before[id(value)] = value

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

    # --- values ----------------------------------------------------------------------

    def argument(self, value: Any, exact: bool = False) -> Any:
        """A value as an argument of a node (see `values.map_argument`).

        Raises:
            Untraceable: it cannot stand in a graph.
        """
        return map_argument(value, self._leaf, self.call_node, exact)

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

    def knows(self, value: Any) -> bool:
        """Whether a node stands for a tensor."""
        return isinstance(value, Tensor) and id(value) in self._nodes

    def has_history(self, value: Tensor) -> bool:
        """Whether a gradient may flow through a tensor in training."""
        known = self._nodes.get(id(value))
        return known is not None and self._history.reaches(known[1])

    def versions(self, tree: Any) -> dict[int, int]:
        """How often each tensor of a call was written into, to see what it writes."""
        return {
            id(leaf): leaf._version
            for leaf in tree_leaves(tree)
            if isinstance(leaf, Tensor) and not leaf.is_inference()
        }

    def need_real(self) -> None:
        """Give up on fake values.

        Raises:
            NeedsRealValues: always; remembered, should the model's code catch it.
        """
        self.needs_real = True
        raise NeedsRealValues

    # --- going back ------------------------------------------------------------------

    def mark(self) -> Mark:
        """The present end of the recording."""
        last = next(iter(reversed(self.graph.nodes)), None)
        return Mark(last, len(self._changes))

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
                self._history.forget(node)
        while len(self._changes) > mark.changes:
            key, previous = self._changes.pop()
            if previous is None:
                del self._nodes[key]
            else:
                self._nodes[key] = previous

    # --- which node ------------------------------------------------------------------

    def _leaf(self, value: Any) -> Any:
        """A tensor or traced number as its node; anything else as it is."""
        if isinstance(value, Tensor):
            return self._history.as_read(self._node_of(value))
        if isinstance(value, TracedInt | TracedFloat):
            return value.node if value.node.graph is self.graph else plain(value)
        return value

    def _node_of(self, value: Tensor) -> Node:
        known = self._nodes.get(id(value))
        if known is not None:
            return known[1]
        named = self._named.get(id(value))
        if named is not None:
            return self.attribute(named[0])
        if self._fake and isinstance(value, FakeTensor):
            self.need_real()  # made by something that was not seen
        return self.constant(value)

    def constant(self, value: Tensor) -> Node:
        """A tensor that the model holds elsewhere than in a parameter or buffer.

        Raises:
            Untraceable: it was made while the model ran, by code that is not seen.
        """
        if self._before is not None and id(value) not in self._before:
            raise Untraceable("a tensor is made by code that torch does not show")
        name = f"_tensor_constant{len(self.constants)}"
        while hasattr(self._root, name) or name in self.constants:
            name += "_"
        self.constants[name] = value
        self._named[id(value)] = name, value
        return self.attribute(name)

    def _remember(self, value: Tensor, node: Node) -> None:
        self._changes.append((id(value), self._nodes.get(id(value))))
        self._nodes[id(value)] = value, node
        self._history.note(value, node)
