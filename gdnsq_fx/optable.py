"""The one table of facts about operations: passes ask it, nothing else knows them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gdnsq_fx.opinfo import (
    ChannelLayout,
    OpenedCall,
    OpInfo,
    OpTable,
    Role,
    Shape,
    Sign,
)

# --- formulas ---------------------------------------------------------------------


def _forward_macs(shapes: Mapping[str, Shape], output: Shape) -> int:
    """Each output element takes one MAC for each weight of its channel."""
    weight = shapes["weight"]
    return math.prod(output) * math.prod(weight[1:])


def _transposed_macs(shapes: Mapping[str, Shape], output: Shape) -> int:
    """Each input element meets every weight of its input channel once."""
    del output
    return math.prod(shapes["input"]) * math.prod(shapes["weight"][1:])


def _matmul_macs(shapes: Mapping[str, Shape], output: Shape) -> int:
    return math.prod(output) * shapes["input"][-1]


def _rows_are_channels(bound: Mapping[str, Any]) -> ChannelLayout:
    del bound
    return ChannelLayout(axis=0)


def _transposed_layout(bound: Mapping[str, Any]) -> ChannelLayout:
    return ChannelLayout(axis=1, groups=int(bound.get("groups", 1)))


# --- modules as calls ----------------------------------------------------------------

_CONV_SETTINGS = ("stride", "padding", "dilation", "groups")
_TRANSPOSED_SETTINGS = ("stride", "padding", "output_padding", "groups", "dilation")


def _settings(module: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names}


def _open_conv(function: Callable[..., Any]) -> Callable[[nn.Module], OpenedCall]:
    def open_(module: nn.Module) -> OpenedCall:
        settings = _settings(module, _CONV_SETTINGS)
        mode = str(module.padding_mode)
        if mode == "zeros":
            return OpenedCall(function, settings)
        # The module pads by its own mode and then convolves without padding.
        pad: Any = module._reversed_padding_repeated_twice
        return OpenedCall(function, {**settings, "padding": 0}, tuple(pad), mode)

    return open_


def _open_transposed(function: Callable[..., Any]) -> Callable[[nn.Module], OpenedCall]:
    return lambda module: OpenedCall(function, _settings(module, _TRANSPOSED_SETTINGS))


def _open_linear(module: nn.Module) -> OpenedCall:
    del module
    return OpenedCall(F.linear, {})


# --- rows ----------------------------------------------------------------------------

_WEIGHTED: Mapping[str, Role] = MappingProxyType(
    {"input": "activation", "weight": "weight", "bias": "bias"}
)


def _conv(name: str, module: type[nn.Module], function: Callable[..., Any]) -> OpInfo:
    return OpInfo(
        name,
        ("input", "weight", "bias", *_CONV_SETTINGS),
        roles=_WEIGHTED,
        modules=(module,),
        functions=(function,),
        macs=_forward_macs,
        layout=_rows_are_channels,
        open=_open_conv(function),
        boundary="first",
    )


def _transposed(
    name: str, module: type[nn.Module], function: Callable[..., Any]
) -> OpInfo:
    return OpInfo(
        name,
        ("input", "weight", "bias", *_TRANSPOSED_SETTINGS),
        roles=_WEIGHTED,
        modules=(module,),
        functions=(function,),
        macs=_transposed_macs,
        layout=_transposed_layout,
        open=_open_transposed(function),
    )


def _unary(
    name: str,
    sign: Sign,
    modules: tuple[type[nn.Module], ...] = (),
    functions: tuple[Callable[..., Any], ...] = (),
    methods: tuple[str, ...] = (),
) -> OpInfo:
    return OpInfo(
        name,
        ("input",),
        roles={"input": "activation"},
        modules=modules,
        functions=functions,
        methods=methods,
        sign=sign,
    )


_COMPUTE = (
    _conv("conv1d", nn.Conv1d, F.conv1d),
    _conv("conv2d", nn.Conv2d, F.conv2d),
    _conv("conv3d", nn.Conv3d, F.conv3d),
    _transposed("conv_transpose1d", nn.ConvTranspose1d, F.conv_transpose1d),
    _transposed("conv_transpose2d", nn.ConvTranspose2d, F.conv_transpose2d),
    _transposed("conv_transpose3d", nn.ConvTranspose3d, F.conv_transpose3d),
    OpInfo(
        "linear",
        ("input", "weight", "bias"),
        roles=_WEIGHTED,
        modules=(nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear),
        functions=(F.linear,),
        macs=_forward_macs,
        layout=_rows_are_channels,
        open=_open_linear,
        channel_dim=-1,
        boundary="last",
    ),
    OpInfo(
        "matmul",
        ("input", "other"),
        roles={"input": "activation", "other": "activation"},
        functions=(torch.matmul, operator.matmul, torch.bmm, torch.mm),
        aliases={"mat2": "other", "tensor1": "input", "tensor2": "other"},
        methods=("matmul", "bmm", "mm"),
        macs=_matmul_macs,
    ),
)

# Known to take no multiply-accumulates, so that nobody counts its weights as such.
_LOOKUP = (
    OpInfo(
        "embedding",
        ("input", "weight"),
        modules=(nn.Embedding, nn.EmbeddingBag),
        functions=(F.embedding, F.embedding_bag),
    ),
)

_NONNEGATIVE = (
    _unary(
        "relu",
        "nonnegative",
        (nn.ReLU,),
        (F.relu, F.relu_, torch.relu),
        ("relu", "relu_"),
    ),
    _unary("relu6", "nonnegative", (nn.ReLU6,), (F.relu6,)),
    _unary(
        "sigmoid",
        "nonnegative",
        (nn.Sigmoid, nn.Hardsigmoid),
        (F.sigmoid, torch.sigmoid, F.hardsigmoid),
        ("sigmoid",),
    ),
    _unary(
        "softmax",
        "nonnegative",
        (nn.Softmax,),
        (F.softmax, torch.softmax),
        ("softmax",),
    ),
    _unary("abs", "nonnegative", (), (torch.abs, abs, operator.abs), ("abs",)),
)

# What moves, picks, averages or drops values keeps their sign.
_SIGN_KEEPING = (
    _unary(
        "pool",
        "inherits",
        (
            nn.MaxPool1d,
            nn.MaxPool2d,
            nn.MaxPool3d,
            nn.AvgPool1d,
            nn.AvgPool2d,
            nn.AvgPool3d,
            nn.AdaptiveAvgPool1d,
            nn.AdaptiveAvgPool2d,
            nn.AdaptiveAvgPool3d,
        ),
        (
            torch.max_pool1d,
            torch.max_pool2d,
            torch.max_pool3d,
            F.max_pool1d,
            F.max_pool2d,
            F.max_pool3d,
            F.avg_pool1d,
            F.avg_pool2d,
            F.avg_pool3d,
            F.adaptive_avg_pool1d,
            F.adaptive_avg_pool2d,
            F.adaptive_avg_pool3d,
        ),
    ),
    _unary("mean", "inherits", (), (torch.mean,), ("mean",)),
    _unary(
        "reshape",
        "inherits",
        (nn.Flatten, nn.Identity),
        (torch.flatten, torch.reshape, torch.permute, torch.transpose),
        ("flatten", "reshape", "view", "permute", "transpose", "contiguous"),
    ),
    _unary(
        "dropout",
        "inherits",
        (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        (F.dropout,),
    ),
    OpInfo(
        "add",
        ("input", "other", "alpha"),
        # A negative alpha turns a sum into a difference: it counts like an operand.
        roles={"input": "activation", "other": "activation", "alpha": "activation"},
        functions=(torch.add, operator.add, operator.iadd),
        methods=("add", "add_"),
        sign="inherits",
    ),
    OpInfo(
        "pad",
        ("input", "pad", "mode", "value"),
        roles={"input": "activation", "value": "activation"},
        modules=(
            nn.ZeroPad1d,
            nn.ZeroPad2d,
            nn.ZeroPad3d,
            nn.ReflectionPad1d,
            nn.ReflectionPad2d,
            nn.ReflectionPad3d,
            nn.ReplicationPad1d,
            nn.ReplicationPad2d,
            nn.ReplicationPad3d,
        ),
        functions=(F.pad,),
        sign="inherits",
    ),
    OpInfo(
        "mul",
        ("input", "other"),
        roles={"input": "activation", "other": "activation"},
        functions=(torch.mul, operator.mul, operator.imul),
        methods=("mul", "mul_"),
        sign="inherits",
    ),
    OpInfo(
        "cat",
        ("tensors",),
        roles={"tensors": "activation"},
        functions=(torch.cat, torch.concat),
        sign="inherits",
    ),
)

DEFAULT_TABLE = OpTable((*_COMPUTE, *_LOOKUP, *_NONNEGATIVE, *_SIGN_KEEPING))
