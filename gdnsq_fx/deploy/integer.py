"""The two operations of the integer graph: values to codes, codes to values.

They use the very arithmetic of the fake-quantizers (`to_codes`, `from_codes`), so that
the converted model computes exactly what was trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdnsq_fx.quantize.frozen import code_dtype
from gdnsq_fx.quantize.levels import from_codes, to_codes, wide


def quantize(value: Tensor, step: Tensor, offset: Tensor, max_code: int) -> Tensor:
    """Codes ``clamp(round((value - offset) / step), 0, max_code)``.

    Args:
        value: any shape, floating point.
        step, offset: broadcastable to ``value``.
        max_code: largest code.

    Returns:
        uint8 where ``max_code`` < 256, else int32.
    """
    # Two floats: torch.onnx cannot decompose bounds of two types.
    codes = to_codes(wide(value, step), step, offset).clamp_(0.0, float(max_code))
    return codes.to(code_dtype(max_code))


def dequantize(
    codes: Tensor, step: Tensor, offset: Tensor, dtype: torch.dtype
) -> Tensor:
    """Levels ``step * codes + offset``.

    Args:
        codes: whole numbers, any shape.
        step, offset: broadcastable to ``codes``.
        dtype: of the result.
    """
    kind = torch.promote_types(dtype, step.dtype)
    return from_codes(codes.to(kind), step, offset).to(dtype)
