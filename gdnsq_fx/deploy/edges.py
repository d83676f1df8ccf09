"""The quantized activations of a model in deployable form: by name, and where they are.

`passes/lower_to_qdq.py` leaves the name of the edge on the node that holds its codes.
A grid that 0 does not lie on is reached by two quantizations, of which the first
rounds and the second moves whole steps to finer codes without loss.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from gdnsq_fx.deploy.integer import quantize
from gdnsq_fx.deploy.qdq import ACTIVATION_RANGE, calls, deploy_facts
from gdnsq_fx.stored import attribute, stored_name

KEY = "gdnsq_fx.edge"


@dataclass(frozen=True, eq=False)
class CodedEdge:
    """One quantized activation.

    Attributes:
        name: of the edge, as in the report.
        codes: the node whose value is the codes that layers read: uint8, or int32
            where they stay quantized by floating-point arithmetic.
        rounded: the node that rounds; its argument 0 is the floating-point value.
        step: distance of two levels, in the units of that value.
        offset: value of code 0 there.
        factor: how many codes one step is.
        zero: code of 0 steps.
        least, most: codes that there are.
    """

    name: str
    codes: Node
    rounded: Node
    step: float
    offset: float = 0.0
    factor: int = 1
    zero: int = 0
    least: int = 0
    most: int = 255

    def in_steps(self, value: Tensor) -> Tensor:
        """The value before it is rounded, in steps; float64."""
        return (value.double() - self.offset) / self.step


def name_edge(codes: Node, name: str) -> None:
    """Leave the name of an edge on the node of its codes."""
    codes.meta[KEY] = name


def coded_edges(model: GraphModule) -> list[CodedEdge]:
    """The quantized activations of a model, in the order of its graph.

    Those of graphs inside opaque modules are not among them: their Python decides
    whether and how often they run. A name that comes twice has its number behind.

    Raises:
        PassError: not in deployable form.
    """
    deploy_facts(model)
    found: list[CodedEdge] = []
    times: dict[str, int] = {}
    for node in model.graph.nodes:
        name = node.meta.get(KEY)
        if isinstance(name, str):
            times[name] = times.get(name, 0) + 1
            one = name if times[name] == 1 else f"{name}@{times[name]}"
            found.append(_coded_edge(model, one, node))
    return found


def with_codes(model: GraphModule, edges: list[CodedEdge]) -> GraphModule:
    """A copy that returns ``(outputs, (codes, ...))``, the codes as edges are given."""
    seen = copy.deepcopy(model)
    nodes = {node.name: node for node in seen.graph.nodes}
    (output,) = seen.graph.find_nodes(op="output")
    output.args = ((output.args[0], tuple(nodes[e.codes.name] for e in edges)),)
    seen.recompile()
    return seen


def _coded_edge(model: GraphModule, name: str, codes: Node) -> CodedEdge:
    if codes.target is quantize:
        step, offset = (attribute(model, stored_name(codes, n)) for n in (1, 2))
        most: Any = codes.args[3]
        return CodedEdge(name, codes, codes, float(step), float(offset), most=most)
    last = _quantization(codes)
    scale, zero = _grid(last)
    level: Any = last.args[0]
    if not _is_moved(level):
        return CodedEdge(name, codes, last, scale, zero=zero, most=_largest_code(codes))
    steps, lowest = level.args[0].args[0], float(level.args[1])
    rounded = _quantization(steps)
    step, _ = _grid(rounded)
    factor, least = round(step / scale), zero + round(lowest / scale)
    most = least + factor * _largest_code(steps)
    return CodedEdge(name, codes, rounded, step, 0.0, factor, least, least, most)


def _quantization(codes: Any) -> Node:
    """The node that quantizes, before the clamp of its codes."""
    node = codes if calls(codes, "quantize_per_tensor") else codes.args[0]
    assert calls(node, "quantize_per_tensor"), codes
    return node


def _is_moved(value: Any) -> bool:
    """Whether a value is ``levels + lowest``, between the two quantizations."""
    if not isinstance(value, Node) or value.target is not torch.add:
        return False
    levels = value.args[0]
    if not isinstance(levels, Node) or not calls(levels, "dequantize_per_tensor"):
        return False
    # Where the codes are an edge of their own, the sum stands in the model itself.
    codes = levels.args[0]
    return isinstance(codes, Node) and codes.op != "get_attr" and KEY not in codes.meta


def _grid(quantization: Node) -> tuple[float, int]:
    """Scale and zero point."""
    scale: Any = quantization.args[1]
    zero: Any = quantization.args[2]
    return float(scale), int(zero)


def _largest_code(codes: Any) -> int:
    """The bound of the clamp, or what uint8 holds."""
    return int(codes.kwargs.get("max", ACTIVATION_RANGE[1]))
