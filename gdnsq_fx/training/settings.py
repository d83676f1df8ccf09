"""The numbers that a fine-tuning run is asked for, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gdnsq_fx.errors import ConfigError
from gdnsq_fx.training.amp import Autocast

Goal = Literal["max", "min"]
"""Which metric is best."""


@dataclass(frozen=True)
class Settings:
    """Numbers of one run; their meaning stands in `finetune`.

    Attributes:
        lr: None: that of the recipe for the bits that the run starts with.

    Raises:
        ConfigError: one is outside its domain.
    """

    lr: float | None
    max_grad_norm: float
    distillation: float
    task_weight: float
    validate_every: int | None
    checkpoint_every: int
    accumulate: int
    autocast: Autocast | None
    ema: float | None
    batch_norm_batches: int
    best: Goal | None
    patience: int | None

    def __post_init__(self) -> None:
        self._check("lr", self.lr is None or self.lr > 0.0, "above 0")
        self._check("max_grad_norm", self.max_grad_norm > 0.0, "above 0")
        self._check("distillation", self.distillation >= 0.0, "at least 0")
        self._check("task_weight", self.task_weight > 0.0, "above 0")
        every = self.validate_every
        self._check("validate_every", every is None or every >= 1, "at least 1")
        self._check("checkpoint_every", self.checkpoint_every >= 1, "at least 1")
        self._check("accumulate", self.accumulate >= 1, "at least 1")
        self._check("ema", self.ema is None or 0.0 <= self.ema < 1.0, "in [0, 1)")
        self._check("batch_norm_batches", self.batch_norm_batches >= 0, "at least 0")
        self._check("best", self.best in (None, "max", "min"), "'max' or 'min'")
        patience = self.patience
        self._check("patience", patience is None or patience >= 1, "at least 1")
        if patience is not None and (self.best is None or every is None):
            raise ConfigError(
                "patience needs best and validate_every: they say which metric is "
                "better, and when to look"
            )

    def _check(self, name: str, holds: bool, domain: str) -> None:
        if not holds:  # NaN compares false, so it is refused as well
            raise ConfigError(f"{name} must be {domain}, got {getattr(self, name)}")
