"""The one table of operations: spellings, arguments, layouts, MACs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, symbolic_trace

from gdnsq_fx.channels import PER_TENSOR, ChannelLayout
from gdnsq_fx.operands import Operand
from gdnsq_fx.opinfo import OpInfo, OpTable
from gdnsq_fx.optable import DEFAULT_TABLE

_WEIGHTED = [f"conv{d}d" for d in (1, 2, 3)]
_WEIGHTED += [f"conv_transpose{d}d" for d in (1, 2, 3)] + ["linear"]


def _row(name: str) -> OpInfo:
    return next(row for row in DEFAULT_TABLE.rows if row.name == name)


def _nodes(model: nn.Module) -> list[Node]:
    return [n for n in symbolic_trace(model).graph.nodes if n.op.startswith("call_")]


class _Calls(nn.Module):
    """One operation in all its spellings."""

    def __init__(self, *calls: Any) -> None:
        super().__init__()
        self.calls = calls
        self.act = nn.ReLU6()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
        return [call(self, x, y) for call in self.calls]


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("relu", [lambda m, x, y: F.relu(x), lambda m, x, y: torch.relu(x)]),
        ("relu", [lambda m, x, y: x.relu(), lambda m, x, y: F.relu_(x)]),
        ("relu6", [lambda m, x, y: m.act(x), lambda m, x, y: F.relu6(x)]),
        ("matmul", [lambda m, x, y: x @ y, lambda m, x, y: torch.matmul(x, y)]),
        ("matmul", [lambda m, x, y: x.matmul(y), lambda m, x, y: torch.bmm(x, y)]),
        ("matmul", [lambda m, x, y: torch.mm(x, y), lambda m, x, y: x.mm(y)]),
        ("add", [lambda m, x, y: x + y, lambda m, x, y: x.add(y)]),
        ("add", [lambda m, x, y: torch.add(x, y), lambda m, x, y: 1.0 + x]),
        ("mul", [lambda m, x, y: x * y, lambda m, x, y: torch.mul(x, y)]),
        ("cat", [lambda m, x, y: torch.cat([x, y]), lambda m, x, y: torch.concat([x])]),
        ("avg_pool", [lambda m, x, y: m.pool(x), lambda m, x, y: F.avg_pool2d(x, 2)]),
        ("max_pool", [lambda m, x, y: F.max_pool2d(x, 2)]),
        ("max_pool", [lambda m, x, y: torch.max_pool2d(x, 2)]),
        ("reshape", [lambda m, x, y: x.flatten(1), lambda m, x, y: x.view(-1)]),
        (
            "reshape",
            [lambda m, x, y: torch.flatten(x), lambda m, x, y: x.permute(1, 0)],
        ),
        ("abs", [lambda m, x, y: x.abs(), lambda m, x, y: torch.abs(x)]),
        ("abs", [lambda m, x, y: abs(x)]),
        ("mean", [lambda m, x, y: x.mean(), lambda m, x, y: torch.mean(x)]),
    ],
)
def test_spellings(name: str, calls: list[Any]) -> None:
    model = _Calls(*calls)
    found = [DEFAULT_TABLE.find(n, model) for n in _nodes(model)]
    assert [row.name if row else None for row in found] == [name] * len(calls)


@pytest.mark.parametrize("name", _WEIGHTED)
def test_module_function_and_torchs_function_of_layers_with_weights(name: str) -> None:
    row = _row(name)
    assert row.is_compute and row.open is not None and row.layout is not None
    assert getattr(F, name) in row.functions
    if hasattr(torch, name):
        assert getattr(torch, name) in row.functions
    camel = name.replace("_t", "T")
    assert getattr(nn, camel[0].upper() + camel[1:]) in row.modules


@pytest.mark.parametrize("name", _WEIGHTED)
def test_parameters_are_those_of_the_function_in_order(name: str) -> None:
    row = _row(name)
    weight = torch.randn(2, 3) if name == "linear" else torch.randn(4, 4, *[1] * 3)
    if name != "linear":
        weight = weight[(..., *[0] * (3 - int(name[-2])))]
    x = torch.randn(2, weight.shape[1], *[4] * (weight.ndim - 2))
    values = {"input": x, "weight": weight, "bias": None, "groups": 1}
    rest = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1}
    positional = [{**values, **rest}[p] for p in row.parameters]
    named = {p: {**values, **rest}[p] for p in row.parameters}
    function = row.functions[0]
    assert torch.equal(function(*positional), function(**named))


def test_operations_that_the_table_does_not_know() -> None:
    model = _Calls(lambda m, x, y: F.rrelu(x), lambda m, x, y: x.softplus())
    assert [DEFAULT_TABLE.find(n, model) for n in _nodes(model)] == [None, None]
    assert DEFAULT_TABLE.find_module(nn.LayerNorm(2)) is None
    placeholder = next(iter(symbolic_trace(model).graph.nodes))
    assert DEFAULT_TABLE.find(placeholder, model) is None


class _Loud(nn.Linear):
    """A subclass that computes the same."""

    def extra_repr(self) -> str:
        return "loud"


class _Twice(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


def test_a_subclass_has_a_row_only_if_it_keeps_the_forward() -> None:
    assert DEFAULT_TABLE.find_module(_Loud(2, 2)) is _row("linear")
    assert DEFAULT_TABLE.find_module(_Twice(2, 2)) is None
    lazy = nn.LazyConv2d(2, 1)
    lazy(torch.randn(1, 3, 2, 2))
    assert DEFAULT_TABLE.find_module(lazy) is _row("conv2d")
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert DEFAULT_TABLE.find_module(normed) is _row("linear")


def _call(function: Any, *args: Any, **kwargs: Any) -> Node:
    graph = Graph()
    names = {a: graph.placeholder(a) for a in ("x", "w", "b")}
    args = tuple(names.get(a, a) if isinstance(a, str) else a for a in args)
    kwargs = {
        k: names.get(v, v) if isinstance(v, str) else v for k, v in kwargs.items()
    }
    node = graph.call_function(function, args, kwargs)
    graph.output(node)
    return node


@pytest.mark.parametrize(
    "node",
    [
        _call(F.conv2d, "x", "w", "b", 2),
        _call(F.conv2d, "x", "w", stride=2, bias="b"),
        _call(F.conv2d, input="x", weight="w", bias="b", stride=2),
    ],
)
def test_binding_and_replacing_arguments_wherever_they_stand(node: Node) -> None:
    row = _row("conv2d")
    bound = row.bind(node)
    names = {k: getattr(v, "name", v) for k, v in bound.items()}
    assert names == {"input": "x", "weight": "w", "bias": "b", "stride": 2}
    row.with_argument(node, "weight", bound["bias"])
    row.with_argument(node, "bias", None)
    assert {k: getattr(v, "name", v) for k, v in row.bind(node).items()} == {
        "input": "x", "weight": "b", "bias": None, "stride": 2
    }  # fmt: skip


def test_adding_an_argument_that_was_left_out() -> None:
    row = _row("conv2d")
    for node in (_call(F.conv2d, "x", "w"), _call(F.conv2d, "x", weight="w")):
        value = row.bind(node)["weight"]
        row.with_argument(node, "bias", value)
        assert row.bind(node)["bias"] is value
        assert row.bind(node)["input"].name == "x"


def test_names_that_other_spellings_give_an_argument() -> None:
    row = _row("matmul")
    for node in (
        _call(torch.bmm, "x", mat2="w"),
        _call(torch.mm, input="x", mat2="w"),
        _call(torch.matmul, input="x", other="w"),
    ):
        bound = row.bind(node)
        assert (bound["input"].name, bound["other"].name) == ("x", "w")


def test_a_module_call_binds_its_input() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    for args, kwargs in (((x,), {}), ((), {"input": x})):
        node = graph.call_module("fc", args, kwargs)
        assert _row("linear").bind(node) == {"input": x}


# --- layouts ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "shape", "dims", "scale"),
    [
        (PER_TENSOR, (4, 3, 2), (0, 1, 2), (1, 1, 1)),
        (ChannelLayout(0), (4, 3, 2), (1, 2), (4, 1, 1)),
        (ChannelLayout(0), (4, 3), (1,), (4, 1)),
        (ChannelLayout(1), (4, 3, 2), (0, 2), (1, 3, 1)),
        (ChannelLayout(1, groups=2), (4, 3, 2), (1, 3), (2, 1, 3, 1)),
        (ChannelLayout(None, groups=2), (4, 3, 2), (0, 1, 2, 3), (1, 1, 1, 1)),
    ],
)
def test_layouts(layout: ChannelLayout, shape: Any, dims: Any, scale: Any) -> None:
    weight = torch.randn(shape)
    assert layout.reduced_dims(weight.ndim) == dims
    grouped = layout.grouped(weight)
    assert tuple(grouped.amax(dims, keepdim=True).shape) == scale
    steps = torch.rand(scale)
    expanded = layout.expanded(steps, weight.shape)
    wanted = (grouped * steps).reshape(weight.shape)
    assert torch.equal(weight * expanded, wanted)
    assert expanded.ndim == weight.ndim


_WEIGHT = Operand("weight", None, "weight", None)


def test_grouped_channels_of_a_transposed_convolution() -> None:
    """Output channel g * out/groups + c is ``weight[inputs of g, c]``."""
    layer = nn.ConvTranspose1d(4, 6, 1, groups=2, bias=False)
    layout = _row("conv_transpose1d").layout_of({"groups": 2}, _WEIGHT)
    scale = torch.arange(1.0, 7.0)
    x = torch.randn(2, 4, 3)
    wanted = layer(x) * scale.reshape(1, 6, 1)
    shaped = scale.reshape(2, 1, 3, 1)
    with torch.no_grad():
        layer.weight.mul_(layout.expanded(shaped, layer.weight.shape))
    torch.testing.assert_close(layer(x), wanted)


# --- tables -----------------------------------------------------------------------


def test_a_users_row_joins_and_may_replace() -> None:
    mine = OpInfo("mine", ("input",), functions=(F.silu, F.relu), methods=("sin",))
    table = DEFAULT_TABLE.with_rows(mine)
    model = _Calls(
        lambda m, x, y: F.silu(x), lambda m, x, y: F.relu(x), lambda m, x, y: x.sin()
    )
    assert all(table.find(n, model) is mine for n in _nodes(model))
    assert DEFAULT_TABLE.find(_nodes(model)[1], model) is _row("relu")
    assert len(table.rows) == len(DEFAULT_TABLE.rows) + 1
    assert repr(OpTable((mine,))) == "OpTable(mine)"


def test_names_are_unique_and_every_row_has_a_spelling() -> None:
    names = [row.name for row in DEFAULT_TABLE.rows]
    assert len(set(names)) == len(names)
    for row in DEFAULT_TABLE.rows:
        assert row.modules or row.functions or row.methods
        assert not row.is_compute or row.sign == "any"


def test_a_graph_module_owns_its_modules() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    traced: GraphModule = symbolic_trace(model)
    node = next(iter(traced.graph.find_nodes(op="call_module")))
    assert DEFAULT_TABLE.find(node, traced) is _row("linear")
