"""The random generators that models use beside torch's: Python's own, and NumPy's."""

from __future__ import annotations

import random
import sys
from typing import Any, NamedTuple


class ForeignState(NamedTuple):
    """Equal to another one unless somebody drew a number in between.

    Attributes:
        python: what `random.getstate` returns.
        numpy: the legacy state of NumPy, its keys as bytes; empty where NumPy was not
            loaded.
    """

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]


def foreign_state() -> ForeignState:
    """The state of both generators now."""
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return ForeignState(random.getstate(), ())
    name, keys, *rest = numpy.random.get_state()
    return ForeignState(random.getstate(), (name, keys.tobytes(), *rest))


def restore_foreign_state(state: ForeignState) -> None:
    """Go back to a state; NumPy keeps its own where it was loaded only since."""
    random.setstate(state.python)
    if state.numpy:
        numpy: Any = sys.modules["numpy"]
        name, keys, *rest = state.numpy
        numpy.random.set_state((name, numpy.frombuffer(keys, numpy.uint32), *rest))
