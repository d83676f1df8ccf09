"""What a call reads, and calls that are yet to be put into a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["activation", "weight", "bias", "other"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A parameter or buffer of a module, by its attribute name."""

    name: str


@dataclass(frozen=True)
class Call:
    """A function call to put into a graph (see `OpInfo.open`).

    Attributes:
        function: the function to call.
        args, kwargs: nodes, constants, `Stored` parameters, and other calls.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Operand:
    """One tensor that a call reads.

    Attributes:
        argument: name of the argument.
        index: its place where the argument is a list of tensors, else None.
        role: what it is to the operation.
        value: what the call is given there.
    """

    argument: str
    index: int | None
    role: Role
    value: Any

    @property
    def name(self) -> str:
        """``weight``, or ``weights.1`` in a list."""
        return self.argument if self.index is None else f"{self.argument}.{self.index}"
