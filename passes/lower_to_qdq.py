"""LowerToQdq: the integer graph in the operations that compilers know.

    %codes = quantize(%x, %step, %offset, 3);  %dq = dequantize(%codes, ...)
      ->
    %q = quantize_per_tensor(%x, step, zero_point, 0, 255, uint8)
    %q = clamp(%q, max=3)
    %dq = dequantize_per_tensor(%q, step, zero_point, 0, 255, uint8)  # one per reader

    %w = dequantize(%codes, %step, %offset, float32)
      ->
    %w = dequantize_per_channel(%codes, %scale, %zeros, 0, -128, 127, int8)

An activation that starts between two multiples of its step is quantized twice: to whole
steps from its lowest level, and again, without loss, to a finer grid that 0 lies on, so
that a convolution may pad it (`uint8_grid`). Biases become whole multiples of the scale
of the accumulator, which makes every layer exact in integers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from gdnsq_fx.annotations import facts, model_facts
from gdnsq_fx.deploy.edges import name_edge
from gdnsq_fx.deploy.grids import Int8Weight, Uint8Grid, int8_weight, uint8_grid
from gdnsq_fx.deploy.integer import dequantize, quantize
from gdnsq_fx.deploy.qdq import (
    ACTIVATION_RANGE,
    KEY,
    WEIGHT_RANGE,
    DeployFacts,
    is_deployable,
    operation,
)
from gdnsq_fx.errors import PassError
from gdnsq_fx.nested import graphs_of, joined, path_of
from gdnsq_fx.stored import (
    ancestors,
    attribute,
    stored_name,
    stored_value,
    weight_values,
)

from ._base import Pass
from ._biases import snap_biases
from ._rebuilt import rebuilt

# Distances below this are float rounding, in steps.
_MOVED = 1e-4


@dataclass
class _Notes:
    moved: dict[str, float] = field(default_factory=dict[str, float])
    kept: dict[str, str] = field(default_factory=dict[str, str])

    def move(self, edge: str, distance: float) -> None:
        if distance > _MOVED:
            self.moved[edge] = max(distance, self.moved.get(edge, 0.0))


@dataclass(frozen=True, eq=False)
class LowerToQdq(Pass):
    """Emit the deployable graph; what fits no eight bits stays, with its reason."""

    def requires(self, graph_module: GraphModule) -> None:
        """A converted model, in evaluation."""
        model_facts(graph_module)
        found = [
            node
            for one in graphs_of(graph_module)
            for node in one.graph.find_nodes(op="call_function", target=dequantize)
        ]
        if not found and not is_deployable(graph_module):
            raise PassError(
                f"{self.name} needs a converted model; call gdnsq_fx.convert first"
            )

    @torch.no_grad()
    def call(self, graph_module: GraphModule) -> PassResult:
        """A new graph module; the given one is used up."""
        if not self.rewrite(graph_module):
            return PassResult(graph_module, False)
        return PassResult(rebuilt(graph_module, "DeployableModel"), True)

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Replace the operations in place; False where it was done before."""
        if is_deployable(graph_module):
            return False
        notes = _Notes()
        for one in graphs_of(graph_module):
            _lower_weights(one, notes)
            _lower_activations(one, notes)
            snap_biases(one)
        graph_module.meta[KEY] = DeployFacts(notes.moved, notes.kept)
        return True


def _edge(owner: GraphModule, name: str) -> str:
    prefix = name.rpartition(".")[0].replace("quantizers.", "")
    return joined(path_of(owner), prefix)


def _lower_weights(owner: GraphModule, notes: _Notes) -> None:
    done: dict[str, Int8Weight | None] = {}
    for node in owner.graph.find_nodes(op="call_function", target=dequantize):
        codes = node.args[0]
        if not isinstance(codes, Node) or codes.op != "get_attr":
            continue
        name = str(codes.target)
        edge = _edge(owner, name)
        if name not in done:
            done[name] = _int8(owner, node)
            if (made := done[name]) is not None:
                notes.move(edge, made.moved)
        made = done[name]
        if made is None:
            notes.kept[edge] = _kept_weight(owner, node)
            continue
        _emit_weight(owner, node, made)


def _int8(owner: GraphModule, node: Node) -> Int8Weight | None:
    if node.args[3] is not torch.float32:
        return None
    codes, step, offset = (attribute(owner, stored_name(node, i)) for i in range(3))
    return int8_weight(codes, step, offset)


