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

**Looking ahead.** Batches looked at before their time wait until they are taken. Where
reading them drew from the global random state, which training draws from in between,
the pass is begun again by the rule above, lest training see other batches than if
nobody had looked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gdnsq_fx.errors import BatchStructureError, CheckpointError
from gdnsq_fx.inputs import Batch, InputStructure
from gdnsq_fx.training.process_group import ProcessGroup
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
        resumable: note at each start of a pass what `state` and `look_ahead` need.
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
        self._waiting: deque[Batch] = deque()  # drawn in this pass, not taken yet

    def peek(self) -> Batch:
        """The batch that comes next, not taken yet.

        Raises:
            BatchStructureError: as `take`.
        """
        if not self._waiting:
            self._waiting.append(self._drawn())
        return self._waiting[0]

    def take(self) -> Batch:
        """The next batch.

        Raises:
            BatchStructureError: it has another structure, or none is left.
        """
        self.peek()
        return self._waiting.popleft()

    def take_several(self, count: int) -> list[Batch]:
        """The next batches; raises as `take`."""
        return [self.take() for _ in range(count)]

    def look_ahead(self, count: int, group: ProcessGroup) -> list[Batch]:
        """The batches that come next in this pass, at most ``count``, none taken.

        Those to be taken, and the random state, are the same afterwards. Two kinds of
        ``batches`` that draw from the global random state are an exception: an
        iterator, which gives the same samples with other numbers drawn for them, and
        what, iterated anew, does not begin anew.

        Args:
            count: at least 1; of a stream that is resumable.
            group: of processes that all look ahead.

        Raises:
            BatchStructureError: as `take`.
        """
        self.peek()
        before = random_state()
        while len(self._waiting) < min(count, self._needed):
            assert self._iterator is not None
            batch = next(self._iterator, _END)
            if batch is _END:
                self._iterator = iter(())
                break
            self._used += 1
            self._given += 1
            self._waiting.append(self._inputs.split(batch))
        found = list(self._waiting)
        now = random_state()
        if group.any(any(not torch.equal(now[n], s) for n, s in before.items())):
            if not isinstance(self._batches, Iterator):
                self._begin_again(self._start, self._used - len(found))
                self._given -= len(found)
                self.peek()
            set_random_state(before)
        return found

    def state(self) -> dict[str, Tensor]:
        """Where it stands, between steps."""
        counts = {
            "passes": torch.tensor(self._passes),
            "used": torch.tensor(self._used - len(self._waiting)),
            "waiting": torch.tensor(len(self._waiting)),
            "given": torch.tensor(self._given),
        }
        now = {f"now.{n}": s for n, s in enumerate(self._generator_states())}
        return {**counts, **now, **self._start}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go back to where `state` was taken; leaves the random state changed.

        Raises:
            CheckpointError: the pass ends before that position.
        """
        self._passes, self._given = int(state["passes"]), int(state["given"])
        waiting = int(state["waiting"]) if "waiting" in state else 0
        self._begin_again(state, int(state["used"]), waiting)
        _set_generators(_generators(self._batches), state, "now")

    def _begin_again(
        self, start: Mapping[str, Tensor], taken: int, waiting: int = 0
    ) -> None:
        """Come back to a position of the current pass by the rule of position."""
        _set_generators(_generators(self._batches), start, "start.generator")
        set_random_state(under(start, "start.global"))
        self._passes -= 1
        self._iterator = None  # as in `_drawn`
        self._iterator, self._used = self._new_pass(), 0
        self._waiting.clear()
        while self._used < taken + waiting:
            batch = next(self._iterator, _END)
            if batch is _END:
                raise CheckpointError(
                    f"the checkpoint stands at batch {taken} of a pass over "
                    f"train_batches, which now ends after {self._used}; give the same "
                    "batches as before, or resume=False to start over"
                )
            self._used += 1
            if self._used > taken:
                self._waiting.append(self._inputs.split(batch))

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
