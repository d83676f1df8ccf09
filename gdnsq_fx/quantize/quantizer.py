"""The learnable quantizers: one module for activations, one for weights."""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gdnsq_fx.channels import ChannelLayout
from gdnsq_fx.errors import CalibrationError
from gdnsq_fx.quantize.capacity import (
    MIN_CAPACITY,
    MIN_LOG2_STEP,
    projected_activation,
    projected_weight,
    weight_capacity,
)
from gdnsq_fx.quantize.extremes import Seen, located, with_gradient
from gdnsq_fx.quantize.functions import (
    max_code,
    quantize_activation,
    quantize_weight,
    snap_offset,
    to_codes,
    weight_codes,
    wide,
)
from gdnsq_fx.quantize.kernels import Kernels, checked_kernels
from gdnsq_fx.spec import QuantSpec

# What float rounding may add to the capacity of a projected quantizer, in bits.
CAPACITY_TOLERANCE = 1e-4
# Widths for which calibration notes where the levels of an activation would lie.
PLACED_BITS = 8


class Quantizer(nn.Module, ABC):
    """What both quantizers share: an edge, a spec, a learnable log2 step, a switch.

    Attributes:
        edge: name of the edge, such as ``layer1.0.conv1.weight``.
        spec: its fixed choices.
        enabled: when False the module passes its input on unchanged.
        kernels: what computes it, see `use_kernels`.
        log2_step: learnable, s = 2^log2_step.
    """

    log2_step: nn.Parameter

    def __init__(self, edge: str, spec: QuantSpec) -> None:
        super().__init__()
        self.edge = edge
        self.spec = spec
        self.enabled = True
        self.kernels: Kernels = "auto"

    @property
    def step(self) -> Tensor:
        """Step s > 0."""
        return torch.exp2(self.log2_step)

    @property
    def is_calibrated(self) -> bool:
        """Whether every step is a number yet."""
        return bool(torch.isfinite(self.log2_step).all())

    def extra_repr(self) -> str:
        """Edge, target and state for ``print(module)``."""
        state = "" if self.enabled else ", disabled"
        return (
            f"{self.edge}, bits<={self.spec.bits}, {self.spec.estimator}, "
            f"{self.spec.offset}{state}"
        )

    @abstractmethod
    def quantize(self, value: Tensor) -> Tensor:
        """The quantized value, whether enabled or not."""

    def forward(self, value: Tensor) -> Tensor:
        """Quantize, or pass on unchanged where disabled."""
        return self.quantize(value) if self.enabled else value

    def _require_calibration(self) -> None:
        if not self.is_calibrated:
            raise CalibrationError(
                f"{self.edge} was never calibrated; run the Calibrate pass, or "
                "gdnsq_fx.prepare, which does"
            )


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
        """Lowest level b, on the grid of the offset mode."""
        return snap_offset(self.lower, self.step, self.spec.offset)

    def quantize(self, value: Tensor) -> Tensor:
        """See `quantize_activation`."""
        lower = None if self.nonnegative else self.offset
        return quantize_activation(
            value, self.step, self.range, lower, self.spec.estimator, self.kernels
        )

    @torch.no_grad()
    def codes(self, value: Tensor) -> Tensor:
        """Whole codes from 0, as floats, of the value's shape."""
        codes = to_codes(wide(value, self.step), self.step, self.offset)
        codes = codes.clamp_(min=0.0)
        return torch.minimum(codes, max_code(self.step, self.range), out=codes)

    @torch.no_grad()
    def clipped(self, value: Tensor) -> Tensor:
        """Where a value lies outside the clamp, bool of the value's shape."""
        lower = self.offset
        return (value < lower) | (value > lower + self.range - self.step)

    @torch.no_grad()
    def clipped_count(self, value: Tensor) -> Tensor:
        """How many values are `clipped`, a scalar tensor of the value's precision.

        Those that the clamp moves. A sum of floats takes a fraction of the time that
        comparing and counting takes; it is exact up to 2^24.
        """
        value, lower = wide(value, self.step), self.offset
        moved = torch.maximum(value, lower)
        torch.minimum(moved, lower + self.range - self.step, out=moved)
        return moved.ne_(value).sum()

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
        span = high - low
        if not span > 0.0:  # a constant: any grid that holds it will do
            span = abs(high) or 1.0
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


