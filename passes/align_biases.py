"""AlignBiases: biases go where the integers of the deployable form can hold them.

    norm(conv(x, w, b)):  beta += round(f / u) * u - f,  f = (b - m) * g + beta
    linear(x, w, b):      b = round(b / u) * u

An integer kernel adds a bias in units u of its accumulator, the scale of ``x`` times
that of ``w`` of a channel, and `LowerToQdq` rounds it to them. That moves it by little,
but codes of few bits amplify little from layer to layer: 17 % of the images of
ResNet-20 at W2A2 had another likeliest class. So the rounding belongs to the model that
is trained and judged, and `finetune` ends with it; from then on the deployable form
computes what the fine-tuned model does. ``m`` and ``g`` are those of `FoldIntoScales`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from gdnsq_fx.annotations import compute_nodes, facts
from gdnsq_fx.deploy.grids import int8_weight, uint8_grid
from gdnsq_fx.errors import PassError
from gdnsq_fx.nested import graphs_of
from gdnsq_fx.opinfo import OpInfo
from gdnsq_fx.quantize.activation_quantizer import ActivationQuantizer
from gdnsq_fx.quantize.frozen import FrozenWeight
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer
from gdnsq_fx.sites import require_quantizers
from gdnsq_fx.stored import attribute, stored_value

from ._base import Pass
from ._biases import on_multiples
from ._norms import affine, norm_after, not_foldable, over_channels


@dataclass(frozen=True, eq=False)
class AlignBiases(Pass):
    """Move the biases of a prepared model in place; its graph stays as it is.

    Left alone are layers that the deployable form keeps in floating point, and biases
    that anything else reads.
    """

    def requires(self, graph_module: GraphModule) -> None:
        """A prepared and calibrated model, in evaluation."""
        require_quantizers(graph_module, self.name)
        if graph_module.training:
            raise PassError(
                f"{self.name} counts on running statistics, which change while "
                "training; call eval() on the model first"
            )

    @torch.no_grad()
    def rewrite(self, graph_module: GraphModule) -> bool:
        """Changes parameters; True if one moved."""
        moved: dict[nn.Parameter, Tensor] = {}
        readers: Counter[nn.Parameter] = Counter()
        for owner in graphs_of(graph_module):
            for node in owner.graph.nodes:
                readers.update(_read_by(owner, node))
            layers = (_Layer.of(owner, node) for node in compute_nodes(owner))
            for layer in filter(None, layers):
                found = layer.aligned()
                if found is not None:
                    moved[layer.bias] = found
        alone = [parameter for parameter in moved if readers[parameter] == 1]
        for parameter in alone:
            parameter.copy_(moved[parameter])
        return bool(alone)


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer whose operands are quantized, and what shifts its output.

    Attributes:
        bias: the parameter that moves: beta of a BatchNorm that will be folded into
            the layer, else the bias of the layer itself.
        norm: that BatchNorm, or None.
        own: the bias of the layer itself, or None.
    """

    owner: GraphModule
    node: Node
    op: OpInfo
    activation: ActivationQuantizer
    weight: WeightQuantizer
    bias: nn.Parameter
    norm: Any
    own: Tensor | None

    @classmethod
    def of(cls, owner: GraphModule, node: Node) -> _Layer | None:
        """None where there is nothing to move, or nothing to move it to."""
        op = facts(node).op
        if op is None:
            return None
        bound = op.bind(node)
        activation = _quantizer(owner, bound.get("input"))
        weight = _quantizer(owner, bound.get("weight"))
        if not isinstance(activation, ActivationQuantizer):
            return None
        if not isinstance(weight, WeightQuantizer):
            return None
        source: Any = bound.get("bias")
        own: Any = None
        if isinstance(source, Node):
            if source.op != "get_attr":
                return None
            own = attribute(owner, str(source.target))
        norm = _folded_norm(owner, node, op)
        bias: Any = own if norm is None else norm.bias
        if not isinstance(bias, nn.Parameter) or bias.dtype is not torch.float32:
            return None
        return cls(owner, node, op, activation, weight, bias, norm, own)

    def aligned(self) -> Tensor | None:
        """The parameter where integers can hold what it adds; None where they can't."""
        scale, added = self._affine()
        unit = self._unit(scale)
        if unit is None or (unit.numel() > 1 and unit.shape != added.shape):
            return None
        return (self.bias.double() + on_multiples(added, unit) - added).float()

    def _affine(self) -> tuple[Tensor, Tensor]:
        """What the weight is multiplied by, per channel, and all that is added."""
        if self.norm is None:
            return torch.ones_like(self.bias).double(), self.bias.double()
        scale, shift = affine(self.norm)
        own = 0.0 if self.own is None else self.own.double()
        return scale, (own - self.norm.running_mean.double()) * scale + shift

    def _unit(self, scale: Tensor) -> Tensor | None:
        """The scale of the accumulator, of each channel or of all."""
        bound = self.op.bind(self.node)
        source: Any = bound["weight"]
        frozen = FrozenWeight(self.weight, stored_value(self.owner, source.args[0]))
        if frozen.dtype is not torch.float32:
            return None
        step, offset = frozen.step, frozen.offset
        if self.norm is not None:
            (operand,) = [o for o in self.op.operands(bound) if o.role == "weight"]
            layout = self.op.layout_of(bound, operand)
            factor = over_channels(scale, layout, frozen.codes)
            step, offset = ((t.double() * factor).float() for t in (step, offset))
        made = int8_weight(frozen.codes, step, offset)
        top = self.activation.levels() - 1
        first, lower = self.activation.step, self.activation.offset
        grid = uint8_grid(float(first), float(lower), top)
        if made is None or grid is None:
            return None
        return grid.scale * made.scale.double()


def _read_by(owner: GraphModule, node: Node) -> list[nn.Parameter]:
    """Parameters that a node hands to others, once for each, or that it calls."""
    if node.op == "call_module":
        return list(owner.get_submodule(str(node.target)).parameters())
    if node.op != "get_attr":
        return []
    value: Any = attribute(owner, str(node.target))
    return [value] * len(node.users) if isinstance(value, nn.Parameter) else []


def _folded_norm(owner: GraphModule, node: Node, op: OpInfo) -> Any:
    """The BatchNorm that `FoldIntoScales` will fold into a layer, or None."""
    norm_node = norm_after(owner, node)
    weight: Any = op.bind(node)["weight"]
    if norm_node is None or not_foldable(owner, node, norm_node, op) is not None:
        return None
    calls = [n for n in owner.graph.nodes if n.target == weight.target]
    if len(weight.users) > 1 or len(calls) > 1:
        return None
    return owner.get_submodule(str(norm_node.target))


def _quantizer(owner: GraphModule, value: object) -> nn.Module | None:
    if not isinstance(value, Node) or value.op != "call_module":
        return None
    return owner.get_submodule(str(value.target))
