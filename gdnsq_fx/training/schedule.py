"""How bits and learning rate go down within a given number of steps.

    bits   start ----.___
                         ``--.____ target -------------- target
           |<---- descent ------->|<----- hold, anneal ------->|

The paper's constants take tens of thousands of steps to bring 10 bits down to 1. Here
everything derives from the step budget, so that the last part of any budget trains at
the final precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from gdnsq_fx.errors import ConfigError

LEAST_TARGET = 1.0


@dataclass(frozen=True)
class Schedule:
    """Caps and learning-rate factors by step.

    Attributes:
        steps: optimizer steps in all.
        start_bits: capacity at which every edge starts, at least its target.
        descent: share of the steps over which the cap comes down to the target.
        slow_down: exponent of the descent; above 1 it slows down near the target, where
            most of the accuracy is at stake (between 2 bits and 1).
        warm_up: share of the steps over which the learning rate rises.
    """

    steps: int
    start_bits: float = 8.0
    descent: float = 0.5
    slow_down: float = 2.0
    warm_up: float = 0.02
    anneals_once_met: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check("steps", self.steps, "at least 1", self.steps >= 1)
        _check("start_bits", self.start_bits, "1 to 16", 1 <= self.start_bits <= 16)
        _check("descent", self.descent, "a share, 0 to 1", 0 <= self.descent <= 1)
        steep = 0 < self.slow_down < math.inf
        _check("slow_down", self.slow_down, "above 0", steep)
        _check("warm_up", self.warm_up, "a share, 0 to 1", 0 <= self.warm_up <= 1)

    @staticmethod
    def paper(steps: int, lr: float = 1e-3, start_bits: float = 10.0) -> PaperSchedule:
        """The schedule of the paper: the penalty alone brings bits down.

        Args:
            steps: optimizer steps; its constants take tens of thousands of them.
            lr: learning rate of weights, the same as is given to `finetune`.
            start_bits: capacity at which every edge starts.

        Raises:
            ConfigError: a value is outside its domain.
        """
        return PaperSchedule(steps, start_bits, lr=lr)

    @property
    def descent_steps(self) -> int:
        """Steps before every cap is at its target; the last step always is."""
        return min(max(round(self.steps * self.descent), 1), self.steps)

    def progress(self, step: int) -> float:
        """How much of the descent is done after this step (from 0), 0..1."""
        return min((step + 1) / self.descent_steps, 1.0)

    def cap(self, step: int, target: float) -> float:
        """Largest capacity, bits per element, allowed after this step."""
        excess = max(self.start_bits - target, 0.0)
        return target + excess * (1.0 - self.progress(step)) ** self.slow_down

    def learning_rate_factor(self, step: int, met_at: int | None = None) -> float:
        """Linear warm-up, constant through the descent, then cosine to zero.

        Args:
            step: from 0.
            met_at: the step after which all bits were at their targets, if they are;
                here that is known beforehand.
        """
        warm = min((step + 1) / max(self.steps * self.warm_up, 1.0), 1.0)
        hold = self.steps - self.descent_steps
        done = max(step - self.descent_steps, 0) / max(hold, 1)
        return warm * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))

    def growth(self, step: int) -> float:
        """Factor t of the penalty at this step.

        Where bits start at their targets it is 0: nothing is violated that a penalty
        could bring down, and at the cap itself it would press on without end.
        """
        return 0.0 if self.start_bits <= LEAST_TARGET else self.progress(step)

    def quantizer_rate(self, target: float) -> float:
        """Learning rate of log2 steps and ranges: bits to lose for each descent step.

        An adaptive optimizer moves a parameter by about its learning rate each step.
        """
        return max(self.start_bits - target, 1.0) / self.descent_steps


@dataclass(frozen=True)
class PaperSchedule(Schedule):
    """Penalty without cap: t grows by twice the learning rate in each step, for ever.

    Quantizers learn at the rate of the weights. Once all bits are at their targets the
    rate anneals to the end (``met_at`` of `learning_rate_factor`). Where the penalty
    has not brought them there, the last step does: the budget is met all the same.

    Attributes:
        lr: learning rate of weights, and of quantizers.

    Source: GDNSQ (arXiv 2508.14004), and the constants of its reference
    implementation.
    """

    descent: float = 1.0
    lr: float = 1e-3
    anneals_once_met: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("lr", self.lr, "above 0", self.lr > 0.0)

    def cap(self, step: int, target: float) -> float:
        """No cap before the last step."""
        return target if step + 1 >= self.steps else math.inf

    def growth(self, step: int) -> float:
        """t of the penalty."""
        return 2.0 * self.lr * (step + 1)

    def learning_rate_factor(self, step: int, met_at: int | None = None) -> float:
        """Constant until the targets are met, then cosine to zero."""
        if met_at is None:
            return 1.0
        done = (step - met_at) / max(self.steps - met_at, 1)
        return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))

    def quantizer_rate(self, target: float) -> float:
        """The rate of the weights."""
        return self.lr


def _check(name: str, value: float, domain: str, holds: bool) -> None:
    if not holds:  # NaN compares false, so it is refused as well
        raise ConfigError(f"{name} must be {domain}, got {value}")
