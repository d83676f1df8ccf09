"""Save a run every so many steps and on SIGTERM, and put it back where it stood."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from gdnsq_fx.training.checkpoint_folder import CheckpointFolder, Identity
from gdnsq_fx.training.process_group import ProcessGroup
from gdnsq_fx.training.random_state import random_state, set_random_state
from gdnsq_fx.training.stored_state import joined, under
from gdnsq_fx.training.termination import Termination

_OF_EACH_PROCESS = ("batches", "random")
"""Parts in which processes differ; all others are the same everywhere."""


class Resumable(Protocol):
    """A part of a run that goes on where its state was taken."""

    def state(self) -> dict[str, Tensor]:
        """Everything that later steps depend on; names have no meaning outside."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned."""
        ...


class Checkpointing:
    """Checkpoints of one run; without a folder it does nothing.

    Inside its ``with`` block SIGTERM waits for `save`. Of several processes the main
    one reads and writes; a signal to any of them ends all.

    Args:
        path: folder, or None.
        every: optimizer steps between two checkpoints.
        identity: of the run, called where there is a folder.
        group: the processes of the run.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        every: int,
        identity: Callable[[], Identity],
        group: ProcessGroup | None = None,
    ) -> None:
        self._group = group or ProcessGroup()
        self._enabled = path is not None
        self._folder: CheckpointFolder | None = None
        if path is not None:
            self._group.on_main(lambda: self._open(path, identity))
        self._every = every
        self._started = time.monotonic()
        self._termination = Termination()
        self._found: tuple[int, dict[str, Tensor]] | None = None

    def find(self, *, resume: bool) -> int:
        """Steps taken by the run that is to go on; 0 where one begins.

        Raises:
            CheckpointError: there is a checkpoint of another run.
        """
        if not self._enabled:
            return 0
        return self._group.on_main(lambda: self._find(resume=resume))

    def found(self, name: str) -> Tensor | None:
        """What the checkpoint holds by that name, in every process, until `restore`.

        For what a run must know before there are parts to be restored.
        """
        here = None if self._found is None else self._found[1].get(name)
        return self._group.from_main(here)

    @property
    def seconds(self) -> float:
        """Wall-clock time that the run has taken, all its sittings together."""
        return time.monotonic() - self._started

    def restore(self, parts: Mapping[str, Resumable]) -> None:
        """Put the parts, in their order, and the random state back, if any was found.

        Raises:
            CheckpointError: the training batches are fewer than they were.
        """
        found = {} if self._found is None else self._found[1]
        state = self._group.tensors_from_main(found)
        if not state:
            return
        own = {name: under(state, name) for name in (*parts, "random")}
        for name in _OF_EACH_PROCESS:
            own[name] = self._group.of_this_process(own.get(name, {}))
        for name, part in parts.items():
            part.load_state(own[name])
        self._started -= float(state["seconds"])
        set_random_state(own["random"])
        self._found = None  # as large as the model

    def is_due(self, done: int, *, last: bool) -> bool:
        """Whether the run is to be saved after ``done`` steps."""
        if not self._enabled:
            return False
        return last or done % self._every == 0 or self._is_terminated()

    def save(self, done: int, parts: Mapping[str, Resumable]) -> None:
        """Write a checkpoint, then let a SIGTERM that waited act."""
        states = {name: part.state() for name, part in parts.items()}
        states["random"] = random_state()
        for name in _OF_EACH_PROCESS:
            states[name] = self._group.of_every_process(states.get(name, {}))
        state = joined(states)
        state["seconds"] = torch.tensor(self.seconds, dtype=torch.float64)
        self._group.on_main(lambda: self._write(done, state))
        if self._is_terminated():
            self._termination.act()

    def __enter__(self) -> Checkpointing:
        if self._enabled:
            self._termination.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._enabled:
            self._termination.__exit__(kind, error, traceback)

    def _open(
        self, path: str | os.PathLike[str], identity: Callable[[], Identity]
    ) -> None:
        self._folder = CheckpointFolder(path, identity())

    def _find(self, *, resume: bool) -> int:
        assert self._folder is not None
        if not resume:
            self._folder.clear()
            return 0
        self._found = self._folder.read()
        return 0 if self._found is None else self._found[0]

    def _write(self, done: int, state: Mapping[str, Tensor]) -> None:
        assert self._folder is not None
        self._folder.write(done, state)

    def _is_terminated(self) -> bool:
        """Whether SIGTERM has come to any process: then all of them end."""
        return self._group.any(self._termination.requested)
