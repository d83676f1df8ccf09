"""Layers become function calls on explicit weight edges, and compute the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import parametrizations

from gdnsq_fx.annotations import compute_nodes, facts
from gdnsq_fx.capture.capture import capture
from gdnsq_fx.errors import PassError
from gdnsq_fx.passes import (
    AnnotateOperations,
    ExposeWeights,
    InsertQuantizers,
    PropagateShapes,
    run_passes,
)
from gdnsq_fx.sites import weight_sites

_IMAGE = torch.randn(2, 4, 7, 6)
_ROWS = torch.randn(3, 4)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


_BEFORE = """\
%0 = x
%1 = self.conv(%0)
%2 = self.norm(%1)
%3 = .relu(%2)
%4 = .mean(%3, [2, 3])
%5 = self.fc(%4)
return %5"""

_AFTER = """\
%0 = x
%1 = conv.weight
%2 = conv2d(%0, %1, None, stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=1)
%3 = self.norm(%2)
%4 = .relu(%3)
%5 = .mean(%4, [2, 3])
%6 = fc.weight
%7 = fc.bias
%8 = linear(%5, %6, %7)
return %8"""


def _annotated(model: nn.Module, *args: Any) -> GraphModule:
    return run_passes(capture(model, args, {}), (AnnotateOperations(),))


def _targets(module: GraphModule, op: str) -> list[str]:
    return [str(node.target) for node in module.graph.find_nodes(op=op)]


def _check_equal(model: nn.Module, module: GraphModule, *args: Tensor) -> None:
    """Outputs in both modes, buffers afterwards, and gradients."""
    model, module = copy.deepcopy(model), copy.deepcopy(module)
    for training in (False, True):
        model.train(training), module.train(training)
        wanted, got = model(*args), module(*args)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    wanted.square().sum().backward(), got.square().sum().backward()
    state = module.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value)
    gradients = {name: p.grad for name, p in module.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad)


def test_before_and_after(show) -> None:
    module = _annotated(_Net(), _IMAGE)
    assert show(module) == _BEFORE
    assert ExposeWeights()(module).modified is True
    assert show(module) == _AFTER
    assert [facts(n).layer for n in compute_nodes(module)] == ["conv", "fc"]


def test_second_run_changes_nothing(show) -> None:
    module = _annotated(_Net(), _IMAGE)
    ExposeWeights()(module)
    assert ExposeWeights()(module).modified is False
    assert show(module) == _AFTER


def test_alone_in_torchs_manager(alone) -> None:
    model = _Net()
    result = alone(ExposeWeights(), _annotated(model, _IMAGE))
    assert result.modified
    _check_equal(model, result.graph_module, _IMAGE)


def test_state_dict_keeps_its_names_and_order(exposed) -> None:
    model = _Net()
    assert list(exposed(model, _IMAGE).state_dict()) == list(model.state_dict())


def test_refuses_a_graph_without_annotations() -> None:
    with pytest.raises(PassError, match="ExposeWeights needs annotated operations"):
        ExposeWeights()(capture(_Net(), (_IMAGE,), {}))


_CONVOLUTIONS: list[tuple[str, dict[str, Any]]] = [
    ("Conv1d", {}),
    ("Conv2d", {}),
    ("Conv3d", {}),
    ("Conv2d", {"bias": False}),
    ("Conv2d", {"stride": 2, "padding": (2, 1), "dilation": (1, 2), "groups": 2}),
    ("Conv2d", {"padding": "same", "dilation": 2}),
    ("Conv2d", {"padding": "valid"}),
    ("Conv1d", {"padding": 2, "padding_mode": "reflect"}),
    ("Conv2d", {"padding": (1, 2), "padding_mode": "reflect"}),
    ("Conv2d", {"padding": (2, 1), "padding_mode": "circular"}),
    ("Conv2d", {"padding": "same", "padding_mode": "replicate"}),
    ("Conv3d", {"padding": 1, "padding_mode": "circular"}),
    ("ConvTranspose1d", {"stride": 2, "output_padding": 1}),
    ("ConvTranspose2d", {"stride": 2, "padding": 1, "groups": 2}),
    ("ConvTranspose2d", {"dilation": 2, "bias": False}),
    ("ConvTranspose3d", {"stride": 2, "output_padding": 1, "groups": 2}),
]


@pytest.mark.parametrize(("name", "settings"), _CONVOLUTIONS)
def test_every_convolution_is_opened(
    exposed, name: str, settings: dict[str, Any]
) -> None:
    model = nn.Sequential(getattr(nn, name)(4, 6, 3, **settings))
    x = torch.randn(2, 4, *[7, 6, 5][: int(name[-2])])
    module = exposed(model, x)
    assert _targets(module, "call_module") == []
    _check_equal(model, module, x)


class _Functional(nn.Module):
    """Functions on stored weights, in several spellings."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.conv2d(x, self.kernel)
        x = F.conv2d(x, weight=self.kernel, padding=1)
        x = F.conv_transpose2d(input=x, weight=self.kernel)
        return F.linear(x.mean((2, 3)), self.fc.weight)


