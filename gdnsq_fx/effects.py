"""What a call does besides computing its result: it writes in place, or is random."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

_IN_PLACE = (
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.imatmul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.setitem,
)


def writes_in_place(node: Node) -> bool:
    """Whether a call node changes its first argument (``x.add_``, ``x += y``)."""
    owner = node.graph.owning_module
    if node.op == "call_module" and owner is not None:
        return bool(getattr(owner.get_submodule(str(node.target)), "inplace", False))
    if node.kwargs.get("inplace") is True or node.target in _IN_PLACE:
        return True
    name = str(getattr(node.target, "__name__", node.target))
    called = node.op in ("call_method", "call_function")
    return called and name.endswith("_") and not name.endswith("__")


def draws_randomly(node: Node) -> bool:
    """Whether torch marks the operation of a call node as one that draws numbers."""
    name = str(getattr(node.target, "__name__", node.target))
    packet = getattr(torch.ops.aten, name, None)
    if node.op not in ("call_function", "call_method") or packet is None:
        return False
    kinds = [getattr(packet, overload).tags for overload in packet.overloads()]
    return any(torch.Tag.nondeterministic_seeded in tags for tags in kinds)
