"""Functions that look at data, which a graph calls as they are.

``if x.max() > 0`` or a loop over detected boxes takes the way of the example when its
calls are recorded one by one. Where a function of a module (``def f(x)`` at the top of
a file) does so, the graph can call that function instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from types import FrameType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gdnsq_fx.capture.location import is_ours, is_torch

PLAIN = (Tensor, int, float, str, torch.dtype, torch.device, type(None))
Function = Callable[..., Any]


class Reader(NamedTuple):
    """A function that read data, and a place where code finds it under a name.

    Attributes:
        function: defined at the top of an importable module.
        namespace: globals of that module, or of the caller's.
        name: its name there.
    """

    function: Function
    namespace: dict[str, Any]
    name: str


def readers_above() -> list[Reader]:
    """The outermost function between the code that runs and its ``nn.Module``.

    Inner ones are part of it: a loop over data may stand around them.
    """
    # Where the recorder was called from is the first frame of somebody else.
    frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None and (is_ours(frame) or is_torch(frame)):
        frame = frame.f_back
    found: list[Reader] = []
    while frame is not None and not is_ours(frame):
        function = None if is_torch(frame) else _function_of(frame)
        if function is not None:
            spaces = [function.__globals__]
            if frame.f_back is not None:
                spaces.append(frame.f_back.f_globals)
            found = [
                Reader(function, space, name)
                for space in {id(s): s for s in spaces}.values()
                for name, value in space.items()
                if value is function
            ]
        frame = frame.f_back
    return found


@contextmanager
def replaced(
    readers: Iterable[Reader], by: Callable[[Function], Function]
) -> Generator[None]:
    """Other functions stand under the names of the readers for the time of the block.

    Args:
        readers: which names.
        by: makes the replacement of a function.
    """
    every = list(readers)
    try:
        for one in every:
            one.namespace[one.name] = by(one.function)
        yield
    finally:
        for one in every:
            one.namespace[one.name] = one.function


def is_self_contained(args: object) -> bool:
    """Whether arguments are tensors and plain values, which a graph keeps as they are.

    An object such as a configuration would be built anew for the call, without what
    was set on it later.
    """
    return all(isinstance(leaf, PLAIN) for leaf in tree_leaves(args))


def _function_of(frame: FrameType) -> FunctionType | None:
    """The function that a frame runs, if a graph's code can name it."""
    name = frame.f_code.co_name
    function = frame.f_globals.get(name)
    if not isinstance(function, FunctionType) or function.__code__ is not frame.f_code:
        return None
    module = sys.modules.get(function.__module__)
    is_named = function.__module__ != "__main__" and (
        getattr(module, function.__name__, None) is function
    )
    return function if is_named and not _may_return_none(function) else None


def _may_return_none(function: FunctionType) -> bool:
    """Whether it says that on other data it hands out nothing, which code asks for."""
    said = function.__annotations__.get("return", "")
    return "None" in str(said) or "Optional" in str(said)
