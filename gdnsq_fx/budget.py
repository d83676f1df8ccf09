"""What a quantized model may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from gdnsq_fx.errors import ConfigError
from gdnsq_fx.spec import MAX_BITS, MIN_BITS


@dataclass(frozen=True)
class Budget:
    """Upper bounds; those that are None do not bind, at least one must.

    Attributes:
        weight_bytes: of all quantized weights: packed codes, and one step and offset
            (8 bytes) for each scale group.
        bops: bit operations per sample of the whole model, the sum of MACs * weight
            bits * activation bits; an operand in floating point counts as 32 bits.
        mean_weight_bits: bits per element over all quantized weights.
        mean_act_bits: bits per element over all quantized activations.
        weight_bits: the widest weight, a whole number of bits, 1..16.
        act_bits: the widest activation, likewise.

    Raises:
        ConfigError: a bound is not a number above 0, a ceiling is not a whole number
            of bits, or there is none of either.
    """

    weight_bytes: float | None = None
    bops: float | None = None
    mean_weight_bits: float | None = None
    mean_act_bits: float | None = None
    weight_bits: int | None = None
    act_bits: int | None = None

    def __post_init__(self) -> None:
        bounds = self.bounds
        for name, bound in bounds.items():
            if not _is_bound(bound):
                raise ConfigError(f"{name} must be a number above 0, got {bound!r}")
        if not bounds:
            names = ", ".join(field.name for field in fields(self))
            raise ConfigError(f"a budget bounds at least one of {names}")
        for name, ceiling in self.ceilings.items():
            if not _is_width(ceiling):
                raise ConfigError(
                    f"{name} must be a whole number from {MIN_BITS} to {MAX_BITS}, "
                    f"got {ceiling!r}; a mean may be any number (mean_{name})"
                )

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that bind, by name."""
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: bound for name, bound in every.items() if bound is not None}

    @property
    def ceilings(self) -> dict[str, int]:
        """Those of the bounds that hold for each tensor by itself, by name."""
        every = {name: getattr(self, name) for name in ("weight_bits", "act_bits")}
        return {name: bits for name, bits in every.items() if bits is not None}

    @property
    def totals(self) -> dict[str, float]:
        """Those that bound a sum over tensors, and so trade one against another."""
        return {n: b for n, b in self.bounds.items() if n not in self.ceilings}


def _is_width(value: object) -> bool:
    return isinstance(value, int) and MIN_BITS <= value <= MAX_BITS


def _is_bound(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value > 0
