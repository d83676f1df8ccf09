"""Whether a row of the op table makes sense; messages say what to write instead."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from gdnsq_fx.errors import ConfigError

if TYPE_CHECKING:
    from gdnsq_fx.opinfo import OpInfo

_ROLES = ("activation", "weight", "bias", "other")
_SIGNS = ("any", "nonnegative", "inherits")
_KINDS = ("plain", "view", "join", "concat", "elementwise", "float")
_FORMULAS = ("macs", "inner_macs", "open", "refusal", "order", "when")


def check_row(row: OpInfo) -> None:
    """Refuse a row that contradicts itself.

    Raises:
        ConfigError: names the row, the cause and the remedy.
    """
    cause = _spelling(row) or _arguments(row) or _behaviour(row)
    if cause is not None:
        raise ConfigError(f"op table row {row.name!r}: {cause}")


def _spelling(row: Any) -> str | None:
    if not isinstance(row.name, str) or not row.name:
        return "its name must be a string that is not empty"
    for field in ("parameters", "modules", "functions", "methods"):
        if not isinstance(getattr(row, field), tuple):
            return (
                f"{field} must be a tuple, got {getattr(row, field)!r}; for one write "
                f"{field}=(...,)"
            )
    if not (row.modules or row.functions or row.methods):
        return (
            "no spelling; name the module class, function or tensor method that it "
            "stands for: modules=(MyLayer,), functions=(my_function,) or methods=(...)"
        )
    for module in row.modules:
        if not (inspect.isclass(module) and issubclass(module, nn.Module)):
            return f"modules holds {module!r}; give classes derived from nn.Module"
    for function in row.functions:
        if not callable(function) or inspect.isclass(function):
            return f"functions holds {function!r}; give functions"
    for method in row.methods:
        if not isinstance(method, str):
            return f"methods holds {method!r}; give names of tensor methods"
    return None


def _arguments(row: Any) -> str | None:
    names = [str(name).removeprefix("*") for name in row.parameters]
    for field, given in (
        ("roles", row.roles),
        ("aliases", row.aliases.values()),
    ):
        for name in given:
            if name not in names:
                return (
                    f"{field} names {name!r}, which is not among its parameters "
                    f"({', '.join(names) or 'none'}); parameters lists the arguments "
                    "of the function in order"
                )
    for name, role in row.roles.items():
        if role not in _ROLES and not callable(role):
            return f"role {role!r} of {name}; a role is one of {', '.join(_ROLES)}"
    return None


def _behaviour(row: Any) -> str | None:
    if row.sign not in _SIGNS:
        return f"sign {row.sign!r}; it is one of {', '.join(_SIGNS)}"
    if row.kind not in _KINDS:
        return f"kind {row.kind!r}; it is one of {', '.join(_KINDS)}"
    for field in _FORMULAS:
        given = getattr(row, field)
        if given is not None and not callable(given):
            return f"{field} must be a function, got {given!r}"
    held = [r for r in row.roles.values() if r in ("activation", "weight")]
    if row.macs is not None and not held and not any(map(callable, row.roles.values())):
        return (
            "macs says that its inputs are to be quantized, but no role says which; "
            'write roles={"input": "activation", "weight": "weight"}'
        )
    if row.macs is not None and row.kind != "plain":
        return f"both macs and kind={row.kind!r}; only rows without macs have a kind"
    if row.open is not None and not row.modules:
        return "open says how a module reads as a call, but modules is empty"
    if row.macs is None or not row.modules or row.functions:
        return None
    if row.open is None:
        return (
            "it stands for modules only, and open is missing; write open=lambda "
            'module, given: Call(function, (given["input"], Stored("weight"))) '
            "and name that function in functions"
        )
    return (
        "open makes calls of a function that the row does not name; write "
        "functions=(function,)"
    )
