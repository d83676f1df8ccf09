"""The rows by group: spellings, MACs against counting by hand, arguments in lists."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils.flop_counter import FlopCounterMode

from gdnsq_fx.annotations import facts
from gdnsq_fx.errors import PassError
from gdnsq_fx.opinfo import OpInfo
from gdnsq_fx.optable import DEFAULT_TABLE
from gdnsq_fx.passes import AnnotateOperations, PropagateShapes, run_passes


def _called(kind: str, target: Any, *args: Any, **kwargs: Any) -> tuple[Node, Any]:
    """A graph of one call whose tensors are its inputs, with its facts."""
    graph = Graph()
    values: list[Tensor] = []

    def placed(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(placed(item) for item in value)
        if not isinstance(value, Tensor):
            return value
        values.append(value)
        return graph.placeholder(f"x{len(values)}")

    node_args = tuple(placed(value) for value in args)
    node_kwargs = {name: placed(value) for name, value in kwargs.items()}
    node = graph.create_node(kind, target, node_args, node_kwargs)
    graph.output(node)
    module = GraphModule(nn.Module(), graph)
    run_passes(module, (AnnotateOperations(), PropagateShapes(tuple(values))))
    return node, module


def _whole_batch(node: Node) -> int:
    return facts(node).macs * facts(node).batch


_A, _B = torch.randn(1, 3, 4), torch.randn(1, 4, 5)
_M, _N, _V = torch.randn(3, 4), torch.randn(4, 5), torch.randn(4)

_PRODUCTS: list[tuple[str, str, Any, tuple[Any, ...], int]] = [
    ("matmul", "call_function", torch.matmul, (_A, _B), 60),
    ("matmul", "call_function", operator.matmul, (_A, _B), 60),
    ("matmul", "call_function", operator.imatmul, (_A, _B), 60),
    ("matmul", "call_function", torch.bmm, (_A, _B), 60),
    ("matmul", "call_function", torch.mm, (_M, _N), 60),
    ("matmul", "call_function", torch.mv, (_M, _V), 12),
    ("matmul", "call_function", torch.dot, (_V, _V), 4),
    ("matmul", "call_method", "matmul", (_A, _B), 60),
    ("matmul", "call_method", "__rmatmul__", (_B, _A), 60),
    ("matmul", "call_method", "mv", (_M, _V), 12),
    ("inner", "call_function", torch.inner, (_M, torch.randn(7, 4)), 84),
    ("addmm", "call_function", torch.addmm, (torch.randn(5), _M, _N), 60),
    ("addmm", "call_function", torch.baddbmm, (torch.randn(1, 1, 5), _A, _B), 60),
    ("addmm", "call_function", torch.addmv, (torch.randn(3), _M, _V), 12),
    ("addmm", "call_method", "addbmm", (torch.randn(3, 5), _A, _B), 60),
    ("tensordot", "call_function", torch.tensordot, (_M, _N, 1), 60),
    ("tensordot", "call_function", torch.tensordot, (_M, _M, 2), 12),
    ("einsum", "call_function", torch.einsum, ("ij,jk->ik", _M, _N), 60),
    ("einsum", "call_function", torch.einsum, ("ij,jk", [_M, _N]), 60),
    ("einsum", "call_function", torch.einsum, ("...ij,...jk->...ik", _A, _B), 60),
    ("einsum", "call_function", torch.einsum, ("b...j, j k", _A, _N), 60),
    ("einsum", "call_function", torch.einsum, ("ij,jk,j->k", _M, _N, _V), 60),
    ("einsum", "call_function", torch.einsum, ("i...,ij->j...", _N, _N), 100),
    (
        "bilinear",
        "call_function",
        F.bilinear,
        (_M, _M, torch.randn(2, 4, 4)),
        3 * 2 * 16,
    ),
]


@pytest.mark.parametrize(("name", "kind", "target", "args", "macs"), _PRODUCTS)
def test_macs_of_products(
    name: str, kind: str, target: Any, args: tuple[Any, ...], macs: int
) -> None:
    node, _ = _called(kind, target, *args)
    op = facts(node).op
    assert op is not None and op.name == name and op.is_compute
    assert _whole_batch(node) == macs
    held = [o for o in op.operands(op.bind(node)) if isinstance(o.value, Node)]
    assert len({o.value for o in held}) == len(node.all_input_nodes)


@pytest.mark.parametrize("gqa", [False, True])
def test_macs_of_attention(gqa: bool) -> None:
    """Two products: 3 * 5 positions of 4 wide queries and of 6 wide values."""
    heads = 2 if gqa else 4
    q = torch.randn(2, 4, 3, 4)
    k, v = torch.randn(2, heads, 5, 4), torch.randn(2, heads, 5, 6)
    target = F.scaled_dot_product_attention
    node, _ = _called("call_function", target, q, k, v, enable_gqa=gqa)
    assert facts(node).macs == 4 * 3 * 5 * (4 + 6)
    assert facts(node).inner_macs == 4 * 3 * 5 * 6


def _recurrent(kind: type[nn.RNNBase], **settings: Any) -> tuple[Any, ...]:
    """Positional arguments of the torch function that a layer calls."""
    layer = kind(4, 6, **settings)
    directions = 2 if layer.bidirectional else 1
    size = layer.proj_size or 6
    hidden = torch.zeros(layer.num_layers * directions, 2, size)
    cell = torch.zeros(layer.num_layers * directions, 2, 6)
    hx = (hidden, cell) if kind is nn.LSTM else hidden
    values = [p.detach() for p in layer._flat_weights]
    flags = (layer.bias, layer.num_layers, 0.0, False, layer.bidirectional)
    return hx, values, flags


@pytest.mark.parametrize(
    ("kind", "function"),
    [(nn.LSTM, torch.lstm), (nn.GRU, torch.gru), (nn.RNN, torch.rnn_tanh)],
)
@pytest.mark.parametrize(
    "settings", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}]
)
def test_recurrent_layers(kind: Any, function: Any, settings: dict[str, Any]) -> None:
    hx, values, flags = _recurrent(kind, **settings)
    x = torch.randn(5, 2, 4)
    node, _ = _called("call_function", function, x, hx, values, *flags, False)
    matrices = [p for p in values if p.ndim == 2]
    assert _whole_batch(node) == 10 * sum(p.numel() for p in matrices)
    first = [p for p in matrices if p.shape[1] == 4]  # what reads the input itself
    outer = (facts(node).macs - facts(node).inner_macs) * facts(node).batch
    assert outer == 10 * sum(p.numel() for p in first)
    op = facts(node).op
    assert op is not None
    operands = op.operands(op.bind(node))
    assert [o.argument for o in operands if o.role == "activation"] == ["input"]
    assert sum(o.role == "weight" for o in operands) == len(matrices)
    assert {o.index for o in operands if o.role == "weight"} == {
        i for i, p in enumerate(values) if p.ndim == 2
    }


def test_projections_and_packed_sequences() -> None:
    hx, values, flags = _recurrent(nn.LSTM, proj_size=3)
    node, _ = _called(
        "call_function", torch.lstm, torch.randn(5, 2, 4), hx, values, *flags, False
    )
    op = facts(node).op
    assert op is not None
    roles = [o.role for o in op.operands(op.bind(node)) if o.argument == "weights"]
    assert roles == ["weight", "weight", "bias", "bias", "weight"]
    hx, values, flags = _recurrent(nn.GRU)
    data, sizes = torch.randn(7, 4), torch.tensor([2, 2, 1, 1, 1])
    node, _ = _called("call_function", torch.gru, data, sizes, hx, values, *flags)
    assert facts(node).macs * facts(node).batch == 7 * (24 + 36) * 3


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        (nn.LSTMCell, torch.lstm_cell),
        (nn.GRUCell, torch.gru_cell),
        (nn.RNNCell, torch.rnn_tanh_cell),
    ],
)
def test_cells(kind: Any, function: Any) -> None:
    cell = kind(4, 6)
    state = torch.randn(2, 6)
    hx = (state, state.clone()) if kind is nn.LSTMCell else state
    weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    values = [p.detach() for p in weights]
    node, _ = _called("call_function", function, torch.randn(2, 4), hx, *values)
    assert facts(node).macs == values[0].numel() + values[1].numel()
    op = facts(node).op
    assert op is not None
    names = [
        o.name for o in op.operands(op.bind(node)) if o.role in ("activation", "weight")
    ]
    state_name = "hx.0" if kind is nn.LSTMCell else "hx"
    assert names == ["input", state_name, "w_ih", "w_hh"]


def test_layers_that_are_still_modules_have_macs() -> None:
    for layer, x, macs in (
        (nn.LSTM(4, 6), torch.randn(5, 2, 4), 5 * 4 * 6 * 10),
        (nn.GRUCell(4, 6), torch.randn(2, 4), 3 * 6 * 10),
    ):
        graph = Graph()
        node = graph.call_module("layer", (graph.placeholder("x"),))
        graph.output(node)
        module = GraphModule(nn.ModuleDict({"layer": layer}), graph)
        run_passes(module, (AnnotateOperations(), PropagateShapes((x,))))
        assert _whole_batch(node) == macs * 2


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize(
    "call",
    [
        lambda i, w, m: (F.embedding, (i, w, None, m)),
        lambda i, w, m: (F.embedding_bag, (i, w, None, m)),
    ],
)
def test_embeddings(call: Callable[..., Any], max_norm: float | None) -> None:
    target, args = call(torch.tensor([[0, 2]]), torch.randn(3, 4), max_norm)
    node, _ = _called("call_function", target, *args)
    op = facts(node).op
    assert op is not None and op.is_compute and facts(node).macs == 0
    bound = op.bind(node)
    assert [o.argument for o in op.operands(bound)] == ["weight"]
    assert op.refusal is not None
    reason = op.refusal(bound)
    assert (reason is None) == (max_norm is None)
    assert reason is None or "rewrites rows of its weight" in reason


def test_torchs_own_embedding_has_its_weight_first() -> None:
    weight, index = torch.randn(3, 4), torch.tensor([[0, 2]])
    node, _ = _called("call_function", torch.embedding, weight, index)
    op = facts(node).op
    assert op is not None
    assert op.bind(node)["weight"].name == "x1"


def test_replacing_one_item_of_a_list() -> None:
    for args in (("ij,jk", _M, _N), ("ij,jk", [_M, _N])):
        node, _ = _called("call_function", torch.einsum, *args)
        op = facts(node).op
        assert op is not None
        first = op.bind(node)["operands"][0]
        op.with_argument(node, "operands", first, index=1)
        assert [o.value for o in op.operands(op.bind(node))] == [first, first]
        assert len(node.args) == len(args)
    node, _ = _called("call_function", torch.cat, [_M, _M])
    op = facts(node).op
    assert op is not None
    op.with_argument(node, "tensors", None, index=0)
    assert [o.name for o in op.operands(op.bind(node))] == ["tensors.0", "tensors.1"]
    assert op.bind(node)["tensors"][0] is None


@pytest.mark.parametrize(
    ("equation", "index", "axis"),
    [
        ("bi,oi->bo", 1, 0),
        ("bi,io->bo", 1, 1),
        ("bhi,hio->bho", 1, 2),
        ("bi,i->b", 1, None),
        ("...i,io->...o", 1, 1),
        ("io,bi->bo", 0, 1),
        ("b...i,...io->b...o", 1, -1),
    ],
)
def test_output_channels_of_einsum(equation: str, index: int, axis: int | None) -> None:
    row = next(r for r in DEFAULT_TABLE.rows if r.name == "einsum")
    bound = {"equation": equation, "operands": (None, None)}
    operand = row.operands(bound)[index]
    assert row.layout_of(bound, operand).axis == axis


def test_einsum_of_index_lists_is_refused_and_counted() -> None:
    node, _ = _called("call_function", torch.einsum, _M, [0, 1], _N, [1, 2], [0, 2])
    op = facts(node).op
    assert op is not None and op.refusal is not None
    assert "write its equation as text" in str(op.refusal(op.bind(node)))
    assert _whole_batch(node) == 60


def test_a_formula_that_fails_names_its_row() -> None:
    row = OpInfo(
        "broken",
        ("input",),
        roles={"input": "activation"},
        functions=(torch.sin,),
        macs=lambda arguments, output: arguments["weight"][0],
    )
    graph = Graph()
    node = graph.call_function(torch.sin, (graph.placeholder("x"),))
    graph.output(node)
    module = GraphModule(nn.Module(), graph)
    table = DEFAULT_TABLE.with_rows(row)
    with pytest.raises(PassError, match=r"row 'broken' fails on sin: KeyError"):
        run_passes(module, (AnnotateOperations(table), PropagateShapes((_M,))))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_convolutions(transposed: bool, groups: int) -> None:
    """Depth-wise where there are as many groups as channels; dilated."""
    function = F.conv_transpose2d if transposed else F.conv2d
    x, weight = torch.randn(2, 4, 7, 7), torch.randn(4, 4 // groups, 3, 3)
    settings = {"dilation": 2, "stride": 2, "groups": groups}
    node, _ = _called("call_function", function, x, weight, None, **settings)
    with FlopCounterMode(display=False) as counter:
        function(x, weight, None, **settings)
    assert 2 * _whole_batch(node) == counter.get_total_flops()
