"""The scope ``full``: every tensor between integer kernels lies on one grid."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.annotations import facts
from gdnsq_fx.errors import PassError
from gdnsq_fx.passes import InsertQuantizers, PropagateShapes, run_passes
from gdnsq_fx.quantize.quantizer import quantization_disabled
from gdnsq_fx.sites import activation_sites, sites, weight_sites
from gdnsq_fx.spec import QuantConfig

_X = torch.randn(4, 3, 6, 6)


class _Residual(nn.Module):
    """Two blocks; the output of the first goes to a convolution and to a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.one = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.two = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.norm(self.one(x)) + x)
        x = F.relu(self.two(x) + x)
        return self.head(x.mean((2, 3)))


def _config(**settings: Any) -> QuantConfig:
    given: dict[str, Any] = {"weight_bits": 8, "act_bits": 8, "first_last": None}
    return QuantConfig(**{**given, "scope": "full", **settings})


def _prepared(model: nn.Module, x: Any = _X, **settings: Any) -> GraphModule:
    return gdnsq_fx.prepare(model, x, _config(**settings), [x])


def _inserted(exposed: Any, model: nn.Module, *args: Any, **settings: Any) -> Any:
    module = exposed(model, *args)
    passes = (PropagateShapes(args), InsertQuantizers(_config(**settings)))
    return run_passes(module, passes)


_AFTER = """\
%0 = x
%1 = self.quantizers.stem_input(%0)
%2 = stem.weight
%3 = self.quantizers.stem_weight(%2)
%4 = stem.bias
%5 = conv2d(%1, %3, %4, stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=1)
%6 = relu(%5, inplace=False)
%7 = self.quantizers.one_input(%6)
%8 = one.weight
%9 = self.quantizers.one_weight(%8)
%10 = one.bias
%11 = conv2d(%7, %9, %10, stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=1)
%12 = self.norm(%11)
%13 = self.quantizers.one_input(%12)
%14 = add(%13, %7)
%15 = relu(%14, inplace=False)
%16 = self.quantizers.two_input(%15)
%17 = two.weight
%18 = self.quantizers.two_weight(%17)
%19 = two.bias
%20 = conv2d(%16, %18, %19, stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=1)
%21 = self.quantizers.two_input(%20)
%22 = add(%21, %16)
%23 = relu(%22, inplace=False)
%24 = self.quantizers.mean_input(%23)
%25 = .mean(%24, [2, 3])
%26 = self.quantizers.head_input(%25)
%27 = head.weight
%28 = self.quantizers.head_weight(%27)
%29 = head.bias
%30 = linear(%26, %28, %29)
return %30"""


def _plain(text: str) -> str:
    """Spellings of defaults differ between tracers."""
    return text.replace(", inplace=False", "").replace("dim=", "")


def test_after(exposed, show) -> None:
    assert _plain(show(_inserted(exposed, _Residual(), _X))) == _plain(_AFTER)


def test_second_run_changes_nothing(exposed, show) -> None:
    module = _inserted(exposed, _Residual(), _X)
    before = show(module)
    assert InsertQuantizers(_config())(module).modified is False
    assert show(module) == before


def test_refuses_a_graph_without_shapes(exposed) -> None:
    with pytest.raises(PassError, match=r"scope='full'.*run PropagateShapes first"):
        InsertQuantizers(_config())(exposed(_Residual(), _X))


