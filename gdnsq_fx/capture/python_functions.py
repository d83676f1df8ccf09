"""``len``, ``min`` and ``max`` of traced values, recorded instead of fixed.

Python turns what ``__len__`` returns into a plain number, and ``min`` asks only which
of two is smaller, so neither can be seen from a value. While a model is recorded these
three names of Python's ``builtins`` therefore stand for functions that ask first.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from gdnsq_fx.capture.scalars import ScalarRecorder, TracedFloat, TracedInt, plain

_LEN, _MIN, _MAX = len, min, max
_NUMBERS = frozenset({int, float, TracedInt, TracedFloat})


@contextmanager
def recorded_builtins(recorder: ScalarRecorder) -> Generator[None]:
    """``len``, ``min`` and ``max`` become nodes for the time of the block.

    ``len(x)`` of a tensor is its first size; ``min`` and ``max`` are recorded where
    they choose among numbers one of which is traced. Other uses are left to Python.

    Args:
        recorder: records the calls.
    """
    replaced = {
        "len": _length,
        "min": _extreme(_MIN, recorder),
        "max": _extreme(_MAX, recorder),
    }
    with ExitStack() as stack:
        for name, function in replaced.items():
            stack.enter_context(mock.patch.object(builtins, name, function))
        yield


def _length(value: Any, /) -> int:
    # Torch functions are watched already, and ``size`` is one.
    is_sized = isinstance(value, Tensor) and value.dim() > 0
    return value.size(0) if is_sized else _LEN(value)


def _extreme(function: Callable[..., Any], recorder: ScalarRecorder) -> Any:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        given: Any = args[0] if _LEN(args) == 1 else args
        if kwargs or not isinstance(given, tuple | list) or _LEN(given) < 2:
            return function(*args, **kwargs)
        kinds = {type(item) for item in given}
        if not kinds <= _NUMBERS or kinds <= {int, float}:
            return function(*args)
        return recorder.scalar(function, tuple(given), function(map(plain, given)))

    return recorded
