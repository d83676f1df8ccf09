"""All passes in a row: in our runner, and in torch's manager among other passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_manager import (
    PassManager,
    this_before_that_pass_constraint,
)

from gdnsq_fx.annotations import facts
from gdnsq_fx.capture.capture import capture
from gdnsq_fx.deploy.integer import quantize
from gdnsq_fx.errors import CalibrationError, PassError
from gdnsq_fx.inputs import InputStructure
from gdnsq_fx.passes import (
    AnalyzeCapacity,
    AnnotateOperations,
    Calibrate,
    ExposeWeights,
    FoldBatchNorm,
    FreezeQuantizers,
    InsertQuantizers,
    LowerToInteger,
    Pass,
    PropagateShapes,
    run_passes,
)
from gdnsq_fx.spec import QuantConfig

_X = torch.randn(4, 3, 6, 6)
_INPUTS = InputStructure.of(_X)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def _all_passes(batches: Iterable[Any]) -> tuple[Pass, ...]:
    config = QuantConfig(weight_bits=8, act_bits=8)
    return (
        AnnotateOperations(),
        ExposeWeights(),
        FoldBatchNorm(),
        PropagateShapes((_X,)),
        InsertQuantizers(config),
        Calibrate(batches, _INPUTS),
        AnalyzeCapacity(batches, _INPUTS),
        FreezeQuantizers(),
        LowerToInteger(),
    )


def _captured() -> tuple[nn.Module, GraphModule]:
    model = _Net().eval()
    return model, capture(model, (_X,), {})


def _close_to(model: nn.Module, module: GraphModule) -> bool:
    wanted, got = model(_X), module(_X)
    return float((got - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


def test_the_whole_way_in_our_runner() -> None:
    model, module = _captured()
    integer = run_passes(module, _all_passes([_X]))
    assert len(list(integer.graph.find_nodes(op="call_function", target=quantize))) == 2
    assert _close_to(model, integer)


def test_the_whole_way_in_torchs_manager_between_two_shape_props(
    shape_prop: Callable[..., Any],
) -> None:
    model, module = _captured()
    ours = _all_passes([_X])
    manager = PassManager(
        passes=[shape_prop(_X), *ours, shape_prop(_X)], run_checks_after_each_pass=True
    )
    result = manager(module)
    assert result.modified and _close_to(model, result.graph_module)
    shapes = [n.meta.get("tensor_meta") for n in result.graph_module.graph.nodes]
    assert all(meta is not None for meta in shapes)
    expected = run_passes(_captured_like(model), _all_passes([_X]))
    assert torch.equal(result.graph_module(_X), expected(_X))


def _captured_like(model: nn.Module) -> GraphModule:
    return capture(model, (_X,), {})


def test_torchs_shape_prop_between_any_two_of_ours(shape_prop: Any) -> None:
    model, module = _captured()
    mixed = [p for one in _all_passes([_X]) for p in (one, shape_prop(_X))]
    # Before calibration the quantizers know no level, and all they give is NaN.
    assert _close_to(model, PassManager(passes=mixed)(module).graph_module)


def test_a_second_round_of_the_facts_changes_nothing() -> None:
    _, module = _captured()
    passes = _all_passes([_X])[:-2]
    run_passes(module, passes)
    names = [(n.op, str(n.target), facts(n)) for n in module.graph.nodes]
    again = PassManager(passes=list(passes))(module)
    assert again.modified is False
    assert [(n.op, str(n.target), facts(n)) for n in module.graph.nodes] == names


def test_torchs_manager_can_order_ours() -> None:
    """Its sorting keys a dictionary by passes: every one must have a hash."""
    model, module = _captured()
    passes = _all_passes([_X])
    constraints = [
        this_before_that_pass_constraint(one, two) for one, two in pairwise(passes)
    ]
    manager = PassManager(passes=list(reversed(passes)), constraints=constraints)
    assert _close_to(model, manager(module).graph_module)


def test_typed_errors_pass_through_and_others_are_named() -> None:
    class Fails(Pass):
        def rewrite(self, graph_module: GraphModule) -> bool:
            raise ZeroDivisionError("by zero")

    _, module = _captured()
    with pytest.raises(PassError, match="Fails failed: by zero") as caught:
        run_passes(module, (AnnotateOperations(), Fails()))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(CalibrationError, match="no batch"):
        run_passes(module, _all_passes([]))


def test_no_pass_is_no_change() -> None:
    _, module = _captured()
    assert run_passes(module, ()) is module


def test_passes_in_the_wrong_order_say_which_one_is_missing() -> None:
    for late in (ExposeWeights(), InsertQuantizers(), FoldBatchNorm()):
        with pytest.raises(PassError, match="run AnnotateOperations first"):
            run_passes(_captured()[1], (late,))
    for late in (Calibrate([_X], _INPUTS), AnalyzeCapacity([_X], _INPUTS)):
        with pytest.raises(PassError, match=f"{late.name} needs a model with quant"):
            run_passes(_captured()[1], (AnnotateOperations(), late))


def test_inserting_before_the_weights_are_exposed_says_so() -> None:
    with pytest.raises(PassError, match="ExposeWeights"):
        run_passes(_captured()[1], (AnnotateOperations(), InsertQuantizers()))
