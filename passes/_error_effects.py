"""What the error of one operand of an operation changes in its output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.utils._pytree import tree_map

from gdnsq_fx.operands import Operand
from gdnsq_fx.opinfo import OpInfo


@torch.no_grad()
def error_effect(
    run: Interpreter,
    node: Node,
    op: OpInfo,
    operand: Operand,
    error: Any,
    value: Any,
    *,
    joint: bool,
) -> Any:
    """What the error of one weight changes in the output of the node that reads it.

    Args:
        run: holds the values of the node's inputs.
        node: the operation.
        op: facts of it.
        operand: the weight, one of its inputs.
        error: of the shape of the weight.
        value: the output of the node.
        joint: the weight in ``run`` bears the error already, and so does ``value``.

    Returns:
        The structure and the shapes of ``value``; what is not a floating-point tensor
        as the operation gives it.
    """
    if op.is_compute and op.linear:
        bias = {o.argument for o in op.operands(op.bind(node)) if o.role == "bias"}
        return run_with(run, node, op, operand, error, drop=bias)
    weight: Any = run.env[cast(Node, operand.value)]
    if joint:
        exact = run_with(run, node, op, operand, weight - error)
        return tree_map(_difference, value, exact)
    moved = run_with(run, node, op, operand, weight + error)
    return tree_map(_difference, moved, value)


def run_with(
    run: Interpreter,
    node: Node,
    op: OpInfo,
    operand: Operand,
    value: Any,
    drop: Iterable[str] = (),
) -> Any:
    """The operation with another value for one operand, and without some others.

    Args:
        run: holds the values of the node's inputs.
        node: the operation.
        op: facts of it.
        operand: whose value is replaced.
        value: by this one.
        drop: names of arguments that become None where they are given.

    Returns:
        The output.
    """
    args, kwargs = run.fetch_args_kwargs_from_env(node)
    args, kwargs = op.replaced(
        args,
        kwargs,
        operand.argument,
        value,
        index=operand.index,
        target=node.target,
    )
    for name in drop:
        if op.named(args, kwargs, target=node.target).get(name) is not None:
            args, kwargs = op.replaced(args, kwargs, name, None, target=node.target)
    if node.op == "call_method":
        return run.call_method(str(node.target), args, kwargs)
    return run.call_function(cast(Any, node.target), args, kwargs)


def bears_error(leaf: object) -> bool:
    """Whether a part of an output can have an error: floating-point tensors do."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _difference(moved: Any, value: Any) -> Any:
    return moved - value if bears_error(moved) else moved
