"""The training batches, passed over again and again, from any position.

**The rule of position.** A position is the number of batches taken in the current pass,
and the random state at its start. To come back to it, that state is put back, the
iterable is iterated anew, and the batches already used are read and dropped. Samplers
draw their order when a pass starts, so a shuffling ``DataLoader`` gives the same order,
whether it draws from the global generators or from a ``generator`` of its own.
What has ``set_epoch`` (samplers for several processes) is told the number of the pass.
Generators that hide elsewhere, such as in a dataset, are not covered; derive what they
draw from the index of the sample. An iterator that cannot be iterated again must start
from its first batch when the run is resumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gdnsq_fx.errors import BatchStructureError, CheckpointError
from gdnsq_fx.inputs import Batch, InputStructure
from gdnsq_fx.training.random_state import random_state, set_random_state
from gdnsq_fx.training.stored_state import under

_END = object()
_HOLDERS = ((), ("sampler",), ("batch_sampler",), ("batch_sampler", "sampler"))


class BatchStream:
    """Batches without end.

    Args:
        batches: iterated again whenever it ends.
        inputs: how a batch is taken apart.
        needed: how many the run will take, for the error message.
        resumable: note at each start of a pass what `state` needs.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        inputs: InputStructure,
        needed: int,
        *,
        resumable: bool = False,
    ) -> None:
        self._batches = batches
        self._inputs = inputs
        self._needed = needed
        self._resumable = resumable
        self._iterator: Iterator[Any] | None = None
        self._start: dict[str, Tensor] = {}
        self._passes = 0
        self._used = 0
        self._given = 0
        self._peeked: Batch | None = None

    def peek(self) -> Batch:
        """The batch that comes next, not taken yet.

        Raises:
            BatchStructureError: as `take`.
        """
        if self._peeked is None:
            self._peeked = self._drawn()
        return self._peeked

    def take(self) -> Batch:
        """The next batch.

        Raises:
            BatchStructureError: it has another structure, or none is left.
        """
        batch, self._peeked = self.peek(), None
        return batch

    def take_several(self, count: int) -> list[Batch]:
        """The next batches; raises as `take`."""
        return [self.take() for _ in range(count)]

    def state(self) -> dict[str, Tensor]:
        """Where it stands. Only between steps: nothing may be peeked at."""
        counts = {
            "passes": torch.tensor(self._passes),
            "used": torch.tensor(self._used),
            "given": torch.tensor(self._given),
        }
        now = {f"now.{n}": s for n, s in enumerate(self._generator_states())}
        return {**counts, **now, **self._start}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go back to where `state` was taken; leaves the random state changed.

        Raises:
            CheckpointError: the pass ends before that position.
        """
        generators = _generators(self._batches)
        self._passes = int(state["passes"]) - 1
        _set_generators(generators, state, "start.generator")
        set_random_state(under(state, "start.global"))
        self._iterator, self._used = self._new_pass(), 0
        used = int(state["used"])
        while self._used < used:
            if next(self._iterator, _END) is _END:
                raise CheckpointError(
                    f"the checkpoint stands at batch {used} of a pass over "
                    f"train_batches, which now ends after {self._used}; give the same "
                    "batches as before, or resume=False to start over"
                )
            self._used += 1
        self._given = int(state["given"])
        _set_generators(generators, state, "now")

    def _drawn(self) -> Batch:
        batch = _END if self._iterator is None else next(self._iterator, _END)
        if batch is _END:
            self._iterator = None  # the workers of one pass go before the next come
            self._iterator, self._used = self._new_pass(), 0
            batch = next(self._iterator, _END)
        if batch is not _END:
            self._used += 1
            self._given += 1
            return self._inputs.split(batch)
        raise BatchStructureError(
            f"train_batches gave {self._given} of the {self._needed} batches needed "
            "and cannot be iterated again; pass a DataLoader or a list instead of an "
            "iterator"
        )

    def _new_pass(self) -> Iterator[Any]:
        if self._resumable:
            states = enumerate(self._generator_states())
            own = {f"start.generator.{n}": state for n, state in states}
            shared = {f"start.global.{n}": s for n, s in random_state().items()}
            self._start = {**own, **shared}
        _set_epoch(self._batches, self._passes)
        self._passes += 1
        return iter(self._batches)

    def _generator_states(self) -> list[Tensor]:
        return [one.get_state() for one in _generators(self._batches)]


def _generators(batches: Any) -> list[torch.Generator]:
    """What a ``DataLoader`` and its samplers draw from, each once."""
    found: dict[int, torch.Generator] = {}
    for holder in _holders(batches):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            found[id(generator)] = generator
    return list(found.values())


def _set_epoch(batches: Any, number: int) -> None:
    """Tell a ``DataLoader`` and its samplers which pass begins, where they ask."""
    for holder in _holders(batches):
        tell = getattr(holder, "set_epoch", None)
        if callable(tell):
            tell(number)


def _holders(batches: Any) -> list[Any]:
    found: list[Any] = []
    for path in _HOLDERS:
        holder = batches
        for name in path:
            holder = getattr(holder, name, None)
        found.append(holder)
    return found


def _set_generators(
    generators: list[torch.Generator], state: Mapping[str, Tensor], prefix: str
) -> None:
    for number, generator in enumerate(generators):
        stored = state.get(f"{prefix}.{number}")
        if stored is not None:
            generator.set_state(stored)
