"""How a torch function that a model calls is spelled as a graph node."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.overrides import is_tensor_method_or_property

# Methods behind Python's operators: a graph says ``x + y``, as symbolic tracing does.
_OPERATORS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "add": operator.add,
        "sub": operator.sub,
        "mul": operator.mul,
        "div": operator.truediv,
        "__floordiv__": operator.floordiv,
        "remainder": operator.mod,
        "pow": operator.pow,
        "matmul": operator.matmul,
        "neg": operator.neg,
        "__eq__": operator.eq,
        "__ne__": operator.ne,
        "eq": operator.eq,
        "ne": operator.ne,
        "lt": operator.lt,
        "le": operator.le,
        "gt": operator.gt,
        "ge": operator.ge,
        "__and__": operator.and_,
        "__or__": operator.or_,
        "__xor__": operator.xor,
        "__invert__": operator.invert,
        "__lshift__": operator.lshift,
        "__rshift__": operator.rshift,
        "__getitem__": operator.getitem,
        "__setitem__": operator.setitem,
    }
)
_REFLECTED: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "__rsub__": operator.sub,
        "__rdiv__": operator.truediv,
        "__rtruediv__": operator.truediv,
        "__rfloordiv__": operator.floordiv,
        "__rpow__": operator.pow,
        "__rmod__": operator.mod,
        "__rmatmul__": operator.matmul,
        "__rlshift__": operator.lshift,
        "__rrshift__": operator.rshift,
    }
)
_IN_PLACE: Mapping[str, str] = MappingProxyType(
    {
        "__iadd__": "add_",
        "__isub__": "sub_",
        "__imul__": "mul_",
        "__idiv__": "div_",
        "__itruediv__": "div_",
        "__ipow__": "pow_",
        "__ifloordiv__": "floor_divide_",
        "__imod__": "remainder_",
        "__iand__": "bitwise_and_",
        "__ior__": "bitwise_or_",
        "__ixor__": "bitwise_xor_",
    }
)

# What the model learns of a tensor's data: the graph keeps what it was on the example.
DATA_READS = frozenset(
    {
        "__bool__",
        "__int__",
        "__float__",
        "__complex__",
        "__index__",
        "__contains__",
        "__array__",
        "numpy",
        "equal",
        "allclose",
        "is_nonzero",
        "storage",
        "untyped_storage",
        "data_ptr",
    }
)

# Attributes that are tensors themselves; the others are facts of the example.
_TENSOR_ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "real", "imag", "data", "grad"})


def attribute_of(function: Any) -> str | None:
    """Name of the tensor attribute that a getter reads; None for anything else."""
    if getattr(function, "__name__", "") != "__get__":
        return None
    owner = getattr(function, "__self__", None)
    return str(getattr(owner, "__name__", None) or _property_name(owner))


def is_setter(function: Any) -> bool:
    """Whether the call assigns to an attribute of a tensor (``x.data = y``)."""
    return getattr(function, "__name__", "") in ("__set__", "__delete__")


def is_tensor_attribute(name: str) -> bool:
    """Whether reading the attribute is an operation that the graph repeats."""
    return name in _TENSOR_ATTRIBUTES


def spelled(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Any, tuple[Any, ...], dict[str, Any]]:
    """``(op, target, args, kwargs)`` of the node for a call of a torch function."""
    name = str(getattr(function, "__name__", function))
    attribute = attribute_of(function)
    if attribute is not None:
        return "call_function", getattr, (args[0], attribute), {}
    is_method = is_tensor_method_or_property(function) or (
        getattr(Tensor, name, None) is function
    )
    if is_method and not kwargs:
        if name in _OPERATORS and len(args) == _arity(name):
            return "call_function", _OPERATORS[name], args, {}
        if name in _REFLECTED and len(args) == 2:
            return "call_function", _REFLECTED[name], args[::-1], {}
    if is_method and hasattr(Tensor, name):
        return "call_method", _IN_PLACE.get(name, name), args, kwargs
    return "call_function", function, args, kwargs


def _arity(name: str) -> int:
    return {"neg": 1, "__invert__": 1, "__setitem__": 3}.get(name, 2)


def _property_name(owner: Any) -> str:
    return str(getattr(getattr(owner, "fget", None), "__name__", ""))
