"""The vocabulary of the deployable graph: quantize and dequantize as compilers know it.

    q  = quantize_per_tensor(x, scale, zero_point, 0, 255, uint8); q = clamp(q, max=M)
    dq = dequantize_per_tensor(q, scale, zero_point, 0, 255, uint8)
    w  = dequantize_per_channel(codes, scales, zeros, axis, -128, 127, int8)

``torch.onnx`` and inductor recognize these operations. The largest code M is a clamp of
its own because both of them silently lose a ``quant_max`` below 255.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from gdnsq_fx.errors import PassError

KEY = "gdnsq_fx.deployable"
ACTIVATION_RANGE = (0, 255, torch.uint8)
WEIGHT_RANGE = (-128, 127, torch.int8)


@dataclass(frozen=True)
class DeployFacts:
    """What the deployable form changed, kept in ``graph_module.meta``.

    Attributes:
        moved: edge -> largest distance of a level from the learned one, in steps, for
            edges whose levels have moved by more than float rounding.
        kept: edge -> why it stays quantized by floating-point arithmetic.
    """

    moved: Mapping[str, float] = field(default_factory=dict[str, float])
    kept: Mapping[str, str] = field(default_factory=dict[str, str])


def deploy_facts(module: nn.Module) -> DeployFacts:
    """Facts of a model in deployable form.

    Raises:
        PassError: it is not in that form.
    """
    if not is_deployable(module):
        raise PassError(
            f"{type(module).__name__} is not in deployable form; call "
            "gdnsq_fx.convert(qmodel, deployable=True)"
        )
    found: DeployFacts = module.meta[KEY]  # type: ignore[index, assignment]  # pyright: ignore
    return found


def is_deployable(module: nn.Module) -> bool:
    """Whether a model is in deployable form."""
    return isinstance(module, GraphModule) and KEY in module.meta


def operation(name: str) -> Any:
    """The default overload of an operation such as ``quantize_per_tensor``."""
    # torch registers this library when its file is first imported, and not before.
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    return getattr(torch.ops.quantized_decomposed, name).default


def calls(node: object, name: str) -> bool:
    """Whether a node calls one of the operations."""
    return (
        isinstance(node, Node)
        and node.op == "call_function"
        and str(node.target) == f"quantized_decomposed.{name}.default"
    )


def is_activation(node: object) -> bool:
    """Whether a node is a dequantized activation."""
    return calls(node, "dequantize_per_tensor") and not is_weight(node)


def is_weight(node: object) -> bool:
    """Whether a node is a dequantized weight."""
    if not isinstance(node, Node):
        return False
    source = node.args[0] if node.args else None
    stored = isinstance(source, Node) and source.op == "get_attr"
    kinds = ("dequantize_per_channel", "dequantize_per_tensor")
    return stored and any(calls(node, kind) for kind in kinds)
