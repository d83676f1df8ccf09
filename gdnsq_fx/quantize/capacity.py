"""Capacity of quantizers, and the steps that keep it under a cap.

Formulas on tensors of any shape, so that one call serves a quantizer or many of them
side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_CAPACITY = 1.0
# What float rounding may add to the capacity of a projected quantizer, in bits.
CAPACITY_TOLERANCE = 1e-4
# Steps below this are denormal numbers, and their reciprocals infinite.
MIN_LOG2_STEP = -120.0
# Both signs alike: a normalization folded into a channel may turn its sign.
INT8_MAX = 127


def weight_capacity(low: Tensor, high: Tensor, log2_step: Tensor) -> Tensor:
    """log2((max - min)/s + 1), bits per element (arXiv 2508.14004)."""
    # A product: the derivative of a quotient squares the step, which underflows.
    return torch.log2((high - low) * torch.exp2(-log2_step) + 1.0)


def projected_weight(
    log2_step: Tensor, low: Tensor, high: Tensor, cap: float, *, within_int8: bool
) -> Tensor:
    """Log2 of the steps nearest to those given with 1 <= capacity <= ``cap``.

    Args:
        log2_step, low, high: of each scale group, of one shape.
        cap: bits.
        within_int8: whole steps from 0 are to stay within 127 on both sides, as long as
            that leaves one bit.
    """
    span = (high - low).to(log2_step.dtype)
    least = torch.log2(span / (2.0**cap - 1.0)).clamp(min=MIN_LOG2_STEP)
    most = torch.log2(span).clamp(min=MIN_LOG2_STEP)
    if within_int8:
        reach = torch.maximum(high, -low).to(log2_step.dtype)
        least = torch.maximum(least, torch.log2(reach / INT8_MAX).minimum(most))
    # A constant channel has no span: any step represents it, so keep its own.
    projected = log2_step.clamp(least, torch.maximum(least, most))
    return torch.where(span > 0, projected, log2_step)


def projected_activation(
    log2_step: Tensor, log2_range: Tensor, cap: float
) -> tuple[Tensor, Tensor]:
    """Log2 of step and range with 1 <= log2(q/s) <= ``cap``.

    Above the cap the step yields. Below one bit, step and range meet halfway: were the
    step alone to yield, it could never grow at a cap of one bit, and the scale would
    follow the range only.
    """
    step = log2_step.clamp(min=log2_range - cap)
    missing = (MIN_CAPACITY - (log2_range - step)).clamp(min=0.0)
    range_ = log2_range + missing / 2
    return step.clamp(max=range_ - MIN_CAPACITY), range_
