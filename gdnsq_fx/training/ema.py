"""Exponential moving average of the parameters while bits are at their targets."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gdnsq_fx.training.dtensors import local, placed_like, whole_of_parts


class Average:
    """``average = decay * average + (1 - decay) * parameter`` after every step.

    It begins when the descent ends: an average over levels that still move would lag
    behind. Steps of quantizers are averaged as logarithms, which may leave a capacity
    above its target: whoever uses the average projects it first.

    Args:
        model: whose parameters are averaged; buffers are not.
        decay: share of the old average that stays, 0..1.
        begins: optimizer steps before it begins.
        project: brings the parameters that the model has to their targets.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float,
        begins: int,
        project: Callable[[], None],
    ) -> None:
        self._parameters = [p for p in model.parameters() if p.is_floating_point()]
        self._begins = begins
        self._project = project
        self._update = get_ema_multi_avg_fn(decay)
        self._averaged: list[Tensor] = []

    @torch.no_grad()
    def update(self, done: int) -> None:
        """Take in the parameters after so many optimizer steps."""
        if done < self._begins:
            return
        if not self._averaged:
            self._averaged = self._copied()
            return
        now = [local(p.detach()) for p in self._parameters]
        self._update(self._averaged, now, done)

    @contextmanager
    def applied(self) -> Generator[None]:
        """The model has the average, at its targets, inside the ``with`` block."""
        if not self._averaged:
            yield
            return
        own = self._copied()
        self.settle()
        try:
            yield
        finally:
            self._write(own)

    def settle(self) -> None:
        """Give the model the average, at its targets; nothing if it never began."""
        if self._averaged:
            self._write(self._averaged)
            self._project()

    def state(self) -> dict[str, Tensor]:
        """By number of the parameter, whole."""
        pairs = zip(self._averaged, self._parameters, strict=False)  # empty at first
        return {
            str(n): whole_of_parts(average, parameter)
            for n, (average, parameter) in enumerate(pairs)
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned."""
        self._averaged = [
            local(placed_like(state[str(n)], p)).to(p.device, copy=True)
            for n, p in enumerate(self._parameters[: len(state)])
        ]

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            local(parameter).copy_(value)

    def _copied(self) -> list[Tensor]:
        return [local(p.detach()).clone() for p in self._parameters]
