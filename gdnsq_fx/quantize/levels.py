"""From values to codes to levels: what the two quantizers compute forward.

GDNSQ (arXiv 2508.14004, the noisy channel):

    activation   x' = clamp(x, b, b + q - s);  k = round((x' - b)/s);  y = s*k + b
    weight       k = round((w - b)/s);  y = s*k + b,  b = min(w), no clamp

Rounding is half to even and monotone, so the activation clamps codes instead of values:
``k = clamp(round((x - b)/s), 0, round(q/s - 1))`` is the same code, and the very
arithmetic that the integer model uses (`to_codes`, `from_codes`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdnsq_fx.quantize.blocks import blocks, is_plain
from gdnsq_fx.quantize.capacity import CAPACITY_TOLERANCE, MIN_CAPACITY
from gdnsq_fx.spec import Offset


def to_codes(value: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    """Unclamped codes ``round_half_to_even((value - offset) / step)``, as floats."""
    return value.sub(offset).div_(step).round_()


def from_codes(codes: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    """Levels ``step * codes + offset`` of codes held as floats."""
    return codes.mul(step).add_(offset)


def from_codes_(codes: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    """As `from_codes`, in the memory of codes that nothing reads afterwards.

    For passes without gradients, and outside what ``torch.fx`` may trace.
    """
    return codes.mul_(step).add_(offset)


def max_code(step: Tensor, range_: Tensor) -> Tensor:
    """Largest code of a clamped quantizer, ``round(q/s - 1)`` (scalar tensor)."""
    return (range_ / step - 1.0).round()


def snap_offset(offset: Tensor, step: Tensor, mode: Offset) -> Tensor:
    """Offset on the grid of its mode; the gradient passes as if it were not moved.

    Args:
        offset: lowest level b.
        step: step s, broadcastable to ``offset``.
        mode: ``free`` leaves b; ``half_step`` and ``integer`` move it to the nearest
            multiple of s/2 and of s.
    """
    if mode == "free":
        return offset
    unit = (step if mode == "integer" else step / 2).detach()
    snapped = torch.round(offset.detach() / unit) * unit
    # The difference is exactly zero, so the value stays exactly on its grid.
    return snapped + (offset - offset.detach())


def beside_midway(offset: Tensor, step: Tensor) -> Tensor:
    """Move an odd multiple of half a step up by a sixty-fourth of a step.

    0, which activations often are to rounding (GELU, masks), would lie midway between
    two levels, and float rounding would choose one of them.
    """
    step = step.detach()
    odd = torch.round(offset.detach() / (step / 2)).remainder(2.0)
    return offset + odd * step / 64


def lowest_level(lower: Tensor, step: Tensor, mode: Offset) -> Tensor:
    """Where the levels of an activation begin: on the grid of the mode, beside midway.

    Args:
        lower: what was learned, a scalar; gradients pass as if it were not moved.
        step: step s, a scalar.
        mode: of offsets.
    """
    snapped = snap_offset(lower, step, mode)
    return beside_midway(snapped, step) if mode == "half_step" else snapped


def weight_bounds(
    low: Tensor, high: Tensor, step: Tensor, mode: Offset
) -> tuple[Tensor, Tensor]:
    """Lowest level and largest code of each scale group of a weight.

    The offset may lie half a step below the least weight, and steps are floats: the
    largest code is that of the whole bits which the capacity stands for, so that
    neither can add a level to a tensor whose capacity meets its target.

    Args:
        low, high: its extremes.
        step: its steps, of one shape with them.
        mode: of offsets.
    """
    capacity = torch.log2((high - low) / step + 1.0)
    whole = torch.ceil(capacity - CAPACITY_TOLERANCE).clamp(min=MIN_CAPACITY)
    return snap_offset(low, step.detach(), mode), torch.exp2(whole) - 1.0


def activation_levels(
    x: Tensor, step: Tensor, range_: Tensor, lower: Tensor | None
) -> Tensor:
    """Forward of `quantize_activation`, whose arguments it takes."""
    return _levels(wide(x, step), step, lower, max_code(step, range_)).to(x.dtype)


def weight_levels(
    weight: Tensor, step: Tensor, lower: Tensor, top: Tensor | None
) -> Tensor:
    """Forward of `quantize_weight`, whose arguments it takes."""
    return _levels(wide(weight, step), step, lower, top).to(weight.dtype)


def clamped_codes(
    value: Tensor, step: Tensor, lower: Tensor | None, top: Tensor | None
) -> Tensor:
    """Whole codes, as floats in the precision of the step.

    Args:
        value: any shape.
        step, lower, top: of one shape, broadcastable to the value; a lower bound that
            is None is 0, a largest code that is None is not enforced.
    """
    value = wide(value, step)
    if not is_plain(value):
        return _traced_codes(value, step, lower, top)
    codes = torch.empty_like(value)
    for (part, into), (s, low, high) in blocks((value, codes), step, lower, top):
        _write_codes(part, into, s, low, high)
    return codes


def _levels(
    value: Tensor, step: Tensor, lower: Tensor | None, top: Tensor | None
) -> Tensor:
    if not is_plain(value):
        codes = _traced_codes(value, step, lower, top).mul_(step)
        return codes if lower is None else codes.add_(lower)
    levels = torch.empty_like(value)
    for (part, into), (s, low, high) in blocks((value, levels), step, lower, top):
        _write_codes(part, into, s, low, high)
        into.mul_(s)
        if low is not None:
            into.add_(low)
    return levels


def _write_codes(
    value: Tensor, into: Tensor, step: Any, lower: Tensor | None, top: Tensor | None
) -> None:
    if lower is None:  # x - 0 is x
        torch.div(value, step, out=into)
    else:
        torch.sub(value, lower, out=into).div_(step)
    into.round_()
    if top is not None and top.numel() == 1 and top.device.type == "cpu":
        into.clamp_(0.0, float(top))  # one pass; on a CPU there is nothing to wait for
        return
    into.clamp_(min=0.0)
    if top is not None:
        torch.minimum(into, top, out=into)


def _traced_codes(
    value: Tensor, step: Tensor, lower: Tensor | None, top: Tensor | None
) -> Tensor:
    """Without ``out=``, which compilers refuse in other strides."""
    steps = value.div(step) if lower is None else value.sub(lower).div_(step)
    codes = steps.round_().clamp_(min=0.0)
    return codes if top is None else torch.minimum(codes, top)


def wide(value: Tensor, step: Tensor) -> Tensor:
    """The value in the step's precision: codes are wrong in half precision."""
    return value.to(torch.promote_types(value.dtype, step.dtype))
