"""Views of tensors, and operations on several of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gdnsq_fx.opinfo import Kind, OpInfo, Sign
from gdnsq_fx.oprows.unary import unary


def _binary(
    name: str,
    functions: tuple[Callable[..., Any], ...],
    methods: tuple[str, ...],
    *,
    kind: Kind,
    sign: Sign = "any",
) -> OpInfo:
    return OpInfo(
        name,
        ("input", "other"),
        roles={"input": "activation", "other": "activation"},
        functions=functions,
        methods=methods,
        sign=sign,
        kind=kind,
    )


_VIEW_ATTRIBUTES = ("T", "H", "mT", "mH", "data")


def _is_view_attribute(args: Sequence[Any]) -> bool:
    return len(args) > 1 and args[1] in _VIEW_ATTRIBUTES


_VIEWS = (
    unary(
        "reshape",
        (nn.Flatten, nn.Unflatten, nn.Identity, nn.PixelShuffle, nn.PixelUnshuffle),
        (
            *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.t),
            *(torch.swapaxes, torch.swapdims, torch.movedim, torch.moveaxis),
            *(torch.squeeze, torch.unsqueeze, torch.unflatten, torch.narrow),
            *(torch.select, torch.clone, torch.detach, torch.flip, torch.roll),
            *(torch.tile, torch.broadcast_to, torch.adjoint, torch.ravel),
            *(F.pixel_shuffle, F.pixel_unshuffle),
        ),
        (
            *("flatten", "reshape", "view", "permute", "transpose", "contiguous", "t"),
            *("swapaxes", "swapdims", "movedim", "moveaxis", "squeeze", "unsqueeze"),
            *("unflatten", "narrow", "select", "clone", "detach", "flip", "roll"),
            *("tile", "repeat", "expand", "broadcast_to", "adjoint", "ravel"),
        ),
        sign="inherits",
        kind="view",
    ),
    # These read a second tensor, if only its shape.
    unary(
        "shaped_like",
        (),
        (),
        ("expand_as", "view_as", "reshape_as", "repeat_interleave"),
        sign="inherits",
    ),
    unary(
        "part",
        (),
        (
            *(operator.getitem, torch.chunk, torch.split, torch.unbind),
            *(torch.tensor_split, torch.functional.split),
        ),
        ("chunk", "split", "unbind", "tensor_split", "__getitem__", "split_with_sizes"),
        sign="inherits",
        kind="view",
    ),
    unary(
        "attribute",
        (),
        (getattr,),
        sign="inherits",
        kind="view",
        parameters=("input", "name"),
        when=_is_view_attribute,
    ),
)

_JOINS = (
    OpInfo(
        "add",
        ("input", "other", "alpha"),
        # A negative alpha turns a sum into a difference: it counts like an operand.
        roles={"input": "activation", "other": "activation", "alpha": "activation"},
        functions=(torch.add, operator.add, operator.iadd),
        methods=("add", "add_", "__add__", "__radd__", "__iadd__"),
        sign="inherits",
        kind="join",
    ),
    _binary(
        "sub",
        (torch.sub, torch.subtract, torch.rsub, operator.sub, operator.isub),
        ("sub", "sub_", "subtract", "__sub__", "__rsub__", "__isub__"),
        kind="join",
    ),
    _binary(
        "maximum",
        (torch.maximum, torch.minimum, torch.max, torch.min),
        ("maximum", "minimum", "max", "min"),
        kind="join",
        sign="inherits",
    ),
    _binary(
        "mul",
        (torch.mul, torch.multiply, operator.mul, operator.imul),
        ("mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"),
        kind="elementwise",
        sign="inherits",
    ),
    OpInfo(
        "div",
        ("input", "other"),
        # The divisor keeps its precision: a grid may hold zero.
        roles={"input": "activation", "other": "other"},
        functions=(torch.div, torch.divide, torch.true_divide, operator.truediv),
        methods=("div", "div_", "divide", "true_divide", "__truediv__"),
        kind="elementwise",
    ),
    OpInfo(
        "cat",
        ("tensors",),
        roles={"tensors": "activation"},
        functions=(
            *(torch.cat, torch.concat, torch.concatenate, torch.stack),
            *(torch.hstack, torch.vstack, torch.dstack),
        ),
        sign="inherits",
        kind="concat",
    ),
    OpInfo(
        "pad",
        ("input", "pad", "mode", "value"),
        roles={"input": "activation", "value": "activation"},
        modules=(
            *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
            *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
            *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
        ),
        functions=(F.pad,),
        sign="inherits",
    ),
)

TENSORS = (*_VIEWS, *_JOINS)
