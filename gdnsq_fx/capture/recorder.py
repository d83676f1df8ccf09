"""`Recorder`: writes down, as graph nodes, what a model does to its tensors."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

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
from gdnsq_fx.capture.ledger import Ledger
from gdnsq_fx.capture.opened import OPENED_FUNCTIONS
from gdnsq_fx.capture.scalars import TracedFloat, TracedInt, plain, traced
from gdnsq_fx.capture.specialized import Specializations
from gdnsq_fx.capture.values import Untraceable

# Results without tensors that the graph computes anew instead of keeping them.
_SYMBOLIC = frozenset(
    {
        "size",
        "numel",
        "nelement",
        "stride",
        "storage_offset",
        "item",
        "tolist",
        "broadcast_shapes",
    }
)
_HOOKS = frozenset({"register_hook", "register_post_accumulate_grad_hook"})
_ITEMS = frozenset({"item", "tolist"})
# How much they return depends on data, and a loop may go over it.
_DATA_SIZED = frozenset({"nonzero", "argwhere", "unique", "unique_consecutive"})
# They change what the calls after them do, and are no calls on values themselves.
_STATE = frozenset({"_set_grad_enabled", "set_grad_enabled"})


class Recorder(TorchFunctionMode):
    """Sees every torch function that runs while it is entered, and adds a node for it.

    Values are plain tensors, fake or real; which node one came from is looked up by
    identity. Sizes are `TracedInt`, so that arithmetic on them is recorded as well.

    Args:
        root: the model; parameters and buffers of it become ``get_attr`` nodes.
        fake: the mode that makes values fake; None to compute real values.
        constants: further tensors, by name, that an earlier recording met.

    Attributes:
        specialized: what the graph keeps as it was on the example.
        hidden: a call runs that is one node.
    """

    def __init__(
        self,
        root: nn.Module,
        fake: FakeTensorMode | None,
        constants: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.fake = fake
        self.ledger = Ledger(root, fake is not None, constants)
        self.specialized = Specializations()
        self.hidden = False
        self._active = True

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
        if is_setter(func):
            if _assigns_to(func) == "requires_grad":  # values are computed without
                return None
            raise Untraceable(f"assigns to an attribute of a tensor ({name})")
        if attribute is not None and not is_tensor_attribute(attribute):
            return self._fact(func, args, kwargs, attribute)
        if name in _HOOKS:
            raise Untraceable(f"hooks a tensor ({name})")
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
        before = self.ledger.versions((args, kwargs))
        value = self.compute(func, args, kwargs)
        if value is None and name not in ("__setitem__",):
            return None
        if name in _DATA_SIZED or (name == "where" and len(args) == 1):
            self._note_reader()
        if not _holds_tensor(value) and value is not None:
            return self._number(func, args, kwargs, name, value)
        try:
            node = self.ledger.call_node(*spelled(func, args, kwargs))
        except Untraceable as error:
            return self._fixed(value, args, kwargs, error)
        return self.ledger.track(value, node, before)

    def _fixed(self, value: Any, args: Any, kwargs: Any, error: Untraceable) -> Any:
        """A tensor made of what no graph holds, such as an array: a constant."""
        leaves = tree_leaves((args, kwargs))
        if not isinstance(value, Tensor) or any(map(self._depends, leaves)):
            raise error
        if self.fake is not None:
            self.ledger.need_real()
        self.ledger.add_living(value)
        return value

    def _depends(self, leaf: Any) -> bool:
        return self.ledger.knows(leaf) or isinstance(leaf, TracedInt | TracedFloat)

    def _fact(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
    ) -> Any:
        """An attribute that is no tensor: symbolic if a size, else a constant."""
        value = func(*args, **kwargs)
        if name == "requires_grad":  # nothing does while values are computed
            return value or self.ledger.has_history(args[0])
        if name != "shape" or not self.ledger.knows(args[0]):
            return value
        node = self.ledger.scalar_node("call_function", getattr, (args[0], "shape"), {})
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
        if name == "__len__" and self.ledger.knows(args[0]):
            self._keep(
                self.ledger.scalar_node("call_method", "size", (args[0], 0), {}), value
            )
            return value
        sized = name in _SYMBOLIC
        known = any(map(self._depends, tree_leaves((args, kwargs))))
        if not sized or not known:
            return value
        if name in _ITEMS:
            self._note_reader()
        if isinstance(value, bool):
            self.specialize("data", value)
            return value
        node = self.ledger.scalar_node(*spelled(func, args, kwargs))
        return self._sizes(value, node, read=name in _ITEMS)

    def _sizes(self, value: Any, node: Node, read: bool = False) -> Any:
        if not isinstance(value, tuple | list):
            self.ledger.numbers[node] = value
            if read:
                self.specialized.mark_from_data(node)
            return traced(value, node, self)
        items = cast(tuple[Any, ...], value)
        part = self.ledger.part
        parts = [self._sizes(v, part(node, i), read) for i, v in enumerate(items)]
        return type(items)(parts)

    def _data(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A look at the data of a tensor: its outcome is fixed in the graph."""
        if self.fake is not None:
            self.ledger.need_real()
        self._note_reader()
        value = self.compute(func, args, kwargs)
        if any(self.ledger.knows(leaf) for leaf in tree_leaves((args, kwargs))):
            self.specialize("data", value)
        return value

    def _note_reader(self) -> None:
        scopes = list(self.ledger.scopes.values())
        if scopes and self._active:
            self.specialized.modules.add(scopes[-1][0])

    # --- what others record ----------------------------------------------------------

    def scalar(
        self, function: Callable[..., Any], args: tuple[Any, ...], value: Any
    ) -> Any:
        """Record arithmetic on traced numbers (see `scalars.ScalarRecorder`)."""
        if not self._active:
            return value
        try:
            node = self.ledger.scalar_node("call_function", function, args, {})
        except Untraceable:
            return value
        self.ledger.numbers[node] = value
        if any(map(self.specialized.is_from_data, args)):
            self.specialized.mark_from_data(node)
        return traced(value, node, self)

    def number(self, function: Callable[..., Any], source: Any, value: Any) -> None:
        """Record the call, though its result will be met as a plain number."""
        if self._active:
            node = self.ledger.scalar_node("call_function", function, (source,), {})
            self._keep(node, value, source)

    def _keep(self, node: Node, value: Any, source: object = None) -> None:
        self.ledger.numbers[node] = value
        self.specialize("number", value, source)

    def specialize(self, kind: str, value: object, source: object = None) -> None:
        """Note that the graph keeps a value which the model's own code looked at."""
        if self._active:
            self.specialized.add(kind, value, source)

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
                self.ledger.need_real()
            raise
        finally:
            self.hidden = outer

    def finish(self, output: Any) -> Graph:
        """Close the graph."""
        self.ledger.graph.output(self.ledger.argument(output, exact=True))
        self._active = False
        return self.ledger.graph


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _assigns_to(setter: Any) -> str:
    return str(getattr(getattr(setter, "__self__", None), "__name__", ""))