class WeightQuantizer(Quantizer):
    """One step for each output channel, or for the tensor; the range is the weight's.

    Capacity of a channel is log2((max - min)/s + 1) bits per element, so its gradient
    reaches the channel's own extreme weights and pulls outliers in (arXiv 2508.14004).
    """

    def __init__(
        self, edge: str, spec: QuantSpec, layout: ChannelLayout, weight: Tensor
    ) -> None:
        super().__init__(edge, spec)
        self.layout = layout
        self._seen: Seen | None = None
        self.dims = layout.reduced_dims(weight.ndim)
        shape = list(layout.grouped(weight).shape)
        for dim in self.dims:
            shape[dim] = 1
        self.log2_step = nn.Parameter(
            torch.full(shape, math.nan, device=weight.device, dtype=torch.float32)
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without what forward has seen, which is of this very weight."""
        return {**self.__dict__, "_seen": None}

    @torch.no_grad()
    def extremes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest weight of each scale group, shaped like ``log2_step``."""
        view = self.layout.grouped(weight)
        low = wide(view.amin(self.dims, keepdim=True), self.log2_step)
        return low, wide(view.amax(self.dims, keepdim=True), self.log2_step)

    def learnable_extremes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The same, differentiable; those that the last forward met where it may."""
        seen = self._seen
        if seen is None or not seen.is_of(weight):
            seen = self._look(weight)
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return seen.low, seen.high
        view = self.layout.grouped(weight)
        return with_gradient(view, seen.low, seen.high, self.dims, seen.places)

    def offset(self, weight: Tensor) -> Tensor:
        """Lowest level b of each scale group; no gradient."""
        return self._grid(weight)[1]

    def quantize(self, value: Tensor) -> Tensor:
        """See `quantize_weight`."""
        step, lower, top = self._grid(value, remember=self.training)
        view = self.layout.grouped(value)
        quantized = quantize_weight(
            view, step, lower, self.dims, self.spec.estimator, top, self.kernels
        )
        return quantized.view_as(value)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        """Whole codes from 0, as floats, of the weight's shape."""
        codes = weight_codes(self.layout.grouped(weight), *self._grid(weight))
        return codes.view_as(weight)

    def capacity(self, weight: Tensor) -> Tensor:
        """log2((max - min)/s + 1) of each scale group, bits per element."""
        return weight_capacity(*self.learnable_extremes(weight), self.log2_step)

    @torch.no_grad()
    def levels(self, weight: Tensor) -> Tensor:
        """Number of levels of each scale group that the weight spans, as floats."""
        self._require_calibration()
        return weight_codes(self.extremes(weight)[1], *self._grid(weight)) + 1.0

    @torch.no_grad()
    def project(self, weight: Tensor, cap: float) -> None:
        """Raise steps until every capacity is at most ``cap`` (at least one bit)."""
        self.forget()
        low, high = self.extremes(weight)
        self.log2_step.copy_(projected_weight(self.log2_step, low, high, cap))

    @torch.no_grad()
    def open_to(self, weight: Tensor, bits: float) -> None:
        """Place 2^bits levels evenly over each scale group."""
        low, high = self.extremes(weight)
        span = (high - low).to(self.log2_step.dtype)
        span = torch.where(span > 0, span, low.abs().to(span.dtype))
        span = torch.where(span > 0, span, torch.ones_like(span))
        step = torch.log2(span / (2.0**bits - 1.0))
        self.log2_step.copy_(step.clamp(min=MIN_LOG2_STEP))

    def forget(self) -> None:
        """Look at the weight anew, which an update may change and keep its version."""
        self._seen = None

    @torch.no_grad()
    def _look(self, weight: Tensor) -> Seen:
        """Extremes of a weight and where they stand."""
        low, high, places = located(self.layout.grouped(weight), self.dims)
        low, high = wide(low, self.log2_step), wide(high, self.log2_step)
        return Seen(weakref.ref(weight), weight._version, low, high, places)

    def _grid(
        self, weight: Tensor, *, remember: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Step, lowest level and largest code of each scale group.

        The offset may lie half a step below the least weight, and steps are floats: the
        largest code is that of the whole bits which the capacity stands for, so that
        neither can add a level to a tensor whose capacity meets its target.
        """
        step = self.step
        with torch.no_grad():
            # Whoever traces symbolically hands in a proxy.
            known = isinstance(weight, Tensor)  # pyright: ignore[reportUnnecessaryIsInstance]
            if remember and known and not torch.compiler.is_compiling():
                self._seen = self._look(weight)
                low, high = self._seen.low, self._seen.high
            else:
                low, high = self.extremes(weight)
            capacity = torch.log2((high - low) / step + 1.0)
            whole = torch.ceil(capacity - CAPACITY_TOLERANCE).clamp(min=MIN_CAPACITY)
            lower = snap_offset(low, step.detach(), self.spec.offset)
        return step, lower, torch.exp2(whole) - 1.0


def use_kernels(module: nn.Module, kernels: Kernels) -> None:
    """Choose what computes the quantizers of a prepared model.

    Args:
        module: anything that contains quantizers.
        kernels: ``eager``; ``compile``, where a compiler works; or ``auto``, compiled
            on CUDA devices.

    Raises:
        ConfigError: another choice.
    """
    checked_kernels(kernels)
    for quantizer in module.modules():
        if isinstance(quantizer, Quantizer):
            quantizer.kernels = kernels


@contextmanager
def quantization_disabled(module: nn.Module) -> Generator[None]:
    """Run a prepared model at identity precision inside the ``with`` block.

    Args:
        module: anything that contains quantizers; they are switched back afterwards.
    """
    with _switched(module, False):
        yield


@contextmanager
def quantization_enabled(module: nn.Module) -> Generator[None]:
    """Run a prepared model with every quantizer on inside the ``with`` block."""
    with _switched(module, True):
        yield


@contextmanager
def _switched(module: nn.Module, enabled: bool) -> Generator[None]:
    quantizers = [m for m in module.modules() if isinstance(m, Quantizer)]
    switches = [q.enabled for q in quantizers]
    for quantizer in quantizers:
        quantizer.enabled = enabled
    try:
        yield
    finally:
        for quantizer, before in zip(quantizers, switches, strict=True):
            quantizer.enabled = before