def test_functional_spellings_are_exposed_already(exposed, show) -> None:
    model = _Functional()
    module = _annotated(model, _IMAGE)
    before = show(module)
    assert ExposeWeights()(module).modified is False
    assert show(module) == before
    assert [facts(n).layer for n in compute_nodes(module)] == [
        "conv2d",
        "conv2d_1",
        "conv_transpose2d",
        "fc",
    ]
    _check_equal(model, module, _IMAGE)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.b.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.b(self.a(x).relu()), self.b.weight)


def test_tied_parameters_are_one_node_each_and_stay_tied(exposed) -> None:
    model = _Tied()
    module = exposed(model, _ROWS)
    assert _targets(module, "get_attr") == ["a.weight", "a.bias"]
    assert module.b.weight is module.a.weight
    _check_equal(model, module, _ROWS)
    run_passes(module, (PropagateShapes((_ROWS,)), InsertQuantizers()))
    assert [site.edge for site in weight_sites(module)] == ["a.weight"]


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.fc(x))


def test_a_module_called_twice_has_one_weight_node(exposed) -> None:
    model = _Twice()
    module = exposed(model, _ROWS)
    assert _targets(module, "get_attr") == ["fc.weight", "fc.bias"]
    assert [facts(n).layer for n in compute_nodes(module)] == ["fc", "fc#2"]
    _check_equal(model, module, _ROWS)


class _LateUse(nn.Module):
    """The function reads the weight first, the module later; and the other way."""

    def __init__(self, *, module_first: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.module_first = module_first

    def forward(self, x: Tensor) -> Tensor:
        if self.module_first:
            return F.linear(self.fc(x), self.fc.weight)
        return self.fc(F.linear(x, self.fc.weight))


@pytest.mark.parametrize("module_first", [False, True])
def test_a_weight_read_by_module_and_function(exposed, module_first: bool) -> None:
    model = _LateUse(module_first=module_first)
    module = exposed(model, _ROWS)
    assert sorted(_targets(module, "get_attr")) == ["fc.bias", "fc.weight"]
    _check_equal(model, module, _ROWS)


def test_a_parametrized_weight_is_the_call_of_its_parametrization(
    exposed, show
) -> None:
    model = nn.Sequential(nn.Conv2d(4, 3, 1))
    parametrizations.weight_norm(model[0])
    module = exposed(model, _IMAGE)
    assert "%1 = self.0.parametrizations.weight()" in show(module)
    assert list(module.state_dict()) == list(model.state_dict())
    _check_equal(model, module, _IMAGE)


@pytest.mark.parametrize("module_first", [False, True])
def test_a_parametrized_weight_read_by_module_and_function(
    exposed, module_first: bool
) -> None:
    model = _LateUse(module_first=module_first)
    parametrizations.weight_norm(model.fc)
    module = exposed(model, _ROWS)
    assert _targets(module, "call_module") == ["fc.parametrizations.weight"]
    _check_equal(model, module, _ROWS)


def test_a_parametrized_layer_called_twice_computes_its_weight_once(exposed) -> None:
    model = _Twice()
    parametrizations.weight_norm(model.fc)
    module = exposed(model, _ROWS)
    assert _targets(module, "call_module") == ["fc.parametrizations.weight"]
    _check_equal(model, module, _ROWS)


def _hook(*_: Any) -> None:
    return None


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_refuses_a_layer_with_hooks(exposed, register: str) -> None:
    model = _Twice()
    getattr(model.fc, register)(_hook)
    module = exposed(model, _ROWS.clone())
    assert _targets(module, "call_module") == ["fc", "fc"]
    reasons = {facts(n).skip for n in compute_nodes(module)}
    assert reasons == {
        "has hooks, which a function call would drop; remove them before prepare"
    }


class _OutputSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 4, 3, stride=2)
        self.fc = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.up(x, output_size=(16, 14)) + self.up(x, [16, 14]))


def test_output_size_becomes_output_padding(exposed) -> None:
    model = _OutputSize()
    module = exposed(model, _IMAGE)
    assert _targets(module, "call_module") == []
    assert "output_padding" in module.code
    _check_equal(model, module, _IMAGE)
    _check_equal(model, module, torch.cat([_IMAGE, _IMAGE]))


def test_keyword_input_is_opened(exposed) -> None:
    class Keyword(_Twice):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=x)

    model = Keyword()
    module = exposed(model, _ROWS)
    assert _targets(module, "call_module") == []
    _check_equal(model, module, _ROWS)


def test_a_layer_with_a_forward_of_its_own_stays_what_it_is(exposed) -> None:
    """Such a layer may compute anything: here its weight is standardized first."""

    class Standardized(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Any, bias: Any) -> Tensor:
            weight = weight - weight.mean((1, 2, 3), keepdim=True)
            return super()._conv_forward(input, weight, bias)

    model = nn.Sequential(Standardized(4, 3, 3), nn.Conv2d(3, 2, 1))
    _check_equal(model, exposed(model, _IMAGE), _IMAGE)


def test_a_layer_that_is_the_whole_model(exposed) -> None:
    model = nn.Linear(4, 3)
    module = exposed(model, _ROWS)
    assert _targets(module, "get_attr") == ["weight", "bias"]
    _check_equal(model, module, _ROWS)
