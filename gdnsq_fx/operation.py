"""`operation`: a function of the user's that a captured graph holds as one call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._pytree import tree_leaves

P = ParamSpec("P")
R = TypeVar("R")


def operation(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function one operation: a graph holds its call, not what it is made of.

    For a row of the op table, which names what this returns among its ``functions``.
    Called outside of a capture it is the function itself. The decorated function must
    be importable under its name, as graphs refer to functions by name.

    Args:
        function: a function of tensors, at the top level of a module.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        values = tree_leaves((args, kwargs))
        if has_torch_function(values):
            return handle_torch_function(call, values, *args, **kwargs)
        return function(*args, **kwargs)

    return call
