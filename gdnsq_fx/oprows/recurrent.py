"""Recurrent layers and their cells: all weight matrices, and what flows in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gdnsq_fx.channels import ChannelLayout
from gdnsq_fx.operands import Role, Shape
from gdnsq_fx.opinfo import OpInfo

_ROWS = ChannelLayout(axis=0)
_SETTINGS = ("has_biases", "num_layers", "dropout", "train", "bidirectional")


def _order(target: object, args: Sequence[Any]) -> Sequence[str] | None:
    """Packed sequences come with their batch sizes, and the weights one place later."""
    del target
    if len(args) > 3 and isinstance(args[3], list | tuple):
        return ("input", "batch_sizes", "hx", "weights", *_SETTINGS)
    return None


def _pass_count(bound: Mapping[str, Any]) -> int:
    """How many weights one pass (a layer in one direction) has."""
    directions = 2 if bound["bidirectional"] else 1
    return len(bound["weights"]) // (int(bound["num_layers"]) * directions)


def _roles(bound: Mapping[str, Any]) -> Sequence[Role]:
    """``w_ih, w_hh``, then ``b_ih, b_hh`` where there are biases, then a projection."""
    roles: tuple[Role, ...] = ("weight", "weight")
    if bound["has_biases"]:
        roles = (*roles, "bias", "bias")
    count = _pass_count(bound)
    if len(roles) < count:
        roles = (*roles, "weight")
    return roles * (len(bound["weights"]) // count)


def _matrices(shapes: Sequence[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes if len(shape) > 1)


def _macs(arguments: Mapping[str, Any], output: Shape) -> int:
    """Each time step of each sample meets every matrix of every layer once."""
    del output
    return math.prod(arguments["input"][:-1]) * _matrices(arguments["weights"])


def _inner_macs(arguments: Mapping[str, Any], output: Shape) -> int:
    """All but the products of the input itself, which only the first layer reads."""
    weights = arguments["weights"]
    first = [weights[0]]
    if arguments["bidirectional"]:
        first.append(weights[_pass_count(arguments)])
    steps = math.prod(arguments["input"][:-1])
    return _macs(arguments, output) - steps * _matrices(first)


def _cell_macs(arguments: Mapping[str, Any], output: Shape) -> int:
    del output
    samples = math.prod(arguments["input"][:-1])
    return samples * _matrices([arguments["w_ih"], arguments["w_hh"]])


def _state_roles(bound: Mapping[str, Any]) -> Sequence[Role]:
    """The hidden state meets a matrix, the cell state of an LSTM does not."""
    pair = isinstance(bound.get("hx"), list | tuple)
    return ["activation", "other"] if pair else ["activation"]


def _recurrent(name: str, modules: Any, functions: Any) -> OpInfo:
    return OpInfo(
        name,
        ("input", "hx", "weights", *_SETTINGS, "batch_first"),
        roles={"input": "activation", "weights": _roles},
        modules=modules,
        functions=functions,
        aliases={"data": "input", "params": "weights"},
        order=_order,
        macs=_macs,
        inner_macs=_inner_macs,
        inner="the hidden state",
        layout=_ROWS,
        inputs=("input", "hx"),
        linear=False,
        channel_dim=None,
    )


def _cell(name: str, modules: Any, functions: Any) -> OpInfo:
    return OpInfo(
        name,
        ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh"),
        roles={
            "input": "activation",
            "hx": _state_roles,
            "w_ih": "weight",
            "w_hh": "weight",
            "b_ih": "bias",
            "b_hh": "bias",
        },
        modules=modules,
        functions=functions,
        macs=_cell_macs,
        layout=_ROWS,
        inputs=("input", "hx"),
        linear=False,
        channel_dim=None,
    )


RECURRENT = (
    _recurrent("lstm", (nn.LSTM,), (torch.lstm,)),
    _recurrent("gru", (nn.GRU,), (torch.gru,)),
    _recurrent("rnn", (nn.RNN,), (torch.rnn_tanh, torch.rnn_relu)),
    _cell("lstm_cell", (nn.LSTMCell,), (torch.lstm_cell,)),
    _cell("gru_cell", (nn.GRUCell,), (torch.gru_cell,)),
    _cell("rnn_cell", (nn.RNNCell,), (torch.rnn_tanh_cell, torch.rnn_relu_cell)),
)
