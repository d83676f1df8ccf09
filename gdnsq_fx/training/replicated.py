"""Every process holds the model; gradients are averaged: DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel

from gdnsq_fx.training.global_batch_norm import synchronize_batch_norm
from gdnsq_fx.training.process_group import ProcessGroup
from gdnsq_fx.training.working_copy import give_back, working_copy


class Replicated:
    """Data parallel training of whole copies.

    Args:
        group: the processes.
        handler: ``accelerate.DistributedDataParallelKwargs``, or None.
    """

    def __init__(self, group: ProcessGroup, handler: Any = None) -> None:
        self.group = group
        self._handler = handler
        self._wrapped: DistributedDataParallel | None = None

    @contextmanager
    def working(self, qmodel: GraphModule) -> Generator[GraphModule]:
        """A copy that shares all tensors, with BatchNorm over the global batch."""
        copied = working_copy(qmodel)
        synchronize_batch_norm(copied)
        try:
            yield copied
        finally:
            give_back(copied, qmodel)
            self._wrapped = None

    def forward(self, module: nn.Module) -> nn.Module:
        """The module, averaging gradients in backward."""
        settings = {} if self._handler is None else self._handler.to_kwargs()
        self._wrapped = DistributedDataParallel(module, **settings)
        if self._handler is not None:
            self._handler.register_comm_hook(self._wrapped)
        return self._wrapped

    def partial(self) -> AbstractContextManager[object]:
        """Nothing is sent."""
        assert self._wrapped is not None
        return self._wrapped.no_sync()

    def average_rest(self) -> None:
        """Backward has averaged everything."""

    def add_gradients(self, compute: Callable[[], Tensor]) -> None:
        """By backward: between two forward passes nothing is averaged."""
        compute().backward()

    def weights(self) -> AbstractContextManager[object]:
        """They are always there."""
        return nullcontext()
