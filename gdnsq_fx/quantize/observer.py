"""What calibration sees of one activation, and the range it chooses from it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gdnsq_fx.errors import CalibrationError
from gdnsq_fx.quantize.functions import from_codes, to_codes
from gdnsq_fx.quantize.quantizer import ActivationQuantizer

SAMPLE_SIZE = 1 << 16
CANDIDATES = 64
# Products of such values overflow, so that only what is never multiplied with its like
# holds them: a mask.
MASK_LIMIT = math.sqrt(torch.finfo(torch.float32).max)


class Observer:
    """Extremes and a sample of the values of one edge.

    Memory is bounded: half of the sample is dropped whenever it exceeds its size. What
    is kept is drawn at random (an even stride would see the same channels each time),
    from a generator of its own.

    Attributes:
        low, high: extremes of what was seen, masks aside.
        is_mask: some of it was beyond ``MASK_LIMIT``, or minus infinity.
    """

    def __init__(self, edge: str) -> None:
        self.edge = edge
        self.is_mask = False
        self.low = math.inf
        self.high = -math.inf
        self._share = 1.0
        self._sample = torch.empty(0)
        self._generator = torch.Generator().manual_seed(0)

    def hook(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of a quantizer."""
        del module
        self.add(args[0])

    def add(self, values: Tensor) -> None:
        """Take note of a tensor of any shape.

        Raises:
            CalibrationError: it holds NaN, or plus infinity: something overflowed.
        """
        if values.numel() == 0:
            return
        flat = values.detach().reshape(-1).float()
        low, high = (float(v) for v in torch.aminmax(flat))
        if not low < math.inf or not high < math.inf:
            raise CalibrationError(
                f"NaN or infinite values reach {self.edge} in calibration although the "
                "inputs are finite; check the weights and the layers before it"
            )
        if max(-low, high) > MASK_LIMIT:
            self.is_mask = True
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        drawn = self._drawn(flat, self._share)
        self._sample = torch.cat([self._sample.to(flat.device), drawn])
        while self._sample.numel() > SAMPLE_SIZE:
            self._sample = self._drawn(self._sample, 0.5)
            self._share /= 2.0

    def _drawn(self, flat: Tensor, share: float) -> Tensor:
        """About a share of the values, at random places; all of them at share 1."""
        if share == 1.0:
            return flat
        count = math.ceil(flat.numel() * share)
        places = torch.randint(flat.numel(), (count,), generator=self._generator)
        return flat[places.to(flat.device)]

    def place(self, quantizer: ActivationQuantizer) -> None:
        """Set step, range and lower bound for the target bits, and note the extremes.

        Raises:
            CalibrationError: nothing was observed.
        """
        if not self.low <= self.high:
            raise CalibrationError(
                f"no value reached {self.edge} in calibration; its layer does not run "
                "on these batches, so exclude it or add batches that use it"
            )
        quantizer.observed.copy_(torch.tensor([self.low, self.high]))
        low = 0.0 if quantizer.nonnegative else self.low
        bits = quantizer.spec.bits
        shrink = self._best_shrink(low, self.high, bits)
        quantizer.cover(low * shrink, self.high * shrink, bits)

    def _best_shrink(self, low: float, high: float, bits: int) -> float:
        """Share of the full range with the least mean squared error on the sample."""
        if not high > low:
            return 1.0
        shares = torch.linspace(1.0, 1.0 / CANDIDATES, CANDIDATES).tolist()
        errors = [self._error(low * s, high * s, bits) for s in shares]
        return shares[errors.index(min(errors))]

    def _error(self, low: float, high: float, bits: int) -> float:
        sample = self._sample
        step = sample.new_tensor((high - low) / (2.0**bits - 1.0))
        offset = sample.new_tensor(low)
        codes = to_codes(sample, step, offset).clamp_(0.0, 2.0**bits - 1.0)
        return float((from_codes(codes, step, offset) - sample).square().mean())
