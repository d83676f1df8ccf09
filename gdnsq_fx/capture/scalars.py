"""Numbers that carry the graph node they came from, so that arithmetic is recorded.

`TracedInt` is an ``int`` and `TracedFloat` a ``float``: ``isinstance``, indexing and
the argument parsers of torch take them as such, and ``torch.Size`` keeps them. What
turns one into a plain number (a comparison, ``int()``, ``range``) fixes its value in
the graph; where Python lets us see that, it is noted as a specialization.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Protocol

from torch.fx import Node


class ScalarRecorder(Protocol):
    """Who records what is done to a traced number."""

    def scalar(
        self, function: Callable[..., Any], args: tuple[Any, ...], value: Any
    ) -> Any:
        """Record a call on numbers; return its value, traced where it is a number."""
        ...

    def specialize(self, kind: str, value: object, source: object = None) -> None:
        """Note that a value was fixed at the line which runs now.

        Args:
            kind: see `recorder.Specialization`.
            value: the value.
            source: the traced number that was looked at, if it was one.
        """
        ...

    def number(self, function: Callable[..., Any], source: Any, value: Any) -> None:
        """Note that a traced number became the plain number ``function(source)``."""
        ...


class TracedInt(int):
    """An integer with its node, such as one dimension of a traced tensor."""

    node: Node
    recorder: ScalarRecorder

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedInt:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (plain(self),)

    __hash__ = int.__hash__


class TracedFloat(float):
    """A float with its node, such as ``head_dim ** -0.5``."""

    node: Node
    recorder: ScalarRecorder

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedFloat:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return float, (plain(self),)

    __hash__ = float.__hash__


def traced(value: Any, node: Node, recorder: ScalarRecorder) -> Any:
    """A number that carries its node; anything else (a bool, too) as it is."""
    kinds: dict[type, Any] = {
        int: TracedInt,
        TracedInt: TracedInt,
        float: TracedFloat,
        TracedFloat: TracedFloat,
    }
    kind = kinds.get(type(value))
    if kind is None:
        return value
    made = kind(plain(value))
    made.node, made.recorder = node, recorder
    return made


def plain(value: Any) -> Any:
    """The number without its node; anything else as it is."""
    if isinstance(value, TracedInt):
        return int.__int__(value)
    if isinstance(value, TracedFloat):
        return float.__float__(value)
    return value


_BINARY = ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow")
_BITWISE = ("and", "or", "xor", "lshift", "rshift")


def _arithmetic(name: str, reflected: bool) -> Callable[..., Any]:
    kinds: Any = int if name in _BITWISE else (int, float)
    function = getattr(operator, name, None) or getattr(operator, f"{name}_")

    def recorded(self: Any, other: Any, *modulus: Any) -> Any:
        if modulus or not isinstance(other, kinds):
            return NotImplemented
        args = (other, self) if reflected else (self, other)
        return self.recorder.scalar(function, args, function(*map(plain, args)))

    return recorded


def _unary(function: Callable[..., Any]) -> Callable[..., Any]:
    def recorded(self: Any, *digits: Any) -> Any:
        value = function(plain(self), *digits)
        return self.recorder.scalar(function, (self, *digits), value)

    return recorded


def _compared(method: str, base: type) -> Callable[..., Any]:
    compute = getattr(base, method)

    def recorded(self: Any, *others: Any) -> Any:
        value = compute(plain(self), *map(plain, others))
        if value is not NotImplemented:
            self.recorder.specialize("branch", value, self)
        return value

    return recorded


def _fixed(function: Callable[..., Any]) -> Callable[..., Any]:
    def recorded(self: Any) -> Any:
        value = function(plain(self))
        self.recorder.number(function, self, value)
        return value

    return recorded


def _divmod(self: Any, other: Any) -> Any:
    return self // other, self % other


_COMPARED = ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__", "__bool__")


def _equip(kind: type, base: type) -> None:
    """Give a traced number its recorded arithmetic."""
    for name in (*_BINARY, *(_BITWISE if base is int else ())):
        setattr(kind, f"__{name}__", _arithmetic(name, False))
        setattr(kind, f"__r{name}__", _arithmetic(name, True))
    kind.__divmod__ = _divmod
    for name in ("neg", "abs", "pos"):
        setattr(kind, f"__{name}__", _unary(getattr(operator, name)))
    for method, function in (
        ("__floor__", math.floor),
        ("__ceil__", math.ceil),
        ("__round__", round),
    ):
        setattr(kind, method, _unary(function))
    for method in _COMPARED:
        setattr(kind, method, _compared(method, base))
    for method, function in (
        ("__int__", int),
        ("__trunc__", math.trunc),
        ("__float__", float),
    ):
        setattr(kind, method, _fixed(function))


_equip(TracedInt, int)
_equip(TracedFloat, float)