def _kept_weight(owner: GraphModule, node: Node) -> str:
    if node.args[3] is not torch.float32:
        return f"computed in {node.args[3]}"
    if int(attribute(owner, stored_name(node, 0)).max()) > 255:
        return "more than 8 bits"
    return "steps along more than one dimension"


def _emit_weight(owner: GraphModule, node: Node, made: Int8Weight) -> None:
    prefix = stored_name(node, 0).rpartition(".")[0]
    holder = owner.get_submodule(prefix)
    holder.codes = made.codes
    with owner.graph.inserting_before(node):
        codes = owner.graph.get_attr(f"{prefix}.codes")
        if made.axis is None:
            kind = "dequantize_per_tensor"
            arguments: tuple[Any, ...] = (codes, float(made.scale), 0)
        else:
            kind = "dequantize_per_channel"
            zeros = torch.zeros_like(made.scale, dtype=torch.int64)
            holder.register_buffer("scale", made.scale)
            holder.register_buffer("zero_points", zeros)
            scale = owner.graph.get_attr(f"{prefix}.scale")
            points = owner.graph.get_attr(f"{prefix}.zero_points")
            arguments = (codes, scale, points, made.axis)
    node.target = operation(kind)
    node.args = (*arguments, *WEIGHT_RANGE)


def _lower_activations(owner: GraphModule, notes: _Notes) -> None:
    stored = weight_values(owner)
    for node in owner.graph.find_nodes(op="call_function", target=quantize):
        (reader,) = node.users
        if node in stored:
            _store_levels(owner, node, reader)
            continue
        name = stored_name(node, 1)
        step = float(attribute(owner, name))
        offset = float(attribute(owner, stored_name(node, 2)))
        max_code: Any = node.args[3]
        grid = uint8_grid(step, offset, max_code)
        edge, codes = facts(reader).layer or _edge(owner, name), node
        if reader.args[3] is not torch.float32:
            notes.kept[_edge(owner, name)] = f"computed in {reader.args[3]}"
        elif grid is None:
            notes.kept[_edge(owner, name)] = (
                "more than 8 bits" if max_code > 255 else "0 lies far off its levels"
            )
        else:
            notes.move(_edge(owner, name), grid.moved)
            codes = _emit_activation(owner, node, reader, grid, offset)
        name_edge(codes, edge)


def _store_levels(owner: GraphModule, node: Node, reader: Node) -> None:
    """What lies on a grid and never changes, such as a position, is its levels.

    OpenVINO 2026.4 cannot load a sum of an activation and quantized constants.
    """
    prefix = stored_name(node, 1).rpartition(".")[0]
    levels = stored_value(owner, reader).contiguous()
    owner.get_submodule(prefix).register_buffer("levels", levels)
    with owner.graph.inserting_before(reader):
        source = owner.graph.get_attr(f"{prefix}.levels")
    source.meta = dict(reader.meta)
    reader.replace_all_uses_with(source)
    for one in sorted(ancestors([reader]), reverse=True):
        if not one.users:
            owner.graph.erase_node(one)


def _emit_activation(
    owner: GraphModule, node: Node, reader: Node, grid: Uint8Grid, offset: float
) -> Node:
    """The node of the codes that layers read."""
    value = node.args[0]
    with owner.graph.inserting_before(node):
        if grid.is_direct:
            codes = _codes(owner, value, grid.step, grid.zero_point, grid.max_code)
        else:
            moved = owner.graph.call_function(torch.sub, (value, offset))
            steps = _codes(owner, moved, grid.step, 0, grid.max_code)
            back = _call(owner, "dequantize_per_tensor", steps, grid.step, 0)
            level = owner.graph.call_function(torch.add, (back, grid.lowest))
            codes = _codes(owner, level, grid.scale, grid.zero_point, 255)
    for user in list(reader.users):
        with owner.graph.inserting_before(reader):
            arguments = (codes, grid.scale, grid.zero_point)
            level = _call(owner, "dequantize_per_tensor", *arguments)
        level.meta = dict(reader.meta)
        user.replace_input_with(reader, level)
    owner.graph.erase_node(reader)
    owner.graph.erase_node(node)
    return codes


def _codes(
    owner: GraphModule, value: Any, scale: float, zero_point: int, max_code: int
) -> Node:
    codes = _call(owner, "quantize_per_tensor", value, scale, zero_point)
    if max_code >= 255:
        return codes
    return owner.graph.call_function(torch.clamp, (codes,), {"max": max_code})


def _call(owner: GraphModule, name: str, *arguments: Any) -> Node:
    target = operation(name)
    return owner.graph.call_function(target, (*arguments, *ACTIVATION_RANGE))
