"""Nested values of a model as graph arguments, and back."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

_CONSTANTS = (
    str,
    bytes,
    int,
    float,
    bool,
    complex,
    torch.dtype,
    torch.device,
    torch.memory_format,
    torch.layout,
    torch._ops.OpOverload,
    type(None),
    type(...),
)


class Untraceable(Exception):
    """Something that a graph cannot hold; the message says what."""


def map_argument(
    value: Any,
    leaf: Callable[[Any], Any],
    call: Callable[..., Node],
    exact: bool = False,
) -> Any:
    """A nested value with tensors and traced numbers replaced, fit for a graph.

    Args:
        value: what the model passes to a function or returns.
        leaf: turns a tensor or traced number into its node.
        call: makes a node; dataclasses are built by calling their class.
        exact: keep the class of tuples such as ``torch.Size``, as for an output.

    Raises:
        Untraceable: it holds something that a graph cannot.
    """

    def again(item: Any) -> Any:
        return map_argument(item, leaf, call, exact)

    if isinstance(value, Node):
        return value
    if isinstance(value, Tensor) or type(value) not in _CONSTANTS:
        found = leaf(value)
        if found is not value:
            return found
    if isinstance(value, _CONSTANTS):
        return _without_class(value)
    if is_dataclass(value) and not isinstance(value, type):
        return _rebuilt(value, _dataclass_items(value), call)
    if isinstance(value, Mapping):
        return _mapping(cast(Mapping[Any, Any], value), again, call)
    if isinstance(value, tuple | list):
        return _sequence(value, again, call, exact)
    if isinstance(value, slice):
        return slice(again(value.start), again(value.stop), again(value.step))
    if isinstance(value, range):
        return list(value)
    if hasattr(value, "item") and type(value).__module__ == "numpy":
        number: Any = value
        return number.item() if getattr(value, "ndim", 1) == 0 else _refuse(value)
    if isinstance(value, type) and "<" not in value.__qualname__:
        place = value.__module__, value.__qualname__
        return call("call_function", named_type, place, {})
    if _is_record(value):
        return _rebuilt_record(value, call)
    return _refuse(value)


def map_parts(
    value: Any,
    item: Callable[[Any, Any], Any],
    attribute: Callable[[Any, str], Any],
) -> Any:
    """A nested value with each of its parts replaced; anything else as it is.

    Args:
        item: ``(part, index or key) -> new part`` for sequences and mappings.
        attribute: ``(part, name) -> new part`` for dataclasses.

    Raises:
        Untraceable: an object of an unknown kind, which may hold tensors.
    """
    if isinstance(value, tuple | list):
        values = cast(tuple[Any, ...], value)
        return _same_kind(values, [item(v, i) for i, v in enumerate(values)])
    if isinstance(value, Mapping):
        # Changed in place: mappings often have a class of their own.
        mapping = cast(dict[Any, Any], value)
        for key, part in list(mapping.items()):
            new = item(part, key)
            if new is not part:
                mapping[key] = new
        return mapping
    if is_dataclass(value) and not isinstance(value, type):
        for name, part in _dataclass_items(value):
            new = attribute(part, name)
            if new is not part:
                object.__setattr__(value, name, new)
        return value
    if value is None or isinstance(value, _CONSTANTS):
        return value
    raise Untraceable(f"returns {_kind(value)}, whose tensors cannot be followed")


def _without_class(value: Any) -> Any:
    """A number of a class of its own (NumPy's, an enum's) as Python's number."""
    kinds = (bool, int, float, complex)
    base: Any = next((kind for kind in kinds if isinstance(value, kind)), None)
    return value if base is None or type(value) is base else base(value)


def _same_kind(old: Any, parts: list[Any]) -> Any:
    if all(new is part for new, part in zip(parts, old, strict=True)):
        return old
    if hasattr(old, "_make"):
        return type(old)._make(parts)
    return type(old)(parts)


def _dataclass_items(value: Any) -> list[tuple[str, Any]]:
    return [(f.name, getattr(value, f.name)) for f in fields(value) if f.init]


def _mapping(value: Any, again: Callable[[Any], Any], call: Callable[..., Node]) -> Any:
    if not all(map(_is_constant, value)):
        _refuse(value)
    plain = {key: again(part) for key, part in value.items()}
    if type(value) is dict:
        return plain
    if isinstance(value, defaultdict):
        return call("call_function", type(value), (None, plain), {})
    return call("call_function", type(value), (plain,), {})


def _is_constant(key: Any) -> bool:
    if isinstance(key, tuple):
        return all(map(_is_constant, cast(tuple[Any, ...], key)))
    return isinstance(key, _CONSTANTS)


def _sequence(
    value: Any, again: Callable[[Any], Any], call: Callable[..., Node], exact: bool
) -> Any:
    parts = [again(part) for part in value]
    kind = type(value)
    if isinstance(value, list):
        return parts
    if hasattr(value, "_fields"):
        # Built by a call: its class may look at the parts, and code must name it.
        return call("call_function", kind, (*parts,), {})
    if exact and kind is not tuple:  # torch.Size, torch.return_types
        return call("call_function", kind, (parts,), {})
    return tuple(parts)


def _rebuilt(
    value: Any, items: list[tuple[str, Any]], call: Callable[..., Node]
) -> Node:
    """A node that builds the dataclass anew; what is None by default is left out."""
    given = {name: part for name, part in items if part is not None}
    return call("call_function", type(value), (), given)


def _is_record(value: Any) -> bool:
    """A plain Python object whose whole state is its ``__dict__``, as a cache is."""
    kind = type(value)
    if callable(value) or not hasattr(value, "__dict__"):
        return False
    return kind.__reduce_ex__ is object.__reduce_ex__ and "<" not in kind.__qualname__


def _rebuilt_record(value: Any, call: Callable[..., Node]) -> Node:
    kind = type(value)
    place = kind.__module__, kind.__qualname__
    return call("call_function", rebuild, (*place, dict(vars(value))), {})


def named_type(module: str, name: str) -> Any:
    """A class by module and qualified name: a graph holds strings, not classes."""
    return attrgetter(name)(import_module(module))


def rebuild(module: str, name: str, state: dict[str, Any]) -> Any:
    """An object of a class with a given ``__dict__``; ``__init__`` is not called."""
    kind = named_type(module, name)
    made = kind.__new__(kind)
    vars(made).update(state)
    return made


def _refuse(value: Any) -> Any:
    raise Untraceable(f"holds {_kind(value)}, which cannot stand in a graph")


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
