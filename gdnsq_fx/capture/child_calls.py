"""With which arguments the modules inside opaque ones are called."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from gdnsq_fx.state import cloned, preserved_state, without_fast_path

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_PLAIN = (Tensor, int, float, bool, str, type(None), torch.dtype, torch.device)


@dataclass
class Calls:
    """What was seen of the calls of one module.

    Attributes:
        example: arguments of the call with most elements.
        elements: their number.
        forms: structures, dtypes and plain values of the arguments of all calls.
    """

    example: Arguments
    elements: int
    forms: set[Any] = field(default_factory=set[Any])

    @property
    def refusal(self) -> str | None:
        """Why one graph cannot stand for all calls; None where it can."""
        if not all(isinstance(leaf, _PLAIN) for leaf in tree_leaves(self.example)):
            return "takes other arguments than tensors and plain values"
        if len(self.forms) > 1:
            return "is called with arguments of different kinds"
        return None


def calls_within(
    model: nn.Module, paths: Iterable[str], arguments: Arguments
) -> dict[str, Calls]:
    """Run the model once in each mode, and note the calls of modules at or below paths.

    No module is touched: calls are seen on the class, as the tracer sees them. The
    model's buffers, modes and random state are left as they were.

    Args:
        model: the model.
        paths: of the modules to watch, with all that they hold.
        arguments: the example input, ``(args, kwargs)``.

    Returns:
        Calls by path. What the model calls in evaluation is not looked for in training,
        in which the model may refuse the example.
    """
    roots = tuple(paths)
    watched = {
        id(module): path
        for path, module in model.named_modules()
        if any(path == root or path.startswith(f"{root}.") for root in roots)
    }
    found: dict[str, Calls] = {}
    for training in (False, True):
        before = set(found)
        seen: dict[str, Calls] = {}
        with preserved_state(model), torch.no_grad(), without_fast_path():
            model.train(training)
            torch.manual_seed(0)
            args, kwargs = cloned(arguments)
            with _watched(watched, seen):
                try:
                    model(*args, **kwargs)
                except Exception:
                    if not training:
                        raise
        found |= {path: calls for path, calls in seen.items() if path not in before}
    return found


@contextmanager
def _watched(paths: dict[int, str], seen: dict[str, Calls]) -> Generator[None]:
    call = nn.Module.__call__

    def watching(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        path = paths.get(id(module))
        if path is not None:
            _note(seen, path, (args, kwargs))
        return call(module, *args, **kwargs)

    with mock.patch.object(nn.Module, "__call__", watching):
        yield


def _note(seen: dict[str, Calls], path: str, arguments: Arguments) -> None:
    leaves, structure = tree_flatten(arguments)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    elements = sum(t.numel() for t in tensors)
    known = seen.get(path)
    if known is None:
        known = seen[path] = Calls(cloned(arguments), elements)
    elif elements > known.elements:
        known.example, known.elements = cloned(arguments), elements
    known.forms.add((str(structure), tuple(map(_form, leaves))))


def _form(leaf: Any) -> Any:
    """What a graph keeps as it is: all but the values of tensors and numbers."""
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.ndim
    if isinstance(leaf, int | float) and not isinstance(leaf, bool):
        return type(leaf)
    return repr(leaf) if isinstance(leaf, _PLAIN) else type(leaf)
