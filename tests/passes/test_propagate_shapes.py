"""Shapes and MACs of every value, from one run on the example."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

from gdnsq_fx.annotations import compute_nodes, facts
from gdnsq_fx.capture.capture import capture
from gdnsq_fx.errors import PassError
from gdnsq_fx.passes import AnnotateOperations, PropagateShapes, run_passes

_X = torch.randn(2, 3, 6, 6)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def _rows(module: GraphModule) -> str:
    found = [(n.name, facts(n)) for n in module.graph.nodes]
    return "\n".join(f"{n} {f.shape} {f.elements} {f.macs}" for n, f in found)


def test_shapes_elements_and_macs_and_the_graph_stays(exposed, show) -> None:
    module = exposed(_Net(), _X)
    before = show(module)
    assert PropagateShapes((_X,))(module).modified is False
    assert show(module) == before
    found = {facts(n).layer or n.name: facts(n) for n in module.graph.nodes}
    assert {k: (f.shape, f.elements, f.macs) for k, f in found.items()} == {
        "x": ((2, 3, 6, 6), 108, 0),
        "conv_weight": ((4, 3, 3, 3), 54, 0),
        "fc_weight": ((5, 4), 10, 0),
        "fc_bias": ((5,), 2, 0),
        "conv": ((2, 4, 4, 4), 64, 16 * 4 * 27),
        "norm": ((2, 4, 4, 4), 64, 0),
        "relu": ((2, 4, 4, 4), 64, 0),
        "mean": ((2, 4), 4, 0),
        "fc": ((2, 5), 5, 20),
        "output": ((2, 5), 5, 0),
    }
    assert {f.batch for f in found.values()} == {2}


def test_second_run_changes_nothing(exposed) -> None:
    module = exposed(_Net(), _X)
    PropagateShapes((_X,))(module)
    first = _rows(module)
    assert PropagateShapes((_X,))(module).modified is False
    assert _rows(module) == first


def test_alone_in_torchs_manager_and_numbers_stay_eager(exposed, alone) -> None:
    model = _Net().eval()
    module = exposed(model, _X)
    result = alone(PropagateShapes((_X,)), module)
    assert torch.equal(result.graph_module(_X), model(_X))
    assert facts(compute_nodes(module)[0]).macs == 1728


def test_without_annotations_there_are_shapes_and_no_macs() -> None:
    module = capture(_Net(), (_X,), {})
    PropagateShapes((_X,))(module)
    assert all(facts(n).shape and not facts(n).macs for n in module.graph.nodes)


def test_macs_of_layers_that_are_still_modules() -> None:
    """A layer with hooks is never opened, and its MACs count in the coverage."""
    module = capture(_Net(), (_X,), {})
    run_passes(module, (AnnotateOperations(), PropagateShapes((_X,))))
    assert [facts(n).macs for n in compute_nodes(module)] == [1728, 20]


def test_macs_do_not_depend_on_the_batch(exposed) -> None:
    totals = set()
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 6, 6)
        module = exposed(_Net(), x)
        PropagateShapes((x,))(module)
        totals.add(sum(facts(n).macs for n in module.graph.nodes))
    assert totals == {1748}


@pytest.mark.parametrize(
    "settings", [{}, {"stride": 2}, {"dilation": 2}, {"groups": 2}]
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_macs_against_torchs_flop_counter(
    exposed, dims: int, transposed: bool, settings: dict[str, Any]
) -> None:
    name = f"Conv{'Transpose' * transposed}{dims}d"
    layer: nn.Module = getattr(nn, name)(4, 6, 3, padding=1, **settings).eval()
    x = torch.randn(3, 4, *[7, 6, 5][:dims])
    assert _macs(exposed(layer, x), x) == _counted(layer, x)


@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4), (3, 2, 5, 4)])
def test_macs_of_linear_against_torchs_flop_counter(exposed, shape: Any) -> None:
    layer, x = nn.Linear(4, 6), torch.randn(*shape)
    assert _macs(exposed(layer, x), x) == _counted(layer, x)


class _Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


@pytest.mark.parametrize(
    ("left", "right"),
    [((2, 3, 4), (2, 4, 5)), ((2, 6, 3, 4), (2, 6, 4, 5)), ((2, 3, 4), (4, 5))],
)
def test_macs_of_matrix_products(exposed, left: Any, right: Any) -> None:
    model, a, b = _Product(), torch.randn(*left), torch.randn(*right)
    module = exposed(model, a, b)
    PropagateShapes((a, b))(module)
    macs = sum(facts(n).macs for n in module.graph.nodes) * 2
    with FlopCounterMode(display=False) as counter:
        model(a, b)
    assert 2 * macs == counter.get_total_flops()


def _macs(module: GraphModule, x: Tensor) -> int:
    PropagateShapes((x,))(module)
    return sum(facts(n).macs for n in module.graph.nodes) * len(x)


def _counted(layer: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    return counter.get_total_flops() // 2


def test_buffers_mode_and_random_state_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Dropout()).train()
    module = capture(model, (_X,), {})
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state = torch.get_rng_state()
    PropagateShapes((_X,))(module)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in module.modules())


def test_an_in_place_operation_does_not_reach_the_example() -> None:
    x = _X.clone()
    module = capture(nn.Sequential(nn.ReLU(inplace=True)), (x.clone(),), {})
    PropagateShapes((x,))(module)
    assert torch.equal(x, _X)


class _Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.fc(a + b)


def test_keyword_example() -> None:
    a, b = torch.randn(2, 4), torch.randn(2, 4)
    module = capture(_Optional(), (), {"b": b, "a": a})
    PropagateShapes(kwargs={"b": b, "a": a})(module)
    assert all(facts(n).batch == 2 and facts(n).shape for n in module.graph.nodes)


def test_refuses_an_example_that_leaves_an_input_out() -> None:
    a = torch.randn(2, 4)
    module = capture(_Optional(), (a, a), {})
    with pytest.raises(PassError, match="no value for the input 'b'"):
        PropagateShapes((a,))(module)
