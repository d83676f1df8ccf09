"""The numbers that a fine-tuning run is asked for, checked."""

from __future__ import annotations

from dataclasses import dataclass

from gdnsq_fx.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """Numbers of one run; their meaning stands in `finetune`.

    Raises:
        ConfigError: one is outside its domain.
    """

    lr: float
    max_grad_norm: float
    distillation: float
    validate_every: int | None
    checkpoint_every: int

    def __post_init__(self) -> None:
        for name in ("lr", "max_grad_norm"):
            self._check(name, getattr(self, name) > 0.0, "above 0")
        self._check("distillation", self.distillation >= 0.0, "at least 0")
        every = self.validate_every
        self._check("validate_every", every is None or every >= 1, "at least 1")
        self._check("checkpoint_every", self.checkpoint_every >= 1, "at least 1")

    def _check(self, name: str, holds: bool, domain: str) -> None:
        if not holds:  # NaN compares false, so it is refused as well
            raise ConfigError(f"{name} must be {domain}, got {getattr(self, name)}")
