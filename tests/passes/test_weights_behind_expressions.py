"""Weights that are views of parameters, or computed from them, are weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import parametrizations

import gdnsq_fx
from gdnsq_fx.analysis.coverage import totals_of
from gdnsq_fx.annotations import compute_nodes
from gdnsq_fx.channels import PER_TENSOR, ChannelLayout
from gdnsq_fx.passes import InsertQuantizers, PropagateShapes, run_passes
from gdnsq_fx.quantize.quantizer import quantization_disabled
from gdnsq_fx.sites import activation_sites, quantizer_behind, weight_sites
from gdnsq_fx.stored import weight_values

_X = torch.randn(3, 4)


def _prepared(model: nn.Module, x: Tensor = _X, **settings: Any) -> GraphModule:
    bits: dict[str, Any] = {"weight_bits": 4, "act_bits": 4, "first_last": None}
    config = gdnsq_fx.QuantConfig(**{**bits, **settings})
    return gdnsq_fx.prepare(model, x, config, [x])


class _Expression(nn.Module):
    """One product with a weight that is ``function(self)``."""

    def __init__(self, function: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 4))
        self.square = nn.Parameter(torch.randn(4, 4))
        self.kernel = nn.Parameter(torch.randn(2, 3, 4))
        self.register_buffer("scale", torch.rand(12, 1) + 0.5)
        self.act = nn.Tanh()
        self.drop = nn.Dropout(0.5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.function(self))


_VIEWS: dict[str, tuple[Callable[[Any], Tensor], str, ChannelLayout]] = {
    "itself": (lambda m: m.weight, "weight", ChannelLayout(0)),
    "t": (lambda m: m.square.t(), "square", ChannelLayout(1)),
    "T": (lambda m: m.square.T, "square", ChannelLayout(1)),
    "transposed twice": (
        lambda m: m.weight.transpose(0, 1).permute(1, 0),
        "weight",
        ChannelLayout(0),
    ),
    "chunk": (lambda m: m.weight.chunk(3)[1], "weight", ChannelLayout(0)),
    "slice": (lambda m: m.weight[2:7], "weight", ChannelLayout(0)),
    "slice of inputs": (
        lambda m: torch.cat([m.weight, m.weight], 1)[:, 2:6],
        "linear.weight",
        ChannelLayout(0),
    ),
    "reshape": (lambda m: m.kernel.reshape(6, 4), "kernel", ChannelLayout(1)),
    "channels lost": (lambda m: m.weight.reshape(6, 8)[:, ::2], "weight", PER_TENSOR),
    "expression": (
        lambda m: (m.weight - m.weight.mean()) / m.weight.std(),
        "linear.weight",
        ChannelLayout(0),
    ),
    "scaled by a buffer": (
        lambda m: m.weight * m.scale,
        "linear.weight",
        ChannelLayout(0),
    ),
    "view of an expression": (
        lambda m: torch.tanh(m.square).t(),
        "linear.weight",
        ChannelLayout(1),
    ),
    "module": (lambda m: m.act(m.weight), "linear.weight", ChannelLayout(0)),
    "standardized": (
        lambda m: F.batch_norm(
            m.weight.reshape(1, 12, -1), None, None, training=True
        ).reshape_as(m.weight),
        "linear.weight",
        ChannelLayout(0),
    ),
}


@pytest.mark.parametrize("case", _VIEWS)
def test_where_the_quantizer_stands_and_its_channels(case: str) -> None:
    function, name, layout = _VIEWS[case]
    model = _Expression(function)
    qmodel = _prepared(model)
    (site,) = weight_sites(qmodel)
    source = site.node.args[0]
    expected = name if source.op == "get_attr" else "linear.weight"
    assert (str(source.target) if source.op == "get_attr" else site.edge) == expected
    assert site.quantizer.layout == layout
    assert [s.edge for s in activation_sites(qmodel)] == ["linear.input"]
    (node,) = compute_nodes(qmodel)
    assert quantizer_behind(qmodel, node.args[1]) is site.quantizer


@pytest.mark.parametrize("case", _VIEWS)
def test_identity_analysis_fine_tuning_and_conversion(case: str, tmp_path: Any) -> None:
    model = _Expression(_VIEWS[case][0])
    qmodel = _prepared(model)
    with quantization_disabled(qmodel):
        assert torch.equal(qmodel(_X), model(_X))
    report = gdnsq_fx.analyze(qmodel, [_X])
    assert report.coverage.macs == 1.0
    assert all(edge.predicted_divergence > 0 for edge in report.edges)
    gdnsq_fx.finetune(qmodel, [_X], steps=3, progress=False)
    imodel = gdnsq_fx.convert(qmodel)
    assert torch.equal(imodel(_X), qmodel(_X))
    assert not list(imodel.parameters())
    gdnsq_fx.save(imodel, tmp_path / "m.safetensors")
    again = gdnsq_fx.load(tmp_path / "m.safetensors", copy.deepcopy(model), _X)
    assert torch.equal(again(_X), imodel(_X))


def test_gradients_reach_the_parameter_through_the_expression() -> None:
    model = _Expression(lambda m: m.weight / m.weight.norm())
    qmodel = _prepared(model)
    (site,) = weight_sites(qmodel)
    site.weight().square().sum().backward()
    assert qmodel.weight.grad is not None


@pytest.mark.parametrize(
    "function",
    [
        lambda m: m.drop(m.weight),
        lambda m: F.dropout(m.weight, 0.5, training=m.training),
        lambda m: m.weight + torch.randn(12, 4),
    ],
)
def test_what_is_random_is_no_weight(exposed, function: Any) -> None:
    module = exposed(_Expression(function).eval(), _X)
    (node,) = compute_nodes(module)
    assert node.args[1] not in weight_values(module)


def test_a_tensor_that_is_written_into_is_no_weight(exposed) -> None:
    class Counting(_Expression):
        def forward(self, x: Tensor) -> Tensor:
            self.scale.add_(x.mean().detach())
            return F.linear(x, self.weight * self.scale)

    module = exposed(Counting(lambda m: m.weight), _X)
    found = {node.name for node in weight_values(module)}
    assert "weight" in found and "scale" not in found


def test_parts_of_one_parameter_share_its_quantizer() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            memory = x.flip(1)
            return self.attn(x, memory, memory, need_weights=True)[0]

    model = Net().eval()
    qmodel = _prepared(model, x)
    assert [site.edge for site in weight_sites(qmodel)] == [
        "attn.in_proj_weight",
        "attn.out_proj.weight",
    ]
    first = weight_sites(qmodel)[0].quantizer
    assert first.log2_step.shape == (24, 1)
    with quantization_disabled(qmodel):
        assert torch.equal(qmodel(x), model(x))
    report = gdnsq_fx.analyze(qmodel, [x])
    assert report.coverage.macs == report.coverage.weights == 1.0
    imodel = gdnsq_fx.convert(qmodel)
    assert torch.equal(imodel(x), qmodel.eval()(x))


def test_an_excluded_reader_of_a_part_keeps_the_parameter() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.weight.chunk(2)
            return torch.matmul(F.linear(x, left), right)

    model = Net()
    qmodel = _prepared(model, exclude=("op:matmul",))
    linear, product = compute_nodes(qmodel)
    assert quantizer_behind(qmodel, linear.args[1]) is not None
    assert quantizer_behind(qmodel, product.args[1]) is None
    imodel = gdnsq_fx.convert(qmodel)
    assert torch.equal(imodel(_X), qmodel(_X))
    assert totals_of(qmodel).float_size_bytes == 4 * 2 * 32  # stored both ways


class _Tied(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.transposed = transposed
        if not transposed:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).tanh()
        return x @ self.embed.weight.t() if self.transposed else self.head(x)


@pytest.mark.parametrize("transposed", [False, True])
def test_an_embedding_and_its_head_share_one_quantizer(transposed: bool) -> None:
    tokens = torch.randint(0, 6, (3, 5))
    qmodel = _prepared(_Tied(transposed), tokens)
    (site,) = weight_sites(qmodel)
    assert site.edge == "embed.weight"
    assert site.quantizer.log2_step.shape == (6, 1)
    assert len(site.node.users) == 2
    assert torch.equal(gdnsq_fx.convert(qmodel)(tokens), qmodel.eval()(tokens))


class _Table(nn.Module):
    """Rows of a table: so many as the input has positions, or as an index picks."""

    def __init__(self, *, by_index: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 4))
        self.by_index = by_index

    def forward(self, x: Tensor) -> Tensor:
        rows = x[:, 0].argsort() if self.by_index else slice(x.shape[0])
        return x @ self.table[rows].t()


@pytest.mark.parametrize("by_index", [False, True])
def test_views_may_depend_on_the_input(by_index: bool) -> None:
    model = _Table(by_index=by_index)
    qmodel = _prepared(model)
    (site,) = weight_sites(qmodel)
    assert str(site.node.args[0].target) == "table"
    assert site.quantizer.layout == (PER_TENSOR if by_index else ChannelLayout(0))
    imodel = gdnsq_fx.convert(qmodel)
    for x in (_X, torch.randn(5, 4)):
        with quantization_disabled(qmodel):
            assert torch.equal(qmodel(x), model(x))
        assert torch.equal(imodel(x), qmodel(x))


def test_a_second_run_changes_nothing(exposed) -> None:
    module = exposed(_Expression(lambda m: m.weight.chunk(3)[1]), _X)
    run_passes(module, (PropagateShapes((_X,)), InsertQuantizers()))
    assert InsertQuantizers()(module).modified is False
    assert len(weight_sites(module)) == 1


def test_size_counts_what_the_deployed_model_stores() -> None:
    """The standardized weight and not what it was made of; both where both are read."""
    qmodel = _prepared(_Expression(lambda m: m.weight * m.scale), per_channel=False)
    gdnsq_fx.analyze(qmodel, [_X])
    unread = 16 + 24  # parameters that this graph does not read
    assert totals_of(qmodel).float_size_bytes == 4 * (48 + unread)
    assert totals_of(qmodel).size_bytes == 48 // 2 + 8 + 4 * unread


def test_weight_norm_is_stored_as_codes() -> None:
    qmodel = _prepared(nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))))
    gdnsq_fx.analyze(qmodel, [_X])
    assert totals_of(qmodel).float_size_bytes == 4 * (16 + 4)
    assert totals_of(qmodel).size_bytes == 16 // 2 + 4 * 8 + 4 * 4


class _Recurrent(nn.Module):
    def __init__(self, kind: Any, **settings: Any) -> None:
        super().__init__()
        self.rnn = kind(4, 6, batch_first=True, **settings)
        self.head = nn.Linear(6 * (2 if settings.get("bidirectional") else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].mean(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "bidirectional": True}])
def test_recurrent_layers(kind: Any, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4)
    model = _Recurrent(kind, **settings).eval()
    qmodel = _prepared(model, x)
    matrices = {
        f"rnn.{n}" for n, _ in model.rnn.named_parameters() if n.startswith("weight")
    }
    assert {s.edge for s in weight_sites(qmodel)} == matrices | {"head.weight"}
    assert [s.edge for s in activation_sites(qmodel)] == ["rnn.input", "head.input"]
    with quantization_disabled(qmodel):
        assert torch.equal(qmodel(x), model(x))
    report = gdnsq_fx.analyze(qmodel, [x], confirm=2)
    assert report.coverage.weights == 1.0
    assert 0.0 < report.coverage.macs < 1.0
    (skip,) = report.coverage.skipped
    assert skip.name == "rnn"
    assert "inside the fused call: the hidden state (" in skip.reason
    assert all(edge.predicted_divergence > 0 for edge in report.edges)
    gdnsq_fx.finetune(qmodel, [x], steps=3, progress=False)
    imodel = gdnsq_fx.convert(qmodel)
    assert torch.equal(imodel(x), qmodel(x))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_are_quantized_with_their_hidden_state(kind: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = kind(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            state = self.cell(x[:, 0])
            state = self.cell(x[:, 1], state)
            return state[0] if isinstance(state, tuple) else state

    torch.manual_seed(0)
    x = torch.randn(3, 2, 4)
    model = Net().eval()
    qmodel = _prepared(model, x)
    report = gdnsq_fx.analyze(qmodel, [x])
    assert report.coverage.macs == report.coverage.weights == 1.0
    assert report.coverage.skipped == ()
    assert len(weight_sites(qmodel)) == 2
    with quantization_disabled(qmodel):
        assert torch.equal(qmodel(x), model(x))
    assert torch.equal(gdnsq_fx.convert(qmodel)(x), qmodel.eval()(x))