def test_identity_analysis_fine_tuning_conversion_and_files(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = _Residual().eval()
    qmodel = _prepared(model, act_bits=4, weight_bits=4)
    with quantization_disabled(qmodel):
        assert torch.equal(qmodel(_X), model(_X))
    report = gdnsq_fx.analyze(qmodel, [_X], confirm=3)
    assert len({edge.name for edge in report.edges}) == len(report.edges)
    assert report.coverage.macs == report.coverage.weights == 1.0
    assert report.cut is not None and report.cut.share <= 1.0
    result = gdnsq_fx.finetune(qmodel, [_X], steps=4, progress=False)
    assert set(result.bits) == {site.edge for site in sites(qmodel)}
    assert max(result.bits.values()) <= 4
    imodel = gdnsq_fx.convert(qmodel)
    assert torch.equal(imodel(_X), qmodel(_X))
    gdnsq_fx.save(imodel, tmp_path / "m.safetensors")
    again = gdnsq_fx.load(tmp_path / "m.safetensors", _Residual(), _X)
    assert torch.equal(again(_X), imodel(_X))


def test_a_shared_grid_is_calibrated_on_all_its_tensors() -> None:
    qmodel = _prepared(_Residual().eval())
    site = next(s for s in activation_sites(qmodel) if len(s.nodes) == 2)
    seen: list[Tensor] = []
    site.quantizer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with quantization_disabled(qmodel):
        qmodel(_X)
    low, high = site.quantizer.observed.tolist()
    assert low == min(float(t.min()) for t in seen) < 0
    assert high == max(float(t.max()) for t in seen)
    assert not site.quantizer.nonnegative  # one of the two may be negative


def test_capacity_of_a_shared_grid_is_that_of_its_tensors() -> None:
    qmodel = _prepared(_Residual().eval())
    report = gdnsq_fx.analyze(qmodel, [_X])
    site = next(s for s in activation_sites(qmodel) if len(s.nodes) == 2)
    edge = facts(site.node).edge
    assert edge is not None and edge.elements == 2 * 4 * 36
    bits = [report.graph.nodes[node.name]["bits"] for node in site.nodes]
    assert sum(bits) == pytest.approx(edge.capacity)


class _Calls(nn.Module):
    """A layer, some operation on its output and the input, and another layer."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.LazyLinear(3)
        self.norm = nn.LayerNorm(4)
        self.vector = nn.Parameter(torch.rand(4))
        self.table = nn.Parameter(torch.randn(5, 4))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self, self.first(x), x.tanh()))


_ROWS = torch.randn(2, 5, 4)
_LAST = "last.input"
_CASES: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "sum": (lambda m, y, x: y + x, ["add.input", _LAST]),
    "difference": (lambda m, y, x: torch.sub(y, x), ["sub.input", _LAST]),
    "maximum": (lambda m, y, x: torch.maximum(y, x), ["maximum.input", _LAST]),
    "cat": (lambda m, y, x: torch.cat([y, x], 1), ["cat.tensors.0"]),
    "stack, view": (
        lambda m, y, x: torch.stack([y, x], 1).flatten(0, 1),
        ["stack.tensors.0"],
    ),
    "cat of cat": (
        lambda m, y, x: torch.cat([torch.cat([y, x]), y]),
        ["cat.tensors.0"],
    ),
    "product": (lambda m, y, x: y * x, ["mul.input", "mul.other", _LAST]),
    "square": (lambda m, y, x: y * y, ["mul.input", _LAST]),
    "quotient": (lambda m, y, x: y / (x + 3.0), ["truediv.input", _LAST]),
    "scalars": (lambda m, y, x: 2 * (y + 1.0) / 3, [_LAST]),
    "size": (lambda m, y, x: y / x.shape[-1], [_LAST]),
    "vector": (lambda m, y, x: y * m.vector + m.vector, [_LAST]),
    "relu": (lambda m, y, x: F.relu(y), [_LAST]),
    "gelu": (lambda m, y, x: F.gelu(y), ["gelu.input", _LAST]),
    "mean": (lambda m, y, x: y.mean(1), ["mean.input", _LAST]),
    "views": (lambda m, y, x: y.transpose(1, 2).reshape(-1, 4), [_LAST]),
    "softmax": (lambda m, y, x: y.softmax(-1), [_LAST]),
    "norm": (lambda m, y, x: m.norm(y), [_LAST]),
    "mask": (lambda m, y, x: (y / 2 + x.abs()).softmax(-1), [_LAST]),
    "in place": (lambda m, y, x: y.add_(x), ["add_.input", _LAST]),
}


def _short(edge: str) -> str:
    """Node names as one tracer gives them: ``add_1`` and ``iadd`` are ``add``."""
    name, _, argument = edge.partition(".")
    name = name.rstrip("_0123456789")
    return f"{name}.{argument}"


@pytest.mark.parametrize("case", _CASES)
def test_which_tensors_lie_on_a_grid(case: str) -> None:
    function, wanted = _CASES[case]
    torch.manual_seed(0)
    model = _Calls(function)
    model(_ROWS)
    qmodel = _prepared(model.eval(), _ROWS)
    edges = [_short(s.edge) for s in activation_sites(qmodel)]
    extra = {"first.input", "tanh.input"}
    found = [e for e in edges if e not in extra]
    assert found == [_short(e) for e in wanted]
    with quantization_disabled(qmodel):
        assert torch.equal(qmodel(_ROWS), model(_ROWS))
    imodel = gdnsq_fx.convert(qmodel)
    assert torch.equal(imodel(_ROWS), qmodel(_ROWS))


def test_a_table_of_parameters_is_a_weight() -> None:
    model = _Calls(lambda m, y, x: y + m.table)
    model(_ROWS)
    qmodel = _prepared(model.eval(), _ROWS)
    names = [site.edge for site in weight_sites(qmodel)]
    assert len(names) == 3
    assert any(str(s.node.args[0].target) == "table" for s in weight_sites(qmodel))
    assert torch.equal(gdnsq_fx.convert(qmodel)(_ROWS), qmodel(_ROWS))


def test_every_reader_reads_from_the_grid() -> None:
    """A normalization computes in floating point, on what the others read."""
    model = _Calls(lambda m, y, x: m.norm(y) + y)
    model(_ROWS)
    qmodel = _prepared(model.eval(), _ROWS)
    (norm,) = [n for n in qmodel.graph.nodes if n.target == "norm"]
    assert "quantizers" in str(norm.args[0].target)


def test_an_excluded_sum_keeps_its_inputs() -> None:
    qmodel = _prepared(_Residual().eval(), exclude=("op:add",))
    assert all(len(site.nodes) == 1 for site in activation_sites(qmodel))
    adds = [n for n in qmodel.graph.nodes if facts(n).op and facts(n).op.name == "add"]
    assert len(adds) == 2


def test_an_in_place_write_between_two_readers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.two = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            before = self.two(y)
            y.mul_(2.0)
            return self.two(y + before) + y

    torch.manual_seed(0)
    model = Net().eval()
    x = torch.randn(3, 4)
    qmodel = _prepared(copy.deepcopy(model), x, act_bits=16, weight_bits=16)
    with quantization_disabled(qmodel):
        assert torch.equal(qmodel(x), model(x))
    torch.testing.assert_close(qmodel(x), model(x), rtol=0.0, atol=1e-2)
    assert torch.equal(gdnsq_fx.convert(qmodel)(x), qmodel(x))
