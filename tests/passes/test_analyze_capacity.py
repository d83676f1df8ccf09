"""Every quantized edge is measured, and the model is left as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from gdnsq_fx.annotations import EdgeFacts, compute_nodes, facts
from gdnsq_fx.errors import BatchStructureError, CalibrationError, PassError
from gdnsq_fx.inputs import InputStructure
from gdnsq_fx.passes import (
    AnalyzeCapacity,
    InsertQuantizers,
    PropagateShapes,
    run_passes,
)
from gdnsq_fx.quantize.quantizer import quantization_disabled
from gdnsq_fx.sites import sites

_X = torch.randn(32, 3, 5, 5)
_INPUTS = InputStructure.of(_X)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.norm(self.conv(x)).relu_()).mean((2, 3)))


@pytest.fixture
def prepared(calibrated) -> Any:
    def make(model: nn.Module, x: Tensor = _X, **settings: Any) -> GraphModule:
        return calibrated(model, x, **settings)

    return make


def _edges(module: GraphModule) -> dict[str, EdgeFacts]:
    found = {site.edge: facts(site.node).edge for site in sites(module)}
    return {name: edge for name, edge in found.items() if edge is not None}


def test_facts_on_every_quantizer_and_the_graph_stays(prepared, show) -> None:
    module = prepared(_Net(), weight_bits=3, act_bits=2)
    before = show(module)
    assert AnalyzeCapacity([_X], _INPUTS)(module).modified is False
    assert show(module) == before
    edges = _edges(module)
    assert set(edges) == {"conv.input", "conv.weight", "fc.input", "fc.weight"}
    assert {k: (e.elements, e.bits, e.capacity) for k, e in edges.items()} == {
        "conv.input": (75, 2, 150.0),
        "conv.weight": (108, 3, 324.0),
        "fc.input": (4, 2, 8.0),
        "fc.weight": (12, 3, 36.0),
    }
    for edge in edges.values():
        assert 0.0 < edge.entropy <= edge.capacity + 1e-9
        assert 0.0 < edge.sqnr_db < 40.0 and 0.0 <= edge.clipped < 1.0
        assert edge.predicted_divergence > 0.0 and edge.measured_divergence is None


def test_second_run_finds_the_same(prepared) -> None:
    module = prepared(_Net())
    AnalyzeCapacity([_X], _INPUTS)(module)
    first = _edges(module)
    assert AnalyzeCapacity([_X], _INPUTS)(module).modified is False
    assert _edges(module) == first


def test_alone_in_torchs_manager_and_the_model_computes_what_it_did(
    prepared, alone
) -> None:
    module = prepared(_Net()).eval()
    wanted = module(_X)
    alone(AnalyzeCapacity([_X], _INPUTS, confirm=2), module)
    assert torch.equal(module(_X), wanted)


def test_state_mode_gradients_switches_and_random_state_stay(prepared) -> None:
    module = prepared(_Net().train())
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state, x = torch.get_rng_state(), _X.clone()
    with quantization_disabled(module):
        AnalyzeCapacity([x], _INPUTS, confirm=1)(module)
        assert not any(site.quantizer.enabled for site in sites(module))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(x, _X)
    assert all(m.training for m in module.modules())
    assert all(p.grad is None for p in module.parameters())
    assert all(site.quantizer.enabled for site in sites(module))


def test_works_without_gradients_and_on_frozen_parameters(prepared) -> None:
    module = prepared(_Net())
    AnalyzeCapacity([_X], _INPUTS)(module)
    wanted = _edges(module)
    module.requires_grad_(False)
    with torch.no_grad():
        AnalyzeCapacity([_X], _INPUTS)(module)
    assert _edges(module) == wanted


def test_prediction_is_close_to_the_measurement_at_8_bits(prepared) -> None:
    module = prepared(_Net().eval(), weight_bits=8, act_bits=8)
    AnalyzeCapacity([_X], _INPUTS, draws=64, confirm=4)(module)
    for edge in _edges(module).values():
        assert edge.measured_divergence is not None
        assert 0.7 < edge.predicted_divergence / edge.measured_divergence < 1.4


def test_several_batches_are_one_large_batch(prepared) -> None:
    module = prepared(_Net().eval())
    AnalyzeCapacity([_X], _INPUTS)(module)
    whole = _edges(module)
    AnalyzeCapacity([(_X[:20], 0), _X[20:]], _INPUTS)(module)
    for name, edge in _edges(module).items():
        one = whole[name]
        assert (edge.elements, edge.bits) == (one.elements, one.bits)
        for field in ("capacity", "entropy", "sqnr_db"):
            wanted = getattr(one, field)
            assert math.isclose(getattr(edge, field), wanted, rel_tol=0.1), (
                name,
                field,
            )


def test_curvature_of_regression(prepared) -> None:
    module = prepared(_Net().eval(), weight_bits=8, act_bits=8)
    run = AnalyzeCapacity([_X], _INPUTS, draws=64, confirm=4, curvature="identity")
    run(module)
    for edge in _edges(module).values():
        assert edge.measured_divergence is not None
        assert 0.7 < edge.predicted_divergence / edge.measured_divergence < 1.4


class _Functional(nn.Module):
    """Functions whose optional arguments are left out, or given by name."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.grouped = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.up = nn.Parameter(torch.randn(6, 4, 2, 2))
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, padding=1)
        x = F.conv2d(x, self.grouped, None, groups=2, stride=1)
        x = F.conv_transpose2d(input=x, weight=self.up, dilation=1, stride=2)
        return F.linear(weight=self.weight, input=x.mean((2, 3)))


