"""Layers with a weight of their own: convolutions, linear, bilinear, embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdnsq_fx.channels import ChannelLayout
from gdnsq_fx.operands import Call, Operand, Role, Shape, Stored
from gdnsq_fx.opinfo import OpInfo

_ROWS = ChannelLayout(axis=0)
_WEIGHTED: Mapping[str, Role] = MappingProxyType(
    {"input": "activation", "weight": "weight", "bias": "bias"}
)
_CONV_SETTINGS = ("stride", "padding", "dilation", "groups")
_TRANSPOSED_SETTINGS = ("stride", "padding", "output_padding", "groups", "dilation")


def output_padding(
    value: Tensor,
    output_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """What a transposed convolution adds at the end to reach a size.

    Args:
        value: its input, ``[N, C, *sizes]`` or ``[C, *sizes]``.
        output_size: wanted sizes, the last ones of which are the spatial ones.
        stride, padding, kernel_size, dilation: its settings, one for each dimension.
    """
    dims = len(kernel_size)
    sizes, wanted = value.shape[-dims:], output_size[-dims:]
    least = [
        (size - 1) * step - 2 * pad + spread * (kernel - 1) + 1
        for size, step, pad, kernel, spread in zip(
            sizes, stride, padding, kernel_size, dilation, strict=True
        )
    ]
    return [size - low for size, low in zip(wanted, least, strict=True)]


# --- formulas ---------------------------------------------------------------------


def _forward_macs(arguments: Mapping[str, Any], output: Shape) -> int:
    """Each output element takes one MAC for each weight of its channel."""
    return math.prod(output) * math.prod(arguments["weight"][1:])


def _transposed_macs(arguments: Mapping[str, Any], output: Shape) -> int:
    """Each input element meets every weight of its input channel once."""
    del output
    return math.prod(arguments["input"]) * math.prod(arguments["weight"][1:])


def _lookup_macs(arguments: Mapping[str, Any], output: Shape) -> int:
    """A look-up multiplies nothing; its weight is stored and read all the same."""
    del arguments, output
    return 0


def _transposed_layout(bound: Mapping[str, Any], operand: Operand) -> ChannelLayout:
    del operand
    return ChannelLayout(axis=1, groups=int(bound.get("groups", 1)))


# --- modules as calls -------------------------------------------------------------


def _settings(module: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names}


def _call(function: Callable[..., Any], value: Any, **settings: Any) -> Call:
    return Call(function, (value, Stored("weight"), Stored("bias")), settings)


def _open_conv(function: Callable[..., Any]) -> Any:
    def open_(module: nn.Module, given: Mapping[str, Any]) -> Call:
        settings = _settings(module, _CONV_SETTINGS)
        mode = str(module.padding_mode)
        if mode == "zeros":
            return _call(function, given["input"], **settings)
        # The module pads by its own mode and then convolves without padding.
        sizes: Any = module._reversed_padding_repeated_twice
        padded = Call(F.pad, (given["input"], tuple(sizes), mode))
        return _call(function, padded, **{**settings, "padding": 0})

    return open_


def _open_transposed(function: Callable[..., Any]) -> Any:
    def open_(module: nn.Module, given: Mapping[str, Any]) -> Call:
        settings = _settings(module, _TRANSPOSED_SETTINGS)
        wanted = given.get("output_size")
        if wanted is not None:
            sizes = _settings(module, ("stride", "padding", "kernel_size", "dilation"))
            missing = Call(output_padding, (given["input"], wanted), sizes)
            settings["output_padding"] = missing
        return _call(function, given["input"], **settings)

    return open_


def _open_linear(module: nn.Module, given: Mapping[str, Any]) -> Call:
    del module
    return _call(F.linear, given["input"])


def _open_bilinear(module: nn.Module, given: Mapping[str, Any]) -> Call:
    del module
    values = (given["input1"], given["input2"])
    return Call(F.bilinear, (*values, Stored("weight"), Stored("bias")))


_EMBEDDING_SETTINGS = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq")


def _open_embedding(module: nn.Module, given: Mapping[str, Any]) -> Call:
    settings = _settings(module, (*_EMBEDDING_SETTINGS, "sparse"))
    return Call(F.embedding, (given["input"], Stored("weight")), settings)


def _open_embedding_bag(module: nn.Module, given: Mapping[str, Any]) -> Call:
    names = (*_EMBEDDING_SETTINGS, "mode", "sparse", "include_last_offset")
    settings = _settings(module, names)
    for name in ("offsets", "per_sample_weights"):
        settings[name] = given.get(name)
    return Call(F.embedding_bag, (given["input"], Stored("weight")), settings)


def _rewrites_weight(bound: Mapping[str, Any]) -> str | None:
    if bound.get("max_norm") is None:
        return None
    return "max_norm rewrites rows of its weight on every call; set max_norm=None"


def _weight_first(target: object, args: Sequence[Any]) -> Sequence[str] | None:
    """Torch's own functions have the weight first."""
    del args
    if target is torch.embedding:
        return ("weight", "input", "padding_idx", "scale_grad_by_freq", "sparse")
    return None


# --- rows -------------------------------------------------------------------------


def _conv(name: str, module: type[nn.Module], function: Callable[..., Any]) -> OpInfo:
    return OpInfo(
        name,
        ("input", "weight", "bias", *_CONV_SETTINGS),
        roles=_WEIGHTED,
        modules=(module,),
        functions=(function,),
        macs=_forward_macs,
        layout=_ROWS,
        open=_open_conv(function),
        inputs=("input",),
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
        inputs=("input", "output_size"),
    )


LAYERS = (
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
        layout=_ROWS,
        open=_open_linear,
        inputs=("input",),
        channel_dim=-1,
        boundary="last",
    ),
    OpInfo(
        "bilinear",
        ("input1", "input2", "weight", "bias"),
        roles={
            "input1": "activation",
            "input2": "activation",
            "weight": "weight",
            "bias": "bias",
        },
        modules=(nn.Bilinear,),
        functions=(F.bilinear, torch.bilinear),
        macs=_forward_macs,
        layout=_ROWS,
        open=_open_bilinear,
        inputs=("input1", "input2"),
        channel_dim=-1,
    ),
    OpInfo(
        "embedding",
        ("input", "weight", *_EMBEDDING_SETTINGS, "sparse"),
        roles={"weight": "weight"},
        modules=(nn.Embedding,),
        functions=(F.embedding, torch.embedding),
        macs=_lookup_macs,
        layout=_ROWS,
        open=_open_embedding,
        refusal=_rewrites_weight,
        order=_weight_first,
        aliases={"indices": "input"},
        inputs=("input",),
        channel_dim=None,
    ),
    OpInfo(
        "embedding_bag",
        (
            *("input", "weight", "offsets", "max_norm", "norm_type"),
            *("scale_grad_by_freq", "mode", "sparse", "per_sample_weights"),
            *("include_last_offset", "padding_idx"),
        ),
        roles={"weight": "weight"},
        modules=(nn.EmbeddingBag,),
        functions=(F.embedding_bag,),
        macs=_lookup_macs,
        layout=_ROWS,
        open=_open_embedding_bag,
        refusal=_rewrites_weight,
        inputs=("input", "offsets", "per_sample_weights"),
        channel_dim=None,
    ),
)
