"""The row of an operation on one tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from gdnsq_fx.opinfo import Kind, OpInfo, Sign


def unary(
    name: str,
    modules: tuple[type[nn.Module], ...] = (),
    functions: tuple[Callable[..., Any], ...] = (),
    methods: tuple[str, ...] = (),
    *,
    sign: Sign = "any",
    kind: Kind = "plain",
    parameters: tuple[str, ...] = ("input",),
    when: Callable[[Sequence[Any]], bool] | None = None,
) -> OpInfo:
    """A row of an operation on one tensor."""
    return OpInfo(
        name,
        parameters,
        roles={"input": "activation"},
        modules=modules,
        functions=functions,
        methods=methods,
        sign=sign,
        kind=kind,
        when=when,
    )
