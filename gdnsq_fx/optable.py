"""The one table of facts about operations. Passes ask it; nothing else knows positions.

A row (`OpInfo`) gathers all spellings of an operation (module class, function, tensor
method), the names of its arguments in order, what each tensor argument is (`Role`), how
its weight is laid out, how many multiply-accumulates (MACs) it takes, and what its
output may be (never negative, or so whenever its inputs are).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

Role = Literal["activation", "weight", "bias"]
Sign = Literal["any", "nonnegative", "inherits"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class ChannelLayout:
    """Where the output channels of a weight lie.

    Attributes:
        axis: dimension that counts output channels (of one group); None: one scale for
            the whole tensor.
        groups: number of groups along dimension 0. Only a grouped transposed
            convolution needs it: its weight is ``[in, out / groups, *kernel]``, so
            channel ``g * out / groups + c`` is ``weight[in of g, c]``.
    """

    axis: int | None
    groups: int = 1

    def grouped(self, weight: Tensor) -> Tensor:
        """The weight viewed as ``[groups, dim0 / groups, ...]`` where groups > 1."""
        return weight if self.groups == 1 else weight.unflatten(0, (self.groups, -1))

    def reduced_dims(self, ndim: int) -> tuple[int, ...]:
        """Dimensions of ``grouped(weight)`` that share one scale."""
        if self.axis is None:
            return tuple(range(ndim + (self.groups > 1)))
        kept = {self.axis} if self.groups == 1 else {0, self.axis + 1}
        return tuple(d for d in range(ndim + (self.groups > 1)) if d not in kept)

    def expanded(self, scale: Tensor, weight_shape: Sequence[int]) -> Tensor:
        """A scale shaped for ``grouped`` made broadcastable to the plain weight."""
        if self.groups == 1 or self.axis is None:
            return (
                scale.reshape([1] * len(weight_shape)) if self.axis is None else scale
            )
        per_group = weight_shape[0] // self.groups
        return scale.squeeze(1).repeat_interleave(per_group, dim=0)


PER_TENSOR = ChannelLayout(axis=None)


@dataclass(frozen=True)
class OpenedCall:
    """How a module reads as a function call on explicit tensors.

    Attributes:
        function: the function to call.
        settings: its arguments other than input, weight and bias.
        pad: `F.pad` sizes to apply to the input first (non-zero padding modes).
        pad_mode: mode of that padding.
    """

    function: Callable[..., Any]
    settings: Mapping[str, Any]
    pad: tuple[int, ...] = ()
    pad_mode: str = "constant"


@dataclass(frozen=True)
class OpInfo:
    """One row: an operation and all that passes need to know about it.

    Attributes:
        name: name in patterns (``op:NAME``) and reports.
        parameters: argument names of the function spelling, in order.
        roles: argument name -> role, for tensor arguments that matter.
        modules, functions, methods: the spellings.
        macs: ``(argument shapes, output shape) -> MACs`` for the whole batch; None for
            operations that do not multiply and accumulate.
        layout: ``(bound arguments) -> ChannelLayout`` of the weight.
        open: ``(module) -> OpenedCall``; None where the module has no weights.
        boundary: this kind counts as a network's ``first`` or ``last`` layer.
        sign: what the output's sign is known to be.
    """

    name: str
    parameters: tuple[str, ...]
    roles: Mapping[str, Role] = field(default_factory=dict[str, Role])
    modules: tuple[type[nn.Module], ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()
    macs: Callable[[Mapping[str, Shape], Shape], int] | None = None
    layout: Callable[[Mapping[str, Any]], ChannelLayout] | None = None
    open: Callable[[nn.Module], OpenedCall] | None = None
    boundary: Literal["first", "last"] | None = None
    sign: Sign = "any"

    @property
    def is_compute(self) -> bool:
        """Whether it multiplies and accumulates, so that its inputs are quantized."""
        return self.macs is not None

    def bind(self, node: Node) -> dict[str, Any]:
        """Arguments of a call node by name; a module call binds its inputs only."""
        names = self.parameters
        if node.op == "call_module":
            names = tuple(
                n for n in names if self.roles.get(n, "activation") != "weight"
            )
        return {**dict(zip(names, node.args, strict=False)), **node.kwargs}

    def with_argument(self, node: Node, name: str, value: Any) -> None:
        """Replace one named argument of a call node, wherever it stands."""
        if name in node.kwargs:
            node.update_kwarg(name, value)
            return
        node.update_arg(self.parameters.index(name), value)


class OpTable:
    """Rows by spelling. Immutable: `with_rows` returns an extended table."""

    def __init__(self, rows: Sequence[OpInfo]) -> None:
        self.rows = tuple(rows)
        self._modules = {m: row for row in self.rows for m in row.modules}
        self._functions = {f: row for row in self.rows for f in row.functions}
        self._methods = {m: row for row in self.rows for m in row.methods}

    def __repr__(self) -> str:
        return f"OpTable({', '.join(row.name for row in self.rows)})"

    def with_rows(self, *rows: OpInfo) -> OpTable:
        """This table and more rows; a later row wins where spellings meet."""
        return OpTable((*self.rows, *rows))

    def find(self, node: Node, owner: nn.Module) -> OpInfo | None:
        """The row of a node, or None where the table does not know it."""
        if node.op == "call_function":
            return self._functions.get(node.target)  # type: ignore[arg-type]
        if node.op == "call_method":
            return self._methods.get(str(node.target))
        if node.op == "call_module":
            return self.find_module(owner.get_submodule(str(node.target)))
        return None

    def find_module(self, module: nn.Module) -> OpInfo | None:
        """The row of a module: its class, or a base whose ``forward`` it keeps.

        A subclass with a ``forward`` of its own may compute anything, so it has no row.
        """
        for base in type(module).__mro__:
            row = self._modules.get(base)
            if row is not None:
                return row if type(module).forward is base.forward else None
        return None


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
        boundary="last",
    ),
    OpInfo(
        "matmul",
        ("input", "other"),
        roles={"input": "activation", "other": "activation"},
        functions=(torch.matmul, operator.matmul, torch.bmm, torch.mm),
        methods=("matmul", "bmm", "mm"),
        macs=_matmul_macs,
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
    _unary("abs", "nonnegative", (), (torch.abs, abs), ("abs",)),
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
        ("input", "other"),
        roles={"input": "activation", "other": "activation"},
        functions=(torch.add, operator.add, operator.iadd),
        methods=("add", "add_"),
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

DEFAULT_TABLE = OpTable((*_COMPUTE, *_NONNEGATIVE, *_SIGN_KEEPING))