def test_functional_spellings_are_measured_like_modules(prepared) -> None:
    functional = _Functional()
    modules = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.Conv2d(6, 6, 3, groups=2, bias=False),
        nn.ConvTranspose2d(6, 4, 2, stride=2, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3, bias=False),
    )
    names = ("kernel", "grouped", "up", "weight")
    layers = (layer for layer in modules if hasattr(layer, "weight"))
    for name, layer in zip(names, layers, strict=True):
        layer.weight.data = getattr(functional, name).data
    found = []
    for model in (functional, modules):
        module = prepared(model)
        AnalyzeCapacity([_X], _INPUTS)(module)
        bound = [facts(n).op.bind(n) for n in compute_nodes(module)]
        names = ("input", "weight")
        found.append([facts(b[name]).edge for b in bound for name in names])
    assert len(found[0]) == 8
    for one, other in zip(*found, strict=True):
        assert math.isclose(one.sqnr_db, other.sqnr_db, rel_tol=1e-3)
        ratio = one.predicted_divergence / other.predicted_divergence
        assert math.isclose(ratio, 1.0, rel_tol=1e-2)


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.fc(x))


def test_effects_of_a_shared_weight_add_up_before_squaring(prepared) -> None:
    x = torch.randn(256, 4)
    module = prepared(_Twice(), x, weight_bits=6, act_bits=16)
    inputs = InputStructure.of(x)
    AnalyzeCapacity([x], inputs, draws=64, confirm=1)(module)
    edge = _edges(module)["fc.weight"]
    assert edge.measured_divergence is not None
    assert 0.7 < edge.predicted_divergence / edge.measured_divergence < 1.4


class _NormalizesInPlace(_Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.sub_(1.0).mul_(2.0))


def test_batches_are_not_changed_by_a_model_that_writes_into_its_input(
    prepared,
) -> None:
    x = torch.randn(16, 4)
    module = prepared(_NormalizesInPlace(), x.clone())
    mine = x.clone()
    AnalyzeCapacity([mine], InputStructure.of(x), confirm=2)(module)
    assert torch.equal(mine, x)


def test_a_dictionary_of_outputs(prepared) -> None:
    class Named(_Twice):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"aux": x.argmax(1), "logits": self.fc(x)}

    x = torch.randn(16, 4)
    module = prepared(Named(), x)
    AnalyzeCapacity([x], InputStructure.of(x), confirm=2)(module)
    assert all(e.predicted_divergence > 0.0 for e in _edges(module).values())


def test_refuses_a_model_without_quantizers(exposed) -> None:
    with pytest.raises(PassError, match="AnalyzeCapacity needs a model with quant"):
        AnalyzeCapacity([_X], _INPUTS)(exposed(_Net(), _X))


def test_refuses_a_model_that_is_not_calibrated(exposed) -> None:
    steps = (PropagateShapes((_X,)), InsertQuantizers())
    module = run_passes(exposed(_Net(), _X), steps)
    with pytest.raises(CalibrationError, match="never calibrated; run the Calibrate"):
        AnalyzeCapacity([_X], _INPUTS)(module)


@pytest.mark.parametrize("confirm", [0, 2])
def test_refuses_when_there_is_no_batch(prepared, confirm: int) -> None:
    used_up = iter([_X])
    list(used_up)
    module = prepared(_Net())
    for empty in ([], used_up):
        with pytest.raises(CalibrationError, match="no batch; pass a non-empty"):
            AnalyzeCapacity(empty, _INPUTS, confirm=confirm)(module)


def test_refuses_another_structure(prepared) -> None:
    with pytest.raises(BatchStructureError, match=r"expected Tensor\[\*, 3, 5, 5\]"):
        AnalyzeCapacity([_X[0]], _INPUTS)(prepared(_Net()))
