"""The learnable quantizer of weights: a step for each channel, the range its own."""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor, nn

from gdnsq_fx.channels import ChannelLayout
from gdnsq_fx.quantize import grid_operators, native, native_functions
from gdnsq_fx.quantize.capacity import (
    CAPACITY_TOLERANCE,
    MIN_LOG2_STEP,
    projected_weight,
    weight_capacity,
)
from gdnsq_fx.quantize.extremes import (
    Looks,
    Seen,
    extremes_of,
    native_extremes_of,
    with_gradient,
)
from gdnsq_fx.quantize.functions import quantize_weight
from gdnsq_fx.quantize.kernels import is_native_rows
from gdnsq_fx.quantize.levels import clamped_codes, weight_bounds, wide
from gdnsq_fx.quantize.quantizer import Quantizer
from gdnsq_fx.spec import QuantSpec


class WeightQuantizer(Quantizer):
    """One step for each output channel, or for the tensor; the range is the weight's.

    Capacity of a channel is log2((max - min)/s + 1) bits per element, so its gradient
    reaches the channel's own extreme weights and pulls outliers in (arXiv 2508.14004).
    """

    # Codes of half steps need one bit more, and int8 has eight.
    most_halved = 6

    def __init__(
        self, edge: str, spec: QuantSpec, layout: ChannelLayout, weight: Tensor
    ) -> None:
        super().__init__(edge, spec)
        self.layout = layout
        self._looks = Looks()
        self.dims = layout.reduced_dims(weight.ndim)
        shape = list(layout.grouped(weight).shape)
        for dim in self.dims:
            shape[dim] = 1
        self.log2_step = nn.Parameter(
            torch.full(shape, math.nan, device=weight.device, dtype=torch.float32)
        )

    @property
    def within_int8(self) -> bool:
        """Whether whole steps from 0 are to fit int8, as kernels want them."""
        fills = self.most_halved < self.spec.bits <= 8
        return fills and self.offset_mode == "integer"

    @torch.no_grad()
    def extremes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest weight of each scale group, shaped like ``log2_step``."""
        view = self.layout.grouped(weight)
        low = wide(view.amin(self.dims, keepdim=True), self.log2_step)
        return low, wide(view.amax(self.dims, keepdim=True), self.log2_step)

    def learnable_extremes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The same, differentiable; those that the last forward met where it may."""
        seen = self._looks.last
        if seen is None or not seen.is_of(weight):
            seen = self._look(weight)
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return seen.low, seen.high
        view = self.layout.grouped(weight)
        return with_gradient(view, seen.low, seen.high, self.dims, seen.parts)

    def offset(self, weight: Tensor) -> Tensor:
        """Lowest level b of each scale group; no gradient."""
        return self._grid(weight)[1]

    def quantize(self, value: Tensor) -> Tensor:
        """See `quantize_weight`."""
        view, estimator = self.layout.grouped(value), self.spec.estimator
        if is_native_rows(self.kernels, view, self.log2_step):
            grid = self._native_grid(value)
            return native_functions.quantize_weight(
                value, self.log2_step, grid, self.layout, estimator
            )
        step, lower, top = self._grid(value, remember=self.training)
        quantized = quantize_weight(
            view, step, lower, self.dims, estimator, top, self.kernels
        )
        return quantized.view_as(value)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        """Whole codes from 0, as floats, of the weight's shape."""
        codes = clamped_codes(self.layout.grouped(weight), *self._grid(weight))
        return codes.view_as(weight)

    def capacity(self, weight: Tensor) -> Tensor:
        """log2((max - min)/s + 1) of each scale group, bits per element.

        Of a weight that the last forward in training met it takes the extremes from
        there: after an update by an optimizer that keeps versions (fused ones do), call
        `forget` first.
        """
        return weight_capacity(*self.learnable_extremes(weight), self.log2_step)

    @torch.no_grad()
    def levels(self, weight: Tensor) -> Tensor:
        """Number of levels of each scale group that the weight spans, as floats."""
        self._require_calibration()
        return clamped_codes(self.extremes(weight)[1], *self._grid(weight)) + 1.0

    @torch.no_grad()
    def project(self, weight: Tensor, cap: float) -> None:
        """Raise steps until every capacity is at most ``cap`` (at least one bit)."""
        self.forget()
        low, high = self.extremes(weight)
        projected = projected_weight(
            self.log2_step, low, high, cap, within_int8=self.within_int8
        )
        self.log2_step.copy_(projected)

    @torch.no_grad()
    def open_to(self, weight: Tensor, bits: float) -> None:
        """Place 2^bits levels evenly over each scale group."""
        low, high = self.extremes(weight)
        span = (high - low).to(self.log2_step.dtype)
        span = torch.where(span > 0, span, low.abs().to(span.dtype))
        span = torch.where(span > 0, span, torch.ones_like(span))
        step = torch.log2(span / (2.0**bits - 1.0)).clamp(min=MIN_LOG2_STEP)
        inside = self.within_int8
        self.log2_step.copy_(
            projected_weight(step, low, high, bits, within_int8=inside)
        )

    def forget(self) -> None:
        """Look at the weight anew, which an update may change and keep its version."""
        self._looks.last = self._looks.ahead = None

    def look_ahead(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """`extremes`, which the next forward pass in training takes as they are.

        For after an update: the weight is looked at once a step. What changes it
        until then must count as a modification in place (``.data`` does not).
        """
        self.forget()
        self._looks.ahead = seen = self._look(weight)
        return seen.low, seen.high

    def _look(self, weight: Tensor) -> Seen:
        """Extremes of a weight; no gradient."""
        view, log2_step = self.layout.grouped(weight.detach()), self.log2_step
        if is_native_rows(self.kernels, view, log2_step):
            low, high, parts = native_extremes_of(view, log2_step)
        else:
            low, high, parts = extremes_of(view, self.dims)
            low, high = wide(low, log2_step), wide(high, log2_step)
        return Seen(weakref.ref(weight), weight._version, low, high, parts)

    def _grid(
        self, weight: Tensor, *, remember: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Step, lowest level and largest code of each scale group."""
        low, high = self._extremes(weight, remember=remember)
        if grid_operators.are_wanted(weight):
            return grid_operators.weight_grid(
                self.log2_step, low, high, self.offset_mode
            )
        step = self.step
        with torch.no_grad():
            return step, *weight_bounds(low, high, step, self.offset_mode)

    def _native_grid(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same of a weight that kernels in C serve; no gradient."""
        step = torch.exp2(self.log2_step.detach())
        low, high = self._extremes(weight, remember=self.training)
        mode, tolerance = self.offset_mode, CAPACITY_TOLERANCE
        return step, *native.weight_grid(low, high, step, mode, tolerance)

    def _extremes(self, weight: Tensor, *, remember: bool) -> tuple[Tensor, Tensor]:
        """Extremes of a weight, for the next look at it, too; no gradient."""
        # Whoever traces symbolically hands in a proxy.
        known = isinstance(weight, Tensor)  # pyright: ignore[reportUnnecessaryIsInstance]
        if not (remember and known) or torch.compiler.is_compiling():
            return self.extremes(weight)
        looks = self._looks
        seen, looks.ahead = looks.ahead, None
        if seen is None or not seen.is_of(weight):
            seen = self._look(weight)
        looks.last = seen
        return seen.low, seen.high
