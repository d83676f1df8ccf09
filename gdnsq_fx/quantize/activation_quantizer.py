"""The learnable quantizer of activations: one clamped grid for a whole tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gdnsq_fx.quantize import grid_operators, native_functions
from gdnsq_fx.quantize.activation_grid import ActivationGrid
from gdnsq_fx.quantize.capacity import MIN_LOG2_STEP, projected_activation
from gdnsq_fx.quantize.functions import quantize_activation
from gdnsq_fx.quantize.kernels import is_native
from gdnsq_fx.quantize.levels import lowest_level, max_code
from gdnsq_fx.quantize.quantizer import Quantizer
from gdnsq_fx.spec import QuantSpec

# Widths for which calibration notes where the levels of an activation would lie.
PLACED_BITS = 8
# What spreads over less than this share of its size, some hundred units in the last
# place of float32, is a constant that kernels round differently.
FLOAT_ROUNDING = 2.0**-17


class ActivationQuantizer(Quantizer):
    """One clamped quantizer for a whole tensor.

    Learns ``log2_step``, ``log2_range`` and, unless ``nonnegative``, ``lower``. The
    buffers ``observed`` hold the least and the largest value met in calibration, and
    ``shares`` the share of them that 1, 2, ... bits quantize with the least squared
    error (not in ``state_dict()``: 1 until calibrated).
    Capacity is log2(q/s) bits per element (arXiv 2508.14004).
    """

    observed: Tensor
    shares: Tensor
    lower: Tensor
    # Three bits can spare 0 a level, and then kernels quantize but once.
    most_halved = 2

    def __init__(self, edge: str, spec: QuantSpec, *, nonnegative: bool) -> None:
        super().__init__(edge, spec)
        self.nonnegative = nonnegative
        self.log2_step = nn.Parameter(torch.tensor(math.nan))
        self.log2_range = nn.Parameter(torch.tensor(math.nan))
        if nonnegative:
            self.register_buffer("lower", torch.tensor(0.0))
        else:
            self.lower = nn.Parameter(torch.tensor(math.nan))
        self.register_buffer("observed", torch.tensor([math.inf, -math.inf]))
        self.register_buffer("shares", torch.ones(PLACED_BITS), persistent=False)

    @property
    def range(self) -> Tensor:
        """Range q > 0."""
        return torch.exp2(self.log2_range)

    @property
    def offset(self) -> Tensor:
        """Lowest level b, on the grid of the offset mode (see `beside_midway`)."""
        return lowest_level(self.lower, self.step, self.offset_mode)

    def quantize(self, value: Tensor) -> Tensor:
        """See `quantize_activation`."""
        lower = None if self.nonnegative else self.lower
        parameters = self.log2_step, self.log2_range, lower
        mode, estimator = self.offset_mode, self.spec.estimator
        if is_native(self.kernels, value, *parameters):
            return native_functions.quantize_activation(
                value, *parameters, mode, estimator
            )
        return quantize_activation(
            value, *self._scalars(value), estimator, self.kernels
        )

    def _scalars(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Step, range and lowest level, None where that is 0."""
        if grid_operators.are_wanted(value):
            step, range_, lower = grid_operators.activation_grid(
                self.log2_step, self.log2_range, self.lower, self.offset_mode
            )
            return step, range_, None if self.nonnegative else lower
        step = self.step
        if self.nonnegative:
            return step, self.range, None
        return step, self.range, lowest_level(self.lower, step, self.offset_mode)

    @torch.no_grad()
    def grid(self) -> ActivationGrid:
        """The levels as they stand now; reads from the device."""
        step, lower = self.step, self.offset
        return ActivationGrid(
            step=step,
            offset=None if self.nonnegative else lower,
            top=float(max_code(step, self.range)),
            lower=lower,
            upper=lower + self.range - step,
        )

    def codes(self, value: Tensor) -> Tensor:
        """Whole codes from 0, as floats, of the value's shape."""
        return self.grid().codes(value)

    @torch.no_grad()
    def clipped(self, value: Tensor) -> Tensor:
        """Where a value lies outside the clamp, bool of the value's shape."""
        lower = self.offset
        return (value < lower) | (value > lower + self.range - self.step)

    def clipped_count(self, value: Tensor) -> Tensor:
        """How many values are `clipped`, see `ActivationGrid.clipped_count`."""
        return self.grid().clipped_count(value)

    def capacity(self) -> Tensor:
        """log2(q/s), bits per element, differentiable scalar."""
        return self.log2_range - self.log2_step

    @torch.no_grad()
    def levels(self) -> int:
        """Number of levels it can produce."""
        self._require_calibration()
        return int(max_code(self.step, self.range)) + 1

    @torch.no_grad()
    def project(self, cap: float) -> None:
        """Raise the step until the capacity is at most ``cap`` (at least one bit)."""
        step, range_ = projected_activation(self.log2_step, self.log2_range, cap)
        self.log2_step.copy_(step)
        self.log2_range.copy_(range_)

    @torch.no_grad()
    def cover(self, low: float, high: float, bits: float) -> None:
        """Place 2^bits levels evenly from ``low`` (0 where nonnegative) to ``high``."""
        low = 0.0 if self.nonnegative else low
        span, size = high - low, max(abs(low), abs(high))
        # A constant, to float rounding: any grid that holds it will do. Whatever the
        # bits, or a tensor would lose its levels on the way from many to few.
        if not span > size * FLOAT_ROUNDING:
            span = size or 1.0
        step = max(math.log2(span) - math.log2(2.0**bits - 1.0), MIN_LOG2_STEP)
        self.lower.fill_(low)
        self.log2_step.fill_(step)
        self.log2_range.fill_(step + bits)

    def open_to(self, bits: float) -> None:
        """Start over with ``bits`` over everything that calibration has seen."""
        low, high = self.observed.tolist()
        if not low <= high:
            self._require_calibration()
            low = float(self.offset.detach())
            high = low + float((self.range - self.step).detach())
        self.cover(low, high, bits)

    @torch.no_grad()
    def change_width(self, bits: int) -> None:
        """Place ``bits`` anew where they do best, judged from where the levels lie now.

        What the levels span changes as much as, in calibration, the span of least
        squared error changed from the width that they have to this one.
        """
        self._require_calibration()
        now = max(round(float(self.capacity())), 1)
        factor = self._share(bits) / self._share(now)
        low = float(self.offset)
        high = low + float(self.range - self.step)
        self.cover(low * factor, high * factor, bits)

    def _share(self, bits: int) -> float:
        return float(self.shares[bits - 1]) if bits <= PLACED_BITS else 1.0
