"""What the processes of one run tell each other: means, decisions, what the first has.

Every method is called by all processes, in the same order. With one process, nothing is
sent and nothing of torch.distributed is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gdnsq_fx.training.stored_state import joined, under

T = TypeVar("T")


class ProcessGroup:
    """All processes of one run.

    Args:
        rank: number of this one, from 0; the first is the main one.
        count: how many there are.
        device: where tensors must lie to be sent.
    """

    def __init__(
        self, rank: int = 0, count: int = 1, device: torch.device | None = None
    ) -> None:
        self.rank = rank
        self.count = count
        self.device = device or torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """Average over processes, element by element; no gradient."""
        if self.count == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.count

    def mean_number(self, value: float) -> float:
        """As `mean`, of a Python number."""
        if self.count == 1:
            return value
        # Accelerators without double precision exist, and a metric is not a count.
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        return float(self.mean(torch.tensor(value, dtype=wide, device=self.device)))

    def any(self, flag: bool) -> bool:
        """Whether it holds in at least one process."""
        return self.mean_number(float(flag)) > 0.0 if self.count > 1 else flag

    def from_main(self, value: T) -> T:
        """The value that the main process has."""
        if self.count == 1:
            return value
        held: list[Any] = [value if self.is_main else None]
        dist.broadcast_object_list(held, device=self.device)
        return held[0]

    def on_main(self, action: Callable[[], T]) -> T:
        """What an action returns in the main process, the only one that runs it.

        Raises:
            Exception: in every process, what the action raised.
        """
        result: T | None = None
        error: Exception | None = None
        if self.is_main:
            try:
                result = action()
            except Exception as raised:
                error = raised
        result, error = self.from_main((result, error))
        if error is not None:
            raise error
        return result  # pyright: ignore[reportReturnType]

    def of_every_process(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The states of all of them under ``process<n>.``; meant for small ones."""
        if self.count == 1:
            return dict(state)
        held: list[dict[str, Tensor]] = [{} for _ in range(self.count)]
        here = {name: tensor.cpu() for name, tensor in state.items()}
        dist.all_gather_object(held, here)
        return joined({f"process{n}": one for n, one in enumerate(held)})

    def of_this_process(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this process gave to `of_every_process`."""
        return dict(state) if self.count == 1 else under(state, f"process{self.rank}")

    def tensors_from_main(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the tensors that the main process has, one at a time."""
        names = self.from_main(list(state))
        return {name: self.from_main(state.get(name)) for name in names}  # type: ignore[misc]

    def share(self, tensors: Mapping[str, Tensor]) -> None:
        """Write into tensors what the main process has in them."""
        if self.count == 1:
            return
        for name in sorted(tensors):
            whole = tensors[name].detach().contiguous()
            dist.broadcast(whole, src=0)
            with torch.no_grad():
                tensors[name].copy_(whole)
