"""How the graphs inside opaque modules are called while the whole model runs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch.fx import GraphModule

from gdnsq_fx.state import cloned

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Calls = dict[GraphModule, list[Arguments]]


@contextmanager
def calls_of(graphs: Iterable[GraphModule]) -> Generator[Calls]:
    """Note the arguments of every call of the graphs within the block."""
    calls: Calls = {graph: [] for graph in graphs}

    def note(graph: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[graph].append(cloned((args, kwargs)))

    handles = [g.register_forward_pre_hook(note, with_kwargs=True) for g in calls]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def run_by(
    graphs: Iterable[GraphModule],
    run: Callable[[GraphModule, tuple[Any, ...], dict[str, Any]], Any],
) -> Generator[None]:
    """Let a function compute what the graphs compute, within the block."""
    with ExitStack() as stack:
        for graph in graphs:

            def forward(*args: Any, _graph: GraphModule = graph, **kwargs: Any) -> Any:
                return run(_graph, args, kwargs)

            # On the instance: torch keeps the code of a graph in its own class.
            stack.enter_context(mock.patch.object(graph, "forward", forward))
        yield
