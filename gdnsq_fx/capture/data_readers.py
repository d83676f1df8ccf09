"""Functions that look at data, which a graph calls as they are.

``if x.max() > 0`` or a loop over detected boxes takes the way of the example when its
calls are recorded one by one. Where a function of a module (``def f(x)`` at the top of
a file) does so, the graph can call that function instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from inspect import CO_VARARGS, CO_VARKEYWORDS
from types import CodeType, FrameType, FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gdnsq_fx.capture.location import is_ours, is_torch

PLAIN = (Tensor, int, float, str, torch.dtype, torch.device, type(None))
Function = Callable[..., Any]
Begun = TypeVar("Begun")


def reader_above() -> FunctionType | None:
    """The outermost function between the code that runs and its ``nn.Module``.

    Inner ones are part of it: a loop over data may stand around them.
    """
    # Where the recorder was called from is the first frame of somebody else.
    frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None and (is_ours(frame) or is_torch(frame)):
        frame = frame.f_back
    found: FunctionType | None = None
    while frame is not None and not is_ours(frame):
        function = None if is_torch(frame) else _function_of(frame)
        found = found if function is None else function
        frame = frame.f_back
    return found


@contextmanager
def watched_calls(
    functions: Iterable[Function],
    begins: Callable[[Function, tuple[Any, ...], dict[str, Any]], Begun | None],
    ends: Callable[[Begun, Any], None],
) -> Generator[None]:
    """See each call of some functions from its begin to its end.

    Python's profiling hook tells both, so that nobody's function is replaced. While
    another profiler runs there is no room for ours, and the functions are recorded
    call by call.

    Args:
        functions: which.
        begins: gets the function and its arguments; what it returns, unless None,
            ``ends`` gets together with the function's result (None where it raised).
    """
    by_code: dict[CodeType, Function] = {f.__code__: f for f in functions}
    if not by_code or sys.getprofile() is not None:
        yield
        return
    open_calls: list[tuple[FrameType, Begun]] = []

    def profile(frame: FrameType, event: str, value: Any) -> None:
        function = by_code.get(frame.f_code)
        if function is None:
            return
        if event == "call":
            begun = begins(function, *_arguments(frame))
            if begun is not None:
                open_calls.append((frame, begun))
        elif event == "return" and open_calls and open_calls[-1][0] is frame:
            ends(open_calls.pop()[1], value)

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


def is_self_contained(args: object) -> bool:
    """Whether arguments are tensors and plain values, which a graph keeps as they are.

    An object such as a configuration would be built anew for the call, without what
    was set on it later.
    """
    return all(isinstance(leaf, PLAIN) for leaf in tree_leaves(args))


def _arguments(frame: FrameType) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a function that has just begun was called with, defaults filled in."""
    code, values = frame.f_code, frame.f_locals
    names = code.co_varnames
    rest = code.co_argcount + code.co_kwonlyargcount
    args = tuple(values[name] for name in names[: code.co_argcount])
    kwargs = {name: values[name] for name in names[code.co_argcount : rest]}
    if code.co_flags & CO_VARARGS:
        args += values[names[rest]]
        rest += 1
    if code.co_flags & CO_VARKEYWORDS:
        kwargs |= values[names[rest]]
    return args, kwargs


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
