"""What a row of the op table says of an operation, and the table that finds rows.

A row (`OpInfo`) gathers all spellings of an operation (module class, function, tensor
method), the names of its arguments in order, what each tensor argument is (`Role`), how
its weight is laid out, how many multiply-accumulates (MACs) it takes, and what its
output may be (never negative, or so whenever its inputs are).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.fx import Node

Role = Literal["activation", "weight", "bias"]
Sign = Literal["any", "nonnegative", "inherits"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class ChannelLayout:
    """Where the output channels of a weight lie.

    Attributes:
        axis: dimension that counts output channels (of one group); None: one scale for
            the whole tensor.
        groups: number of groups along dimension 0. Only a grouped transposed
            convolution needs it: its weight is ``[in, out / groups, *kernel]``, so
            channel ``g * out / groups + c`` is ``weight[in of g, c]``.
    """

    axis: int | None
    groups: int = 1

    def grouped(self, weight: Tensor) -> Tensor:
        """The weight viewed as ``[groups, dim0 / groups, ...]`` where groups > 1."""
        return weight if self.groups == 1 else weight.unflatten(0, (self.groups, -1))

    def reduced_dims(self, ndim: int) -> tuple[int, ...]:
        """Dimensions of ``grouped(weight)`` that share one scale."""
        if self.axis is None:
            return tuple(range(ndim + (self.groups > 1)))
        kept = {self.axis} if self.groups == 1 else {0, self.axis + 1}
        return tuple(d for d in range(ndim + (self.groups > 1)) if d not in kept)

    def expanded(self, scale: Tensor, weight_shape: Sequence[int]) -> Tensor:
        """A scale shaped for ``grouped`` made broadcastable to the plain weight."""
        if self.groups == 1 or self.axis is None:
            return (
                scale.reshape([1] * len(weight_shape)) if self.axis is None else scale
            )
        per_group = weight_shape[0] // self.groups
        return scale.squeeze(1).repeat_interleave(per_group, dim=0)


PER_TENSOR = ChannelLayout(axis=None)


@dataclass(frozen=True)
class OpenedCall:
    """How a module reads as a function call on explicit tensors.

    Attributes:
        function: the function to call.
        settings: its arguments other than input, weight and bias.
        pad: `F.pad` sizes to apply to the input first (non-zero padding modes).
        pad_mode: mode of that padding.
    """

    function: Callable[..., Any]
    settings: Mapping[str, Any]
    pad: tuple[int, ...] = ()
    pad_mode: str = "constant"


@dataclass(frozen=True)
class OpInfo:
    """One row: an operation and all that passes need to know about it.

    Attributes:
        name: name in patterns (``op:NAME``) and reports.
        parameters: argument names of the function spelling, in order.
        roles: argument name -> role, for tensor arguments that matter.
        modules, functions, methods: the spellings.
        macs: ``(argument shapes, output shape) -> MACs`` for the whole batch; None for
            operations that do not multiply and accumulate.
        layout: ``(bound arguments) -> ChannelLayout`` of the weight.
        open: ``(module) -> OpenedCall``; None where the module has no weights.
        aliases: other names that some spelling has for an argument.
        channel_dim: dimension of the output that counts output channels.
        boundary: this kind counts as a network's ``first`` or ``last`` layer.
        sign: what the output's sign is known to be.
    """

    name: str
    parameters: tuple[str, ...]
    roles: Mapping[str, Role] = field(default_factory=dict[str, Role])
    modules: tuple[type[nn.Module], ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()
    macs: Callable[[Mapping[str, Shape], Shape], int] | None = None
    layout: Callable[[Mapping[str, Any]], ChannelLayout] | None = None
    open: Callable[[nn.Module], OpenedCall] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    channel_dim: int = 1
    boundary: Literal["first", "last"] | None = None
    sign: Sign = "any"

    @property
    def is_compute(self) -> bool:
        """Whether it multiplies and accumulates, so that its inputs are quantized."""
        return self.macs is not None

    def bind(self, node: Node) -> dict[str, Any]:
        """Arguments of a call node by name; a module call binds its inputs only."""
        names = self.parameters
        if node.op == "call_module":
            names = tuple(n for n in names if self.roles.get(n) != "weight")
        return self.named(node.args, node.kwargs, names)

    def named(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        names: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Positional and keyword arguments under their names in this row."""
        given = {self.aliases.get(name, name): value for name, value in kwargs.items()}
        return {**dict(zip(names or self.parameters, args, strict=False)), **given}

    def replaced(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], name: str, value: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with one of them set, wherever it stands."""
        position = self.parameters.index(name)
        if position < len(args):
            return (*args[:position], value, *args[position + 1 :]), dict(kwargs)
        spelled = next((k for k in kwargs if self.aliases.get(k, k) == name), name)
        return tuple(args), {**kwargs, spelled: value}

    def with_argument(self, node: Node, name: str, value: Any) -> None:
        """Set one named argument of a call node, wherever it stands."""
        node.args, node.kwargs = self.replaced(node.args, node.kwargs, name, value)


class OpTable:
    """Rows by spelling. Immutable: `with_rows` returns an extended table."""

    def __init__(self, rows: Sequence[OpInfo]) -> None:
        self.rows = tuple(rows)
        self._modules = {m: row for row in self.rows for m in row.modules}
        self._functions = {f: row for row in self.rows for f in row.functions}
        self._methods = {m: row for row in self.rows for m in row.methods}

    def __repr__(self) -> str:
        return f"OpTable({', '.join(row.name for row in self.rows)})"

    def with_rows(self, *rows: OpInfo) -> OpTable:
        """This table and more rows; a later row wins where spellings meet."""
        return OpTable((*self.rows, *rows))

    def find(self, node: Node, owner: nn.Module) -> OpInfo | None:
        """The row of a node, or None where the table does not know it."""
        if node.op == "call_function":
            return self._functions.get(node.target)  # type: ignore[arg-type]
        if node.op == "call_method":
            return self._methods.get(str(node.target))
        if node.op == "call_module":
            return self.find_module(owner.get_submodule(str(node.target)))
        return None

    def find_module(self, module: nn.Module) -> OpInfo | None:
        """The row of a module: its class, or a base whose ``forward`` it keeps.

        A subclass with a ``forward`` of its own may compute anything, so it has no row.
        """
        for base in type(module).__mro__:
            row = self._modules.get(base)
            if row is not None:
                return row if type(module).forward is base.forward else None
        return None


_IN_PLACE = (
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.imatmul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.setitem,
)


def writes_in_place(node: Node) -> bool:
    """Whether a call node changes its first argument (``x.add_``, ``x += y``)."""
    owner = node.graph.owning_module
    if node.op == "call_module" and owner is not None:
        return bool(getattr(owner.get_submodule(str(node.target)), "inplace", False))
    if node.kwargs.get("inplace") is True or node.target in _IN_PLACE:
        return True
    name = str(getattr(node.target, "__name__", node.target))
    called = node.op in ("call_method", "call_function")
    return called and name.endswith("_") and not name.endswith("__")
