"""Which operands of which nodes are to be quantized: one `Slot` for each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node

from gdnsq_fx.annotations import facts
from gdnsq_fx.operands import Operand
from gdnsq_fx.opinfo import OpInfo
from gdnsq_fx.spec import QuantConfig

from ._weights import view_chain, viewed

GRIDDED = ("join", "concat", "elementwise")


@dataclass(frozen=True)
class Slot:
    """One operand of one node, and the configuration that holds for it."""

    node: Node
    operand: Operand
    config: QuantConfig

    @property
    def producer(self) -> Node:
        """The value that is read."""
        assert isinstance(self.operand.value, Node)
        return self.operand.value

    @property
    def name(self) -> str:
        """Name of the edge."""
        return f"{facts(self.node).layer}.{self.operand.name}"


def op_of(node: Node) -> OpInfo:
    """The row of a node that is known to have one."""
    op = facts(node).op
    assert op is not None
    return op


def compute_slots(node: Node, config: QuantConfig) -> Iterable[Slot]:
    """Activations and weights of an operation that multiplies and accumulates."""
    op = op_of(node)
    for operand in op.operands(op.bind(node)):
        if operand.role in ("activation", "weight") and isinstance(operand.value, Node):
            yield Slot(node, operand, config)


def value_slots(node: Node, config: QuantConfig, weights: set[Node]) -> list[Slot]:
    """What the scope ``full`` quantizes of any other operation."""
    op = op_of(node)
    operands = op.operands(op.bind(node))
    tensors = [o for o in operands if is_float_tensor(o.value)]
    if op.kind != "concat":
        tensors = [o for o in tensors if not _is_scale(o.value, weights)]
    # With a scalar alone it scales or shifts, which the next grid absorbs.
    lonely = len(op.roles) > 1 and len(tensors) < 2
    if lonely or (op.kind == "join" and _feeds_floating_point(node)):
        return []
    return [Slot(node, o, config) for o in tensors if o.role == "activation"]


def is_float_tensor(value: object) -> bool:
    """A node with a floating-point tensor that has dimensions."""
    if not isinstance(value, Node):
        return False
    found = facts(value)
    return (
        bool(found.shape) and found.dtype is not None and found.dtype.is_floating_point
    )


def wrong_dtype(node: Node) -> str | None:
    """Why the operands of a node cannot be quantized, None where they can."""
    op = op_of(node)
    for operand in op.operands(op.bind(node)):
        if operand.role not in ("activation", "weight"):
            continue
        kind = facts(operand.value).dtype if isinstance(operand.value, Node) else None
        if kind is not None and not kind.is_floating_point:
            return f"its {operand.name} is {kind}, not real floating point"
    return None


def _is_scale(value: object, weights: set[Node]) -> bool:
    """A parameter with one dimension at most: a scale or a shift of its channels."""
    if not isinstance(value, Node) or not view_chain(value, weights):
        return False
    shape = facts(value).shape or ()
    return math.prod(shape) == max(shape, default=1)


def _feeds_floating_point(node: Node) -> bool:
    """Whether nothing but softmax reads it, be it through views or scalings."""
    for user in node.users:
        op = facts(user).op
        if op is None or op.kind == "float":
            if op is None:
                return False
            continue
        passes_on = viewed(user) is node or op.kind in ("join", "elementwise")
        if not passes_on or not _feeds_floating_point(user):
            return False
    return bool(node.users)
