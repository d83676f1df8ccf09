"""Arguments of stored nodes as JSON, and back.

Numbers, strings, booleans, None and lists stand for themselves; anything else is an
object with one key that says its kind: ``{"node": 3}``, ``{"tuple": [...]}``,
``{"dtype": "float32"}``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from keyword import iskeyword
from typing import Any, cast

import torch
from torch.fx import Node

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,1023}", re.ASCII)
_DEVICE = re.compile(r"cpu|(cuda|mps|xpu)(:\d{1,3})?", re.ASCII)
_DEPTH = 32
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16"),
        *("float32", "float64", "complex64", "complex128"),
    )
}
_FORMATS = {
    name: getattr(torch, name)
    for name in ("contiguous_format", "preserve_format", "channels_last")
}
_FLOATS = ("inf", "-inf", "nan")


class UnknownValueError(ValueError):
    """A value that a stored graph cannot hold."""


def is_identifier(name: object) -> bool:
    """Whether a name may stand in generated code."""
    return (
        isinstance(name, str)
        and _IDENTIFIER.fullmatch(name) is not None
        and not iskeyword(name)
    )


def encoded(value: Any, nodes: Mapping[Node, int]) -> Any:
    """A value as JSON.

    Args:
        value: argument of a node, or anything inside one.
        nodes: number of each node before.

    Raises:
        UnknownValueError: it cannot be stored.
    """
    if isinstance(value, Node):
        return {"node": nodes[value]}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return {"slice": [encoded(v, nodes) for v in parts]}
    if isinstance(value, torch.Size):
        return {"size": [encoded(v, nodes) for v in value]}
    # Graphs hold lists and dicts of classes of their own; a named tuple is refused.
    if isinstance(value, list):
        return [encoded(v, nodes) for v in cast(list[Any], value)]
    if isinstance(value, tuple) and not hasattr(cast(Any, value), "_fields"):
        return {"tuple": [encoded(v, nodes) for v in cast(tuple[Any, ...], value)]}
    if type(value) is dict or type(value).__name__ == "immutable_dict":
        entries = cast(dict[Any, Any], value).items()
        return {"dict": [[_key(k), encoded(v, nodes)] for k, v in entries]}
    return _constant(value)


def decoded(value: Any, nodes: list[Node], depth: int = 0) -> Any:
    """A value from JSON.

    Raises:
        UnknownValueError: it is nothing that `encoded` writes.
    """
    if depth > _DEPTH:
        raise UnknownValueError(f"an argument is nested deeper than {_DEPTH}")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list):
        return [decoded(v, nodes, depth + 1) for v in cast(list[Any], value)]
    if not isinstance(value, dict) or len(cast(dict[str, Any], value)) != 1:
        raise UnknownValueError("an argument has no kind")
    ((kind, content),) = cast(dict[str, Any], value).items()
    if kind == "node":
        return _node(content, nodes)
    if kind in _NAMED:
        return _named(kind, content)
    if not isinstance(content, list):
        raise UnknownValueError(f"{kind} is no list")
    if kind == "dict":
        pairs = (_pair(item) for item in cast(list[Any], content))
        return {k: decoded(v, nodes, depth + 1) for k, v in pairs}
    items = [decoded(v, nodes, depth + 1) for v in cast(list[Any], content)]
    if kind == "tuple":
        return tuple(items)
    if kind == "slice" and len(items) == 3:
        return slice(*items)
    if kind == "size" and all(type(item) is int for item in items):
        return torch.Size(items)
    raise UnknownValueError(f"an argument of kind {kind[:40]!r}")


def _constant(value: Any) -> Any:
    for kind, known in (("dtype", _DTYPES), ("format", _FORMATS)):
        for name, one in known.items():
            if value is one:
                return {kind: name}
    if isinstance(value, torch.device) and _DEVICE.fullmatch(str(value)):
        return {"device": str(value)}
    if value is torch.strided:
        return {"layout": "strided"}
    if value is Ellipsis:
        return {"ellipsis": "..."}
    raise UnknownValueError(f"an argument of type {type(value).__qualname__}")


_NAMED: Mapping[str, Callable[[str], Any]] = {
    "dtype": _DTYPES.get,
    "format": _FORMATS.get,
    "float": lambda text: float(text) if text in _FLOATS else None,
    "device": lambda text: torch.device(text) if _DEVICE.fullmatch(text) else None,
    "layout": {"strided": torch.strided}.get,
    "ellipsis": {"...": Ellipsis}.get,
}


def _named(kind: str, content: Any) -> Any:
    found = _NAMED[kind](content) if isinstance(content, str) else None
    if found is None:
        raise UnknownValueError(f"a {kind} that there is not")
    return found


def _node(index: Any, nodes: list[Node]) -> Node:
    if type(index) is not int or not 0 <= index < len(nodes):
        raise UnknownValueError("an argument that no node before it computes")
    return nodes[index]


def _key(key: Any) -> Any:
    if type(key) not in (str, int):
        raise UnknownValueError(f"a key of type {type(key).__qualname__}")
    return key


def _pair(item: Any) -> tuple[Any, Any]:
    if not isinstance(item, list) or len(cast(list[Any], item)) != 2:
        raise UnknownValueError("an entry that is no pair")
    key, value = cast(list[Any], item)
    return _key(key), value
