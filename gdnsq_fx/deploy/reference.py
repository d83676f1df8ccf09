"""The yardstick: a model in deployable form, its layers in pure integer arithmetic.

Between a dequantization and the layer that reads it nothing becomes a float: codes less
their zero point meet codes of weights in int64, the bias is a whole number, and the sum
is exact in any order. What leaves a layer is ``sum * s_x * s_w[c]``, multiplied in
float64 and rounded once to the precision of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_map

from gdnsq_fx.annotations import facts
from gdnsq_fx.deploy.qdq import calls, deploy_facts, is_activation, is_weight
from gdnsq_fx.opinfo import OpInfo

# A bias on its grid is a whole multiple of its unit up to the rounding of float32.
_OFF_GRID, _FLOAT32 = 1e-3, 2.0**-22


@dataclass(frozen=True, eq=False)
class Integers:
    """Real values ``numbers * scale``.

    Attributes:
        numbers: int64, any shape.
        scale: float64, a scalar, or one for each channel of a weight.
        axis: dimension of the channels, None for a scalar.
        dtype: of the values in the model.
    """

    numbers: Tensor
    scale: Tensor
    axis: int | None = None
    dtype: torch.dtype = torch.float32

    def real(self) -> Tensor:
        """The values, rounded once."""
        scale = self.scale
        if self.axis is not None:
            shape = [1] * self.numbers.ndim
            shape[self.axis] = -1
            scale = scale.reshape(shape)
        return (self.numbers.double() * scale).to(self.dtype)


class ReferenceExecutor(Interpreter):
    """Runs a model in deployable form; ``ReferenceExecutor(model).run(*inputs)``.

    Attributes:
        integer: names of the layers that ran in integers.
        floating: those that multiplied and accumulated in floating point, because an
            operand has no grid of eight bits or the operation is none of convolution,
            linear layer and matrix product.
        largest: largest magnitude of an accumulator; int32 holds 2^31 - 1.

    Raises:
        PassError: the model is not in deployable form.
    """

    def __init__(self, model: GraphModule) -> None:
        deploy_facts(model)
        super().__init__(model)
        self.integer: set[str] = set()
        self.floating: set[str] = set()
        self.largest = 0

    def run_node(self, n: Node) -> Any:
        """One node, in integers where its operands are."""
        with torch.no_grad():
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            found = self._in_integers(n, args, kwargs)
            if found is not None:
                return found
            args, kwargs = tree_map(_real, (args, kwargs))
            op = facts(n).op
            if op is not None and op.is_compute:
                self.floating.add(n.name)
            if calls(n, "quantize_per_tensor"):
                return _quantized(*args)
            return getattr(self, n.op)(n.target, args, kwargs)

    def _in_integers(self, node: Node, args: Any, kwargs: Any) -> Any:
        """The value of a node on integers, None where floats have to do."""
        if is_weight(node) or is_activation(node):
            return _dequantized(node, args)
        op = facts(node).op
        if op is None or not any(isinstance(a, Integers) for a in args):
            return None
        if op.kind == "view":
            return _viewed(args, lambda *given: self._call(node, given, kwargs))
        bound = op.named(args, kwargs, target=node.target)
        found = None
        if {"input", "weight"} <= bound.keys() and op.is_compute:
            found = self._layer(node, op, args, kwargs, bound)
        elif op.name == "matmul":
            found = _product(bound.get("input"), bound.get("other"))
        elif op.name == "add":
            return _sum(bound)
        if found is None:
            return None
        self.integer.add(node.name)
        if found.numbers.numel():
            self.largest = max(self.largest, int(found.numbers.abs().max()))
        return found.real()

    def _call(self, node: Node, args: Any, kwargs: Any) -> Any:
        return getattr(self, node.op)(node.target, args, kwargs)

    def _layer(
        self, node: Node, op: OpInfo, args: Any, kwargs: Any, bound: Mapping[str, Any]
    ) -> Integers | None:
        value, weight, bias = bound["input"], bound["weight"], bound.get("bias")
        if not isinstance(value, Integers) or not isinstance(weight, Integers):
            return None
        if value.axis is not None:  # a stored table, with a scale for each row
            return None
        unit = value.scale * weight.scale
        given: dict[str, Any] = {"input": value.numbers, "weight": weight.numbers}
        if bias is not None:
            whole = torch.round(_real(bias).double() / unit)
            off = (_real(bias).double() / unit - whole).abs()
            if bool((off > _OFF_GRID + whole.abs() * _FLOAT32).any()):
                return None
            given["bias"] = whole.long()
        for name, number in given.items():
            args, kwargs = op.replaced(args, kwargs, name, number, target=node.target)
        total: Tensor = self._call(node, args, kwargs)
        # Channels stand before the dimensions of the kernel; last in a linear layer.
        axis = total.ndim - (weight.numbers.ndim - 1)
        return Integers(total, unit, None if weight.axis is None else axis, value.dtype)


def _dequantized(node: Node, args: Any) -> Integers:
    codes, scale, zero_point = args[:3]
    if calls(node, "dequantize_per_channel"):
        return Integers(codes.long(), scale.double(), int(args[3]))
    numbers = codes.long() - int(zero_point)
    return Integers(numbers, torch.tensor(scale, dtype=torch.float64))


def _quantized(
    value: Tensor, scale: float, zero_point: int, low: int, high: int, dtype: Any
) -> Tensor:
    """Codes, from a quotient in float64: no rounding before that to whole numbers."""
    codes = torch.round(value.double() / scale) + zero_point
    return codes.clamp_(low, high).to(dtype)


def _viewed(args: Any, call: Callable[..., Any]) -> Integers | None:
    value = args[0]
    if not isinstance(value, Integers) or value.axis is not None:
        return None
    moved = call(value.numbers, *args[1:])
    if not isinstance(moved, Tensor):  # a tuple of views
        return None
    return Integers(moved, value.scale, None, value.dtype)


def _product(first: Any, second: Any) -> Integers | None:
    if not isinstance(first, Integers) or not isinstance(second, Integers):
        return None
    if first.axis is not None or second.axis is not None:
        return None
    total = torch.matmul(first.numbers, second.numbers)
    return Integers(total, first.scale * second.scale, None, first.dtype)


def _sum(bound: Mapping[str, Any]) -> Tensor | None:
    """Of two tensors on one grid."""
    first, second = bound.get("input"), bound.get("other")
    if not isinstance(first, Integers) or not isinstance(second, Integers):
        return None
    scalar = first.axis is None and second.axis is None
    if not scalar or first.scale != second.scale or "alpha" in bound:
        return None
    total = first.numbers + second.numbers
    return Integers(total, first.scale, None, first.dtype).real()


def _real(value: Any) -> Any:
    return value.real() if isinstance(value, Integers) else value
