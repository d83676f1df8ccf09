"""How the processes of one run share the work; a run on its own shares nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor, nn
from torch.fx import GraphModule

from gdnsq_fx.training.process_group import ProcessGroup


class Engine(Protocol):
    """What the loop asks for where several processes train one model.

    Attributes:
        group: the processes.
    """

    group: ProcessGroup

    def working(self, qmodel: GraphModule) -> AbstractContextManager[GraphModule]:
        """The model to train inside the block; the results are the given one's."""
        ...

    def forward(self, module: nn.Module) -> nn.Module:
        """What to call in training instead of a module of the working model."""
        ...

    def partial(self) -> AbstractContextManager[object]:
        """Inside the block gradients add up in each process, to be averaged later."""
        ...

    def average_rest(self) -> None:
        """After backward: what it has not averaged itself."""
        ...

    def add_gradients(self, compute: Callable[[], Tensor]) -> None:
        """Add those of a value of the parameters alone, the same in every process."""
        ...

    def weights(self) -> AbstractContextManager[object]:
        """Inside the block every process has all weights, to be read and not written.

        Called without gradients, between steps.
        """
        ...


class SingleProcess:
    """One process: the model itself is trained."""

    def __init__(self) -> None:
        self.group = ProcessGroup()

    def working(self, qmodel: GraphModule) -> AbstractContextManager[GraphModule]:
        """The model itself."""
        return nullcontext(qmodel)

    def forward(self, module: nn.Module) -> nn.Module:
        """The module itself."""
        return module

    def partial(self) -> AbstractContextManager[object]:
        """Gradients always add up."""
        return nullcontext()

    def average_rest(self) -> None:
        """There is nobody to average with."""

    def add_gradients(self, compute: Callable[[], Tensor]) -> None:
        """By backward."""
        compute().backward()

    def weights(self) -> AbstractContextManager[object]:
        """They are always there."""
        return nullcontext()
