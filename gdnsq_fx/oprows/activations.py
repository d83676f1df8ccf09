"""Activation functions and pooling: what they do to values, and to their sign."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import nn

from gdnsq_fx.oprows.unary import unary

# A clamp commutes with the rounding behind it: it needs no grid of its own.
_CLAMPS = (
    unary(
        "relu",
        (nn.ReLU,),
        (F.relu, F.relu_, torch.relu),
        ("relu", "relu_"),
        sign="nonnegative",
    ),
    unary("relu6", (nn.ReLU6,), (F.relu6,), sign="nonnegative"),
    unary(
        "abs", (), (torch.abs, abs, operator.abs), ("abs", "abs_"), sign="nonnegative"
    ),
)

_FUNCTIONS = (
    unary(
        "sigmoid",
        (nn.Sigmoid, nn.Hardsigmoid),
        (F.sigmoid, torch.sigmoid, F.hardsigmoid),
        ("sigmoid", "sigmoid_"),
        sign="nonnegative",
        kind="elementwise",
    ),
    unary(
        "activation",
        (
            *(nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.ELU, nn.SELU, nn.CELU),
            *(nn.Tanh, nn.Softplus, nn.Softsign, nn.LeakyReLU, nn.LogSigmoid),
        ),
        (
            *(F.silu, F.gelu, F.hardswish, F.mish, F.elu, F.selu, F.celu, F.tanh),
            *(torch.tanh, torch.selu, torch.celu, torch.erf, F.softplus, F.softsign),
            *(F.leaky_relu, F.logsigmoid),
        ),
        ("tanh", "tanh_", "erf"),
        kind="elementwise",
    ),
    unary(
        "exp",
        (),
        (torch.exp,),
        ("exp",),
        sign="nonnegative",
        kind="elementwise",
    ),
    unary(
        "square",
        (),
        (torch.square,),
        ("square",),
        sign="nonnegative",
        kind="elementwise",
    ),
    unary(
        "softmax",
        (nn.Softmax, nn.Softmax2d),
        (F.softmax, torch.softmax),
        ("softmax",),
        sign="nonnegative",
        kind="float",
    ),
    unary(
        "log_softmax",
        (nn.LogSoftmax,),
        (F.log_softmax, torch.log_softmax),
        ("log_softmax",),
        kind="float",
    ),
)

# What averages or picks values keeps their sign.
_POOLING = (
    unary(
        "max_pool",
        (
            *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d),
            *(nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
        ),
        (
            *(torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
            *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool1d),
            *(F.adaptive_max_pool2d, F.adaptive_max_pool3d),
        ),
        sign="inherits",
    ),
    unary(
        "avg_pool",
        (
            *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d),
            *(nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
        ),
        (
            *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d),
            *(F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
        ),
        sign="inherits",
        kind="elementwise",
    ),
    unary(
        "mean",
        (),
        (torch.mean, torch.sum),
        ("mean", "sum"),
        sign="inherits",
        kind="elementwise",
    ),
    unary(
        "interpolate",
        (nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d),
        (F.interpolate,),
        kind="elementwise",
    ),
    unary(
        "dropout",
        (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        (F.dropout, torch.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
        sign="inherits",
    ),
)

ACTIVATIONS = (*_CLAMPS, *_FUNCTIONS, *_POOLING)
