"""From values to codes to levels: what the two quantizers compute forward.

GDNSQ (arXiv 2508.14004, the noisy channel):

    activation   x' = clamp(x, b, b + q - s);  k = round((x' - b)/s);  y = s*k + b
    weight       k = round((w - b)/s);  y = s*k + b,  b = min(w), no clamp

Rounding is half to even and monotone, so the activation clamps codes instead of values:
``k = clamp(round((x - b)/s), 0, round(q/s - 1))`` is the same code, and the very
arithmetic that the integer model uses (`to_codes`, `from_codes`).
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def activation_levels(
    x: Tensor, step: Tensor, range_: Tensor, lower: Tensor | None
) -> Tensor:
    """Forward of `quantize_activation`, whose arguments it takes."""
    value = wide(x, step)
    top = max_code(step, range_)
    if lower is None:  # x - 0 is x: two passes over memory less
        codes = value.div(step).round_().clamp_(min=0.0)
        return _at_most(codes, top).mul_(step).to(x.dtype)
    codes = to_codes(value, step, lower).clamp_(min=0.0)
    return _at_most(codes, top).mul_(step).add_(lower).to(x.dtype)


def weight_levels(
    weight: Tensor, step: Tensor, lower: Tensor, top: Tensor | None
) -> Tensor:
    """Forward of `quantize_weight`, whose arguments it takes."""
    codes = weight_codes(weight, step, lower, top)
    return codes.mul_(step).add_(lower).to(weight.dtype)


def weight_codes(
    weight: Tensor, step: Tensor, lower: Tensor, top: Tensor | None
) -> Tensor:
    """Whole codes of a weight, as floats; arguments as in `quantize_weight`."""
    codes = to_codes(wide(weight, step), step, lower).clamp_(min=0.0)
    return codes if top is None else _at_most(codes, top)


def _at_most(codes: Tensor, top: Tensor) -> Tensor:
    """In the memory of the codes; not for proxies, through which gradients may flow.

    Nor for compilers, which refuse ``out=`` in other strides, and need none of it.
    """
    known = isinstance(codes, Tensor)  # pyright: ignore[reportUnnecessaryIsInstance]
    if known and not torch.compiler.is_compiling():
        return torch.minimum(codes, top, out=codes)
    return torch.minimum(codes, top)


def wide(value: Tensor, step: Tensor) -> Tensor:
    """The value in the step's precision: codes are wrong in half precision."""
    return value.to(torch.promote_types(value.dtype, step.dtype))
