"""LowerToQonnx: the integer graph in the quantizers of QONNX, for FPGA flows.

    %codes = quantize(%x, %step, %offset, 15);  %dq = dequantize(%codes, ...)
      ->
    %dq = quant(%x, %scale, %zero_point, %bits, signed, narrow)

    %w = dequantize(%codes, %step, %offset, float32)
      ->
    %w = quant(%values, %scale, %zero_point, %bits, signed, narrow)

Scales, zero points and bits are those that were trained: a level ``step * k + offset``
is ``step * (k - zero_point)`` with ``zero_point = -offset / step``. Signed codes with
zero point 0 stand where they are the same levels, and bipolar ones where a weight has
two about 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from gdnsq_fx.annotations import model_facts
from gdnsq_fx.deploy.integer import dequantize, quantize
from gdnsq_fx.deploy.qdq import is_deployable
from gdnsq_fx.deploy.qonnx import bipolar_quant, quant
from gdnsq_fx.errors import PassError
from gdnsq_fx.nested import graphs_of
from gdnsq_fx.stored import attribute, stored_name

from ._base import Pass, rewrite_each
from ._rebuilt import rebuilt

# A zero point counts as whole if it is up to float32 rounding.
_EXACT = 1e-4


@dataclass(frozen=True, eq=False)
class LowerToQonnx(Pass):
    """Emit QONNX quantizers; the graph can be exported after that, and not run."""

    def requires(self, graph_module: GraphModule) -> None:
        """A converted model, not in deployable form."""
        model_facts(graph_module)
        if is_deployable(graph_module):
            raise PassError(
                f"{self.name} writes levels as they were trained; give it what "
                "gdnsq_fx.convert returns without deployable=True"
            )
        if not any(_dequantized(one) for one in graphs_of(graph_module)):
            raise PassError(
                f"{self.name} needs a converted model; call gdnsq_fx.convert first"
            )

    @torch.no_grad()
    def call(self, graph_module: GraphModule) -> PassResult:
        """A new graph module; the given one is used up."""
        modified = self.rewrite(graph_module)
        return PassResult(rebuilt(graph_module, "QonnxModel"), modified)

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Replace the operations in place."""
        return rewrite_each(graph_module, _rewrite)


def _dequantized(owner: GraphModule) -> list[Node]:
    return list(owner.graph.find_nodes(op="call_function", target=dequantize))


def _rewrite(owner: GraphModule) -> bool:
    found = _dequantized(owner)
    for node in found:
        codes = node.args[0]
        assert isinstance(codes, Node)
        if codes.op == "get_attr":
            _emit_weight(owner, node)
        else:
            _emit_activation(owner, node, codes)
    return bool(found)


def _emit_weight(owner: GraphModule, node: Node) -> None:
    codes, step, offset = (attribute(owner, stored_name(node, i)) for i in range(3))
    kind = node.args[3]
    assert isinstance(kind, torch.dtype)
    values = dequantize(codes, step, offset, kind)
    value = _stored(owner, node, "values", values)
    max_code = int(codes.max())
    if max_code == 1 and _is(-offset / step, 0.5):
        # Activations stay with `quant`, which has an exact 0 on the level they do.
        scale = _stored(owner, node, "scale", (step / 2).to(kind))
        node.target, node.args = bipolar_quant, (value, scale)
        return
    _emit(owner, node, value, max_code)


def _emit_activation(owner: GraphModule, node: Node, codes: Node) -> None:
    assert codes.target is quantize
    value, max_code = codes.args[0], codes.args[3]
    assert isinstance(value, Node) and isinstance(max_code, int)
    if (max_code + 1) & max_code:  # fewer levels than the bits have
        step, offset = (attribute(owner, stored_name(node, i)) for i in (1, 2))
        with owner.graph.inserting_before(node):
            top = float(step * max_code + offset)
            value = owner.graph.call_function(torch.clamp, (value,), {"max": top})
    _emit(owner, node, value, max_code)
    if not codes.users:
        owner.graph.erase_node(codes)


def _emit(owner: GraphModule, node: Node, value: Node, max_code: int) -> None:
    """Turn a dequantization into the quantizer of a value."""
    step, offset = (attribute(owner, stored_name(node, i)) for i in (1, 2))
    kind = node.args[3]
    assert isinstance(kind, torch.dtype)
    zero_point = -offset / step
    bits = max(1, max_code.bit_length())
    half = 2 ** (bits - 1)
    narrow = bits > 1 and max_code == 2 * half - 2 and _is(zero_point, half - 1)
    signed = narrow or (bits > 1 and _is(zero_point, half))
    if signed:
        zero_point = torch.zeros_like(zero_point)
    elif _is(zero_point, zero_point.round()):
        zero_point = zero_point.round()
    stored = [
        _stored(owner, node, what, tensor.to(kind))
        for what, tensor in (
            ("scale", step),
            ("zero_point", zero_point),
            ("bit_width", torch.tensor(float(bits))),
        )
    ]
    node.target, node.args = quant, (value, *stored, signed, narrow)


def _is(value: Tensor, wanted: Tensor | float) -> bool:
    return bool(((value - wanted).abs() < _EXACT).all())


def _stored(owner: GraphModule, node: Node, what: str, tensor: Tensor) -> Node:
    """A new stored tensor beside the step of a quantizer."""
    prefix = stored_name(node, 1).rpartition(".")[0]
    owner.get_submodule(prefix).register_buffer(what, tensor)
    with owner.graph.inserting_before(node):
        return owner.graph.get_attr(f"{prefix}.{what}")
