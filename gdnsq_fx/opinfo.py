"""What a row of the op table says of an operation, and the table that finds rows.

A row (`OpInfo`) gathers all spellings of an operation (module class, function, tensor
method), the names of its arguments in order, what each tensor argument is (`Role`), how
its weight is laid out, how many multiply-accumulates (MACs) it takes, what it does to
the values (`Kind`), and what its output may be (never negative, or so whenever its
inputs are).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import nn
from torch.fx import Node

from gdnsq_fx.channels import PER_TENSOR, ChannelLayout
from gdnsq_fx.errors import ConfigError
from gdnsq_fx.opcheck import check_row
from gdnsq_fx.operands import Call, Operand, Role, Shape

Roles = Role | Callable[[Mapping[str, Any]], Sequence[Role]]
Sign = Literal["any", "nonnegative", "inherits"]
Kind = Literal["plain", "view", "join", "concat", "elementwise", "float"]


@dataclass(frozen=True)
class OpInfo:
    """One row: an operation and all that passes need to know about it.

    Attributes:
        name: name in patterns (``op:NAME``) and reports.
        parameters: argument names of the function spelling, in order; ``"*operands"``
            takes all that follow, or the one list that stands there.
        roles: argument name -> role, for tensor arguments that matter; for a list with
            several roles ``(bound arguments) -> the role of each item``.
        modules, functions, methods: the spellings.
        macs: ``(arguments, output shape) -> MACs`` for the whole batch; the arguments
            have the shape in the place of each tensor. None for operations that do not
            multiply and accumulate. The inputs of those that do are quantized.
        inner_macs: as ``macs``, those of them with an operand that is on no edge of
            the graph, and so stays in floating point.
        inner: what that operand is, for the report.
        layout: where the output channels of a weight lie, or ``(bound arguments,
            operand) -> ChannelLayout``; None for one scale for the whole weight.
        open: ``(module, bound arguments) -> Call``: how a module reads as a function
            call on explicit tensors; None where the module has no weights.
        refusal: ``(bound arguments) -> reason`` why a call cannot be quantized, None
            where it can.
        order: ``(target, positional arguments) -> argument names`` where a spelling has
            another order than ``parameters``, else None.
        when: ``(positional arguments) -> bool``: the row holds for such calls only.
        aliases: other names that some spelling has for an argument.
        inputs: argument names of a module's ``forward``, in order; by default those of
            ``parameters`` that are no weight.
        linear: the operation without its bias is linear in each weight.
        channel_dim: dimension of the output that counts output channels; None where
            the channels of its weight are not those of its output.
        boundary: this kind counts as a network's ``first`` or ``last`` layer.
        sign: what the output's sign is known to be.
        kind: what it does to values, where it does not multiply and accumulate:
            ``view`` moves, picks or repeats elements; ``concat`` puts its inputs side
            by side and ``join`` combines them, both on one common grid; ``elementwise``
            reads inputs on grids of their own; ``float`` computes in floating point,
            along with the joins that only feed it; ``plain`` is none of these. Only
            the scope ``full`` asks (see `QuantConfig`).

    Raises:
        ConfigError: the row contradicts itself.
    """

    name: str
    parameters: tuple[str, ...]
    roles: Mapping[str, Roles] = field(default_factory=dict[str, Roles])
    modules: tuple[type[nn.Module], ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()
    macs: Callable[[Mapping[str, Any], Shape], int] | None = None
    inner_macs: Callable[[Mapping[str, Any], Shape], int] | None = None
    inner: str = ""
    layout: (
        ChannelLayout | Callable[[Mapping[str, Any], Operand], ChannelLayout] | None
    ) = None
    open: Callable[[nn.Module, Mapping[str, Any]], Call] | None = None
    refusal: Callable[[Mapping[str, Any]], str | None] | None = None
    order: Callable[[object, Sequence[Any]], Sequence[str] | None] | None = None
    when: Callable[[Sequence[Any]], bool] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    inputs: tuple[str, ...] | None = None
    linear: bool = True
    channel_dim: int | None = 1
    boundary: Literal["first", "last"] | None = None
    sign: Sign = "any"
    kind: Kind = "plain"

    def __post_init__(self) -> None:
        check_row(self)

    @property
    def is_compute(self) -> bool:
        """Whether it multiplies and accumulates, so that its inputs are quantized."""
        return self.macs is not None

    @property
    def may_alias(self) -> bool:
        """Whether the output may share its memory with the first input."""
        return self.sign == "inherits" and self.kind in ("plain", "view")

    def bind(self, node: Node) -> dict[str, Any]:
        """Arguments of a call node by name; a module call binds its inputs only."""
        if node.op == "call_module":
            return self.named(node.args, node.kwargs, self._module_inputs())
        return self.named(node.args, node.kwargs, target=node.target)

    def named(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        names: Sequence[str] | None = None,
        target: object = None,
    ) -> dict[str, Any]:
        """Positional and keyword arguments under their names in this row."""
        names = names if names is not None else self._names(target, args)
        given = {self.aliases.get(name, name): value for name, value in kwargs.items()}
        bound: dict[str, Any] = {}
        for position, name in enumerate(names[: len(args)]):
            value = args[position]
            if name.startswith("*") and not _is_list(value):
                value = tuple(args[position:])
            bound[name.removeprefix("*")] = value
        return {**bound, **given}

    def operands(self, bound: Mapping[str, Any]) -> tuple[Operand, ...]:
        """The tensors among bound arguments, each with its role."""
        found: list[Operand] = []
        for argument, roles in self.roles.items():
            value = bound.get(argument)
            items = cast(Sequence[Any], value) if _is_list(value) else None
            if items is None:
                role = roles(bound)[0] if callable(roles) else roles
                found.append(Operand(argument, None, role, value))
                continue
            each: Sequence[Role] = (
                roles(bound) if callable(roles) else (roles,) * len(items)
            )
            found += [
                Operand(argument, index, role, item)
                for index, (role, item) in enumerate(zip(each, items, strict=True))
            ]
        return tuple(found)

    def layout_of(self, bound: Mapping[str, Any], operand: Operand) -> ChannelLayout:
        """Where the output channels of one weight lie."""
        if callable(self.layout):
            return self.layout(bound, operand)
        return self.layout or PER_TENSOR

    def replaced(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        name: str,
        value: Any,
        *,
        index: int | None = None,
        target: object = None,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with one of them, or one item of it, set wherever it stands."""
        names = self._names(target, args)
        if index is not None:
            items = list(self.named(args, kwargs, names)[name])
            items[index] = value
            value = items
        if f"*{name}" in names and f"*{name}" not in names[len(args) :]:
            position = names.index(f"*{name}")
            spread = not _is_list(args[position])
            return (*args[:position], *(value if spread else [value])), dict(kwargs)
        position = names.index(name) if name in names else len(args)
        if position < len(args):
            if index is not None and isinstance(args[position], tuple):
                value = tuple(value)
            return (*args[:position], value, *args[position + 1 :]), dict(kwargs)
        spelled = next((k for k in kwargs if self.aliases.get(k, k) == name), name)
        return tuple(args), {**kwargs, spelled: value}

    def with_argument(
        self, node: Node, name: str, value: Any, index: int | None = None
    ) -> None:
        """Set one named argument (or one item of it) of a function or method call."""
        node.args, node.kwargs = self.replaced(
            node.args, node.kwargs, name, value, index=index, target=node.target
        )

    def _names(self, target: object, args: Sequence[Any]) -> Sequence[str]:
        other = self.order(target, args) if self.order is not None else None
        return self.parameters if other is None else other

    def _module_inputs(self) -> Sequence[str]:
        if self.inputs is not None:
            return self.inputs
        return [n for n in self.parameters if self.roles.get(n) != "weight"]


class OpTable:
    """Rows by spelling. Immutable: `with_rows` returns an extended table."""

    def __init__(self, rows: Sequence[OpInfo]) -> None:
        wrong = [row for row in rows if not isinstance(row, cast(Any, OpInfo))]
        if wrong:
            raise ConfigError(
                f"{wrong[0]!r} is no row of an op table; write "
                "gdnsq_fx.DEFAULT_TABLE.with_rows(gdnsq_fx.OpInfo(...))"
            )
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
        row: OpInfo | None = None
        if node.op == "call_function":
            row = self._functions.get(node.target)  # type: ignore[arg-type]
        elif node.op == "call_method":
            row = self._methods.get(str(node.target))
        elif node.op == "call_module":
            row = self.find_module(owner.get_submodule(str(node.target)))
        if row is not None and row.when is not None and not row.when(node.args):
            return None
        return row

    def find_module(self, module: nn.Module) -> OpInfo | None:
        """The row of a module: its class, or a base whose ``forward`` it keeps.

        A subclass with a ``forward`` of its own may compute anything, so it has no row.
        """
        for base in type(module).__mro__:
            row = self._modules.get(base)
            if row is not None:
                return row if type(module).forward is base.forward else None
        return None


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)
