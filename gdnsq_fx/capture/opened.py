"""Fused functions that are opened, so that the products inside become nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType, MappingProxyType
from typing import Any

import torch.nn.functional as F


def _body_of(function: Any) -> Callable[..., Any]:
    """A function of torch whose own code runs, where it would hand itself over.

    ``multi_head_attention_forward`` first asks whether somebody overrides it. This twin
    shares its code and answers no, so that the linear layers, products and the softmax
    within are met one by one, just as the installed torch computes them.
    """
    scope = {**function.__globals__, "has_torch_function": _nobody_overrides}
    twin = FunctionType(
        function.__code__,
        scope,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _nobody_overrides(*_: Any) -> bool:
    return False


OPENED_FUNCTIONS: Mapping[Any, Callable[..., Any]] = MappingProxyType(
    {F.multi_head_attention_forward: _body_of(F.multi_head_attention_forward)}
)
