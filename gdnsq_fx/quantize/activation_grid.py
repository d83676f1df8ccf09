"""The levels of an activation quantizer as it stands, for many values in turn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gdnsq_fx.quantize.levels import from_codes_, to_codes, wide


@dataclass(frozen=True)
class ActivationGrid:
    """Levels ``step * k + offset``, k in 0 .. ``top``, and where the clamp begins.

    Computed once, it spares each value the scalars, which take more time than a small
    value itself.

    Attributes:
        step: scalar tensor.
        offset: lowest level, scalar tensor; None where it is 0 and no value is below.
        top: largest code, a whole number.
        lower, upper: ends of the clamp, scalar tensors.
    """

    step: Tensor
    offset: Tensor | None
    top: float
    lower: Tensor
    upper: Tensor

    @torch.no_grad()
    def codes(self, value: Tensor) -> Tensor:
        """Whole codes from 0, as floats, of the value's shape."""
        value = wide(value, self.step)
        if self.offset is None:
            codes = value.div(self.step).round_()
        else:
            codes = to_codes(value, self.step, self.offset)
        return codes.clamp_(0.0, self.top)

    @torch.no_grad()
    def error_of_codes_(self, codes: Tensor, value: Tensor) -> Tensor:
        """Level of each code minus exact value, in the memory of the codes.

        Args:
            codes: those of the value; nothing reads them afterwards.
            value: of any shape; the error has its shape and dtype.
        """
        if self.offset is None:
            levels = codes.mul_(self.step)
        else:
            levels = from_codes_(codes, self.step, self.offset)
        return levels.to(value.dtype).sub_(value)

    @torch.no_grad()
    def clipped_count(self, value: Tensor) -> Tensor:
        """How many values the clamp moves, a scalar tensor of the value's precision.

        A sum of floats takes a fraction of the time that comparing and counting takes;
        it is exact up to 2^24.
        """
        value = wide(value, self.step)
        moved = torch.maximum(value, self.lower)
        torch.minimum(moved, self.upper, out=moved)
        return moved.ne_(value).sum()
