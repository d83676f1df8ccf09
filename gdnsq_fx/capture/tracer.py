"""A symbolic tracer with its own root entry and leaf rule."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Proxy, Tracer

from gdnsq_fx.capture.leaves import stays_whole


class ModelTracer(Tracer):
    """Traces ``forward`` as the example input calls it.

    Arguments that the example leaves out are not inputs of the graph: they are fixed to
    their defaults, so that ``if mask is None`` goes one way. Every node records the
    source line that made it.

    Args:
        args, kwargs: the example input.
    """

    record_stack_traces = True

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self._args = args
        self._kwargs = kwargs

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """See `stays_whole`."""
        return stays_whole(m, super().is_leaf_module(m, module_qualified_name))

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: Any = None,
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Placeholders for what the example gives, bound to the call of ``forward``."""
        del is_module, concrete_args
        signature = inspect.signature(root_fn)
        bound = signature.bind(self.root, *self._args, **self._kwargs)
        owner, *inputs = signature.parameters.values()
        for parameter in inputs:
            if parameter.name in bound.arguments:
                given = bound.arguments[parameter.name]
                bound.arguments[parameter.name] = self._placeholders(parameter, given)
        bound.arguments[owner.name] = self.root
        return lambda: root_fn(*bound.args, **bound.kwargs), []

    def _placeholders(self, parameter: inspect.Parameter, given: Any) -> Any:
        """One placeholder, or one for each item of ``*args`` and ``**kwargs``."""
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names = [f"{parameter.name}_{i}" for i in range(len(given))]
            return tuple(self._placeholder(name) for name in names)
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            return {name: self._placeholder(name) for name in given}
        return self._placeholder(parameter.name)

    def _placeholder(self, name: str) -> Proxy:
        # No default: the example gives it, and what it leaves out is no input at all.
        return self.create_proxy("placeholder", name, (), {})
