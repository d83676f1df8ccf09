"""Run a model while a `Recorder` watches, and decide what stays a module."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from gdnsq_fx.capture.buffers import write_back_buffers
from gdnsq_fx.capture.closing import Call, Closing, Start
from gdnsq_fx.capture.data_readers import Function, is_self_contained, watched_calls
from gdnsq_fx.capture.entry import Entry
from gdnsq_fx.capture.helpers import AppliedFunction, add_helper
from gdnsq_fx.capture.leaves import (
    has_backward_hooks,
    is_bare,
    is_like_input,
    stays_whole,
)
from gdnsq_fx.capture.ledger import Mark, NeedsRealValues
from gdnsq_fx.capture.python_functions import recorded_builtins
from gdnsq_fx.capture.recorder import Recorder
from gdnsq_fx.capture.scalars import plain
from gdnsq_fx.capture.sequences import join_whole_sequences
from gdnsq_fx.capture.trace import Trace
from gdnsq_fx.capture.values import Untraceable
from gdnsq_fx.foreign_random import foreign_state, restore_foreign_state
from gdnsq_fx.opinfo import OpTable
from gdnsq_fx.state import preserved_state


class Tracer:
    """One recording: the entry, and what happens at each call of a module.

    Args:
        root: the model.
        recorder: writes down calls of torch functions.
        table: which operations must not be hidden in a module.
        kept: paths of modules that are not to be looked into -> why.
        functions: functions that stay one call where that is possible.
    """

    def __init__(
        self,
        root: nn.Module,
        recorder: Recorder,
        table: OpTable,
        kept: Mapping[str, str],
        functions: Iterable[Function] = (),
    ) -> None:
        self.root = root
        self.recorder = recorder
        self.table = table
        self.kept = kept
        self.functions = tuple(functions)
        self.closing = Closing(root, recorder, table)
        self.drawing: list[str] = []
        self.paths = {id(m): path for path, m in root.named_modules()}
        self.buffers = dict(root.named_buffers(remove_duplicate=False))
        self.opaque: dict[str, str] = {}
        self.call_module = nn.Module.__call__
        self.apply = inspect.getattr_static(torch.autograd.Function, "apply")

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
        recorder = self.recorder
        with ExitStack() as stack:
            stack.enter_context(preserved_state(self.root))
            torch.manual_seed(0)
            stack.enter_context(torch.enable_grad())
            if recorder.fake is not None:
                stack.enter_context(recorder.fake)
            entry = Entry(recorder)
            args, kwargs = entry.bind(self.root.forward, args, kwargs)
            stack.enter_context(self._watched())
            stack.enter_context(recorder)
            output = self.root(*args, **kwargs)
            write_back_buffers(self.root, self.buffers, recorder.ledger)
            if recorder.ledger.needs_real:
                raise NeedsRealValues
            graph = recorder.finish(output)
        join_whole_sequences(graph, recorder.ledger.disposable)
        entry.follow_device(graph)
        return Trace(
            graph,
            tuple(dict.fromkeys(recorder.specialized.found)),
            self.opaque,
            recorder.ledger.constants,
            recorder.fake is None,
            {node: plain(value) for node, value in recorder.ledger.numbers.items()},
            recorder.ledger.disposable,
            frozenset(recorder.specialized.modules),
            frozenset(self.drawing),
            self.root.training,
        )

    # --- modules -----------------------------------------------------------------

    @contextmanager
    def _watched(self) -> Generator[None]:
        """Every call of a module or autograd function comes by here meanwhile."""
        tracer = self

        def call_module(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            return tracer._module(module, args, kwargs)

        def apply(function: Any, /, *args: Any, **kwargs: Any) -> Any:
            return tracer._function(function, args, kwargs)

        with (
            mock.patch.object(nn.Module, "__call__", call_module),
            mock.patch.object(torch.autograd.Function, "apply", classmethod(apply)),
            recorded_builtins(self.recorder),
            watched_calls(self.functions, self._function_begins, self._function_ends),
        ):
            yield

    def _module(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.paths.get(id(module))
        if self.recorder.hidden or path is None:  # within a leaf, or made in forward
            return self.call_module(module, *args, **kwargs)
        scopes = self.recorder.ledger.scopes
        key = path
        while key in scopes:
            key += "'"
        scopes[key] = path, type(module)
        try:
            return self._entered(module, path, args, kwargs)
        finally:
            scopes.pop(key, None)

    def _entered(
        self,
        module: nn.Module,
        path: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if path and (stays_whole(module) or self._is_layer(module)):
            return self._whole(module, path, args, kwargs)
        reason = "has backward hooks" if has_backward_hooks(module) else None
        reason = self.kept.get(path, reason)
        start = self.closing.start((args, kwargs))
        if path and reason is not None:
            drawn = torch.get_rng_state(), foreign_state()
            try:
                output = self._whole(module, path, args, kwargs)
                self.opaque[path] = reason
                return output
            except Untraceable:
                # It returns what no node can stand for, so it must be looked into.
                if path not in self.kept:
                    raise
                self.recorder.ledger.undo(start.mark)
                torch.set_rng_state(drawn[0])
                restore_foreign_state(drawn[1])
        try:
            output = self._called(module, path, args, kwargs)
        except Exception as error:
            if not path or self.recorder.ledger.needs_real:
                raise
            return self._opaque(module, path, start.mark, args, kwargs, error)
        if path and is_bare(module) and self.closing.is_possible(start.mark, output):
            return self.closing.close(
                Call("call_module", path, args, kwargs), start, output
            )
        return output

    def _called(
        self,
        module: nn.Module,
        path: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call a module that is looked into; note where its own code draws numbers."""
        known, state = len(self.drawing), foreign_state()
        output = self.call_module(module, *args, **kwargs)
        if len(self.drawing) == known and foreign_state() != state:
            self.drawing.append(path)
        return output

    def _is_layer(self, module: nn.Module) -> bool:
        """A module of the user's with a row of its own, which says how to open it."""
        if type(module).__module__.startswith("torch.nn."):
            return False
        row = self.table.find_module(module)
        return row is not None and type(module) in row.modules

    def _whole(
        self,
        module: nn.Module,
        path: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The call of a module as one node."""
        recorder = self.recorder
        before = recorder.ledger.versions((args, kwargs))

        def run(*args: Any, **kwargs: Any) -> Any:
            return self.call_module(module, *args, **kwargs)

        if recorder.fake is not None and is_like_input(module) and len(args) == 1:
            run = torch.empty_like
        output = recorder.compute(run, args, kwargs)
        node = recorder.ledger.call_node("call_module", path, args, kwargs)
        return recorder.ledger.track(output, node, before)

    def _opaque(
        self,
        module: nn.Module,
        path: str,
        mark: Mark,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        error: Exception,
    ) -> Any:
        """What cannot be looked into stays a module, with the reason."""
        self.recorder.ledger.undo(mark)
        try:
            output = self._whole(module, path, args, kwargs)
        except Untraceable as why:
            raise why from error
        self.opaque[path] = f"{type(error).__name__}: {error}"
        return output

    def _function(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A custom autograd function stays one call, so that its backward is kept."""
        if self.recorder.hidden:
            return self.apply.__get__(None, function)(*args, **kwargs)
        recorder = self.recorder
        before = recorder.ledger.versions((args, kwargs))

        def run(*args: Any, **kwargs: Any) -> Any:
            return self.apply.__get__(None, function)(*args, **kwargs)

        output = recorder.compute(run, args, kwargs)
        name = f"{function.__module__}.{function.__qualname__}"
        helper = add_helper(self.root, name, AppliedFunction(function))
        node = recorder.ledger.call_node("call_module", helper, args, kwargs)
        return recorder.ledger.track(output, node, before)

    # --- functions that read data --------------------------------------------------

    def _function_begins(
        self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Call, Start] | None:
        """What must be known when it ends to make one call of it; None: leave it."""
        if self.recorder.hidden or not is_self_contained((args, kwargs)):
            return None
        call = Call("call_function", function, args, kwargs)
        return call, self.closing.start((args, kwargs))

    def _function_ends(self, begun: tuple[Call, Start], output: Any) -> None:
        """Make one call of a function that has read data.

        It is opened nevertheless where it holds something to quantize, or hands out
        what is no tensor: then the way that the model takes hangs on the example.
        """
        call, start = begun
        notes = self.recorder.specialized.found[start.notes :]
        reads = any(note.kind == "data" for note in notes)
        if reads and self.closing.is_possible(start.mark, output):
            self.closing.close(call, start, output)
