"""The quantizers of QONNX, and a graph of them as a file, for FPGA flows.

    Quant(x, scale, zero_point, bit_width) =
        scale * (clamp(round(x / scale + zero_point), low, high) - zero_point)
    BipolarQuant(x, scale) = scale where x >= 0, else -scale

with low and high 0 and 2^b - 1, or of two's complement if ``signed``, where ``narrow``
leaves out the lowest (arXiv 2206.07527, section V). They have no arithmetic in torch
here: they stand in graphs that are to be exported, nothing else.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from gdnsq_fx.deploy.onnx import onnx_model, save
from gdnsq_fx.deploy.program import Example

_DOMAIN = "qonnx.custom_op.general"


def quant(
    value: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bit_width: Tensor,
    signed: bool,
    narrow: bool,
) -> Tensor:
    """A ``Quant`` node.

    Args:
        value: any shape.
        scale, zero_point: broadcastable to it; a zero point need not be whole.
        bit_width: a scalar.
        signed, narrow: which codes there are.
    """
    attributes = {
        "signed": int(signed),
        "narrow": int(narrow),
        "rounding_mode": "ROUND",  # half to even
    }
    inputs = (value, scale, zero_point, bit_width)
    return _node("Quant", inputs, attributes)


def bipolar_quant(value: Tensor, scale: Tensor) -> Tensor:
    """A ``BipolarQuant`` node: levels ``-scale`` and ``scale``."""
    return _node("BipolarQuant", (value, scale), {})


def write_qonnx(model: GraphModule, example: Example, path: Path) -> None:
    """Write a graph that `LowerToQonnx` made; weights are float32 values on levels.

    Raises:
        ExportError: ``torch.export`` or ``torch.onnx`` refuses the model.
        MissingExtraError: ``onnx`` or ``onnxscript`` is not installed.
    """
    # Tools for FPGAs ask for the shape of every value.
    save(onnx_model(model, example), path, shapes=True)


def _node(
    name: str, inputs: tuple[Tensor, ...], attributes: dict[str, int | str]
) -> Tensor:
    given: dict[
        str, int | float | str | bool | list[int] | list[float] | list[str] | list[bool]
    ] = {**attributes}
    return torch.onnx.ops.symbolic(
        f"{_DOMAIN}::{name}",
        inputs,
        given,  # pyright: ignore[reportArgumentType]
        dtype=inputs[0].dtype,
        shape=inputs[0].shape,
        version=1,
    )
