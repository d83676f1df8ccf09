"""Facts about graph nodes, kept as one typed object in ``node.meta["gdnsq_fx"]``.

Meta survives a deep copy of the graph, not pickling: facts are a cache, and every pass
that writes them can be run again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from gdnsq_fx.errors import PassError
from gdnsq_fx.inputs import InputStructure
from gdnsq_fx.opinfo import OpInfo
from gdnsq_fx.spec import QuantConfig

KEY = "gdnsq_fx"
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_TORCH = os.path.dirname(torch.__file__) + os.sep


@dataclass(frozen=True)
class EdgeFacts:
    """What was measured on one quantized edge; formulas in ``analysis/capacity.py``.

    Attributes:
        elements: elements per sample (of the whole tensor for a weight).
        bits: hard bit-width, ceil(log2(levels)).
        capacity: bits per sample that the edge can carry, elements * log2(levels).
        entropy: bits per sample that it does carry.
        sqnr_db: signal to quantization noise ratio, dB.
        clipped: share of elements outside the clamp range, 0..1.
        predicted_divergence: Jeffreys divergence (nats per sample) at the output if
            only this edge is quantized (``analysis/directions.py``).
        measured_divergence: the same, measured; None until it was.
        joint_divergence: what vanishes of the divergence of the model with every edge
            quantized when this one goes back to floating point, predicted
            (`vanishing_divergence`); below 0 where its error makes up for others.
            None where it was not asked for.
        measured_joint_divergence: the same, measured; None until it was.
        divergence_at: ``predicted_divergence`` at other bit-widths, by width.
        macs: MACs per sample of the operations that read it.
        bops: their bit operations, MACs * weight bits * activation bits.
        parameters: weight elements; 0 for an activation.
    """

    elements: int
    bits: int
    capacity: float
    entropy: float
    sqnr_db: float
    clipped: float
    predicted_divergence: float
    measured_divergence: float | None = None
    joint_divergence: float | None = None
    measured_joint_divergence: float | None = None
    divergence_at: Mapping[int, float] = field(default_factory=dict[int, float])
    macs: int = 0
    bops: int = 0
    parameters: int = 0


@dataclass(frozen=True)
class NodeFacts:
    """What is known of one node.

    Attributes:
        op: its row of the op table, None where the table does not know it.
        layer: name of the layer it stands for, such as ``layer1.0.conv1``.
        shape: shape of its value on the example input, None before propagation or
            where the value is not a tensor.
        shapes: of all tensors in its value.
        dtype: of its value; None as for ``shape``.
        number: its value on the example where that is a whole number; else None.
        batch: size of the batch that ``shape`` was taken with.
        elements: tensor elements per sample in the value, 0 where it holds no tensor.
        macs: MACs per sample; 0 where it does not multiply and accumulate.
        inner_macs: those of them with an operand that no edge of the graph holds.
        skip: why it was not quantized, None where it was or need not be.
        asked: the configuration asked to skip it.
        edge: measurements, on quantizer nodes only.
    """

    op: OpInfo | None = None
    layer: str = ""
    shape: tuple[int, ...] | None = None
    shapes: tuple[tuple[int, ...], ...] = ()
    dtype: torch.dtype | None = None
    number: int | None = None
    batch: int = 1
    elements: int = 0
    macs: int = 0
    inner_macs: int = 0
    skip: str | None = None
    asked: bool = False
    edge: EdgeFacts | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a whole prepared model, kept in ``graph_module.meta``.

    Attributes:
        config: how it was quantized.
        inputs: structure of the example input.
        folded: BatchNorm was folded into the layers before it.
        masks: edges whose quantizers calibration took away (`passes/_masks.py`).
        between: paths of the quantizers that `QuantizeBetweenLayers` let others read
            from; None where it has not run.
    """

    config: QuantConfig
    inputs: InputStructure
    folded: bool = False
    masks: tuple[str, ...] = ()
    between: tuple[str, ...] | None = None


def model_facts(module: nn.Module) -> ModelFacts:
    """Facts of a prepared or converted model.

    Raises:
        PassError: it was not made by `gdnsq_fx.prepare`.
    """
    found = module.meta.get(KEY) if isinstance(module, GraphModule) else None
    if not isinstance(found, ModelFacts):
        raise PassError(
            f"{type(module).__name__} was not made by gdnsq_fx.prepare (or lost its "
            "metadata on the way, as pickling does); call "
            "gdnsq_fx.prepare(model, example_input) first"
        )
    return found


def facts(node: Node) -> NodeFacts:
    """The facts of a node; empty ones where no pass has written any."""
    found = node.meta.get(KEY)
    return found if isinstance(found, NodeFacts) else NodeFacts()


def annotate(node: Node, **changes: Any) -> None:
    """Replace some of a node's facts."""
    node.meta[KEY] = replace(facts(node), **changes)


def shape_facts(node: Node) -> dict[str, Any]:
    """The facts that a node which passes its input's shape on has in common with it."""
    found = facts(node)
    shared = ("shape", "shapes", "dtype", "batch", "elements")
    return {name: getattr(found, name) for name in shared}


def source_of(node: Node) -> str:
    """``file.py:line`` in the model's own code, or an empty string where unknown."""
    frames = _FRAME.findall(node.stack_trace or "")
    own = [f for f in frames if not f[0].startswith(_TORCH)]
    return f"{os.path.basename(own[-1][0])}:{own[-1][1]}" if own else ""


def described(node: Node) -> str:
    """A node as messages name it: layer or node name, and source line where known."""
    where = source_of(node)
    name = facts(node).layer or node.name
    return f"{name} ({where})" if where else name


def compute_nodes(graph_module: GraphModule) -> list[Node]:
    """Nodes that multiply and accumulate, in graph order."""
    found: list[Node] = []
    for node in graph_module.graph.nodes:
        op = facts(node).op
        if op is not None and op.is_compute:
            found.append(node)
    return found
