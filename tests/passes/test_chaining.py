"""Other people's FX passes before and after ours: each computes the same as without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, replace_pattern, symbolic_trace
from torch.fx.experimental.optimization import fuse
from torch.fx.passes.dialect.common.cse_pass import CSEPass
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager
from torch.fx.passes.shape_prop import ShapeProp
from torch.fx.passes.split_module import split_module

import gdnsq_fx
from gdnsq_fx.annotations import KEY, facts
from gdnsq_fx.capture.capture import capture
from gdnsq_fx.inputs import InputStructure
from gdnsq_fx.passes import (
    AnnotateOperations,
    Calibrate,
    ExposeWeights,
    FoldBatchNorm,
    InsertQuantizers,
    PropagateShapes,
    run_passes,
)
from gdnsq_fx.quantize.quantizer import Quantizer

_X, _LARGE = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 8, 8)
_CONFIG = gdnsq_fx.QuantConfig(weight_bits=4, act_bits=4)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)))


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(_Block(), _Block())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        x = F.adaptive_avg_pool2d(x, 1).reshape(x.shape[0], -1)
        return self.head(F.dropout(x, 0.2, self.training))


@pytest.fixture
def model() -> nn.Module:
    """A network whose statistics are not the initial ones, in evaluation."""
    net = _Net()
    net(torch.randn(8, 3, 8, 8) * 2.0 + 1.0)
    return net.eval()


def _captured(model: nn.Module) -> GraphModule:
    return capture(model, (_X,), {})


def _prepared(model: nn.Module) -> GraphModule:
    return gdnsq_fx.prepare(model, _X, _CONFIG, calibration=[_X])


_KINDS = pytest.mark.parametrize("make", [_captured, _prepared])


def _equal(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    with torch.no_grad():
        return all(torch.equal(one(x), other(x)) for x in (_X, _LARGE))


def _quantizers(module: nn.Module) -> int:
    return sum(isinstance(one, Quantizer) for one in module.modules())


# --- fusion -----------------------------------------------------------------------


def test_a_fused_model_is_prepared(model: nn.Module) -> None:
    fused = fuse(model)
    qmodel = _prepared(fused)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert _quantizers(qmodel) == _quantizers(_prepared(model))
    with gdnsq_fx.quantization_disabled(qmodel):
        assert _equal(qmodel, fused)


def test_a_captured_model_is_fused(model: nn.Module) -> None:
    fused = fuse(_captured(model))
    assert not fused.graph.find_nodes(op="call_module", target="norm")
    for x in (_X, _LARGE):
        torch.testing.assert_close(fused(x), model(x))


# --- splitting, replacing, propagating --------------------------------------------


@_KINDS
@pytest.mark.parametrize("parts", [2, 3])
def test_a_model_is_split(
    parts: int, make: Callable[..., GraphModule], model: nn.Module
) -> None:
    made = make(model)
    order = {node: i for i, node in enumerate(made.graph.nodes)}
    split = split_module(made, made, lambda node: order[node] * parts // len(order))
    assert len([m for m in split.children() if isinstance(m, GraphModule)]) == parts
    assert _equal(split, made)


def _relu(x: Tensor) -> Tensor:
    return F.relu(x)


def _clamp(x: Tensor) -> Tensor:
    return torch.clamp(x, min=0.0)


def test_a_pattern_is_replaced_in_a_captured_model(model: nn.Module) -> None:
    captured = _captured(model)
    wanted = copy.deepcopy(captured)
    assert len(replace_pattern(captured, _relu, _clamp)) == 3
    assert _equal(captured, wanted)
    replace_pattern(captured, _clamp, lambda x: torch.tanh(x))
    assert not _equal(captured, wanted)


def test_a_pattern_is_replaced_before_and_after(model: nn.Module) -> None:
    """Identity in two steps: what is replaced first can be quantized."""
    captured = _captured(model)
    replace_pattern(captured, _relu, _clamp)
    qmodel = _prepared(captured)
    wanted = copy.deepcopy(qmodel)
    assert _quantizers(qmodel) == _quantizers(_prepared(model))
    assert len(replace_pattern(qmodel, _clamp, _relu)) == 3
    assert _equal(qmodel, wanted)


@_KINDS
def test_shapes_are_propagated(
    make: Callable[..., GraphModule], model: nn.Module
) -> None:
    made = make(model)
    wanted = copy.deepcopy(made)
    assert torch.equal(ShapeProp(made).propagate(_X), wanted(_X))
    (output,) = made.graph.find_nodes(op="output")
    assert output.meta["tensor_meta"].shape == (2, 3)
    assert _equal(made, wanted)


@_KINDS
def test_shapes_are_propagated_with_fake_tensors(
    make: Callable[..., GraphModule], model: nn.Module
) -> None:
    made = make(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    assert FakeTensorProp(made, mode).propagate(_X).shape == (2, 3)


def test_shapes_propagated_before_preparing_change_nothing(model: nn.Module) -> None:
    captured = _captured(model)
    ShapeProp(captured).propagate(_X)
    assert _equal(_prepared(captured), _prepared(model))


# --- compiling --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "backend"), [(_captured, "eager"), (_prepared, "aot_eager")]
)
def test_a_model_is_compiled_whole(
    backend: str, make: Callable[..., GraphModule], model: nn.Module
) -> None:
    made = make(model)
    torch.compiler.reset()
    compiled = torch.compile(made, backend=backend, fullgraph=True)
    wanted = made(_X)
    torch.testing.assert_close(compiled(_X), wanted)
    weight = made.get_parameter("stem.weight")
    one, other = (
        torch.autograd.grad(y.square().sum(), weight)[0]
        for y in (compiled(_X), made(_X))
    )
    torch.testing.assert_close(one, other)


# --- managers ---------------------------------------------------------------------


def _without_dead_code(module: GraphModule) -> PassResult:
    modified = module.graph.eliminate_dead_code()
    module.recompile()
    return PassResult(module, modified)


def _retraced(module: GraphModule) -> PassResult:
    """As passes do that transform: another GraphModule, with the facts gone."""
    twin = torch.fx.Transformer(module).transform()
    return PassResult(twin, True)


def test_ours_stand_among_others_in_a_manager(
    model: nn.Module, shape_prop: Callable[..., Any]
) -> None:
    inputs = InputStructure.of(_X)
    ours = (
        AnnotateOperations(),
        ExposeWeights(),
        PropagateShapes((_X,)),
        FoldBatchNorm(),
        InsertQuantizers(_CONFIG),
        Calibrate([_X], inputs),
    )
    others = (_without_dead_code, CSEPass(), shape_prop(_X))
    mixed = [one for our in ours for one in (our, *others)]
    manager = PassManager(passes=mixed, run_checks_after_each_pass=True)
    found = manager(_captured(model)).graph_module
    assert _quantizers(found) == 8
    assert _equal(found, run_passes(_captured(model), ours))


def test_a_symbolic_trace_goes_through_our_passes(model: nn.Module) -> None:
    """Graphs that others traced need no capture of ours."""
    passes = (
        AnnotateOperations(),
        ExposeWeights(),
        PropagateShapes((_X,)),
        InsertQuantizers(_CONFIG),
        Calibrate([_X], InputStructure.of(_X)),
    )
    assert _equal(run_passes(symbolic_trace(model), passes), _prepared(model))


def test_a_transformed_model_computes_the_same(model: nn.Module) -> None:
    qmodel = _prepared(model)
    assert _equal(_retraced(qmodel).graph_module, qmodel)
    assert _equal(_retraced(_captured(model)).graph_module, model)


def test_facts_survive_where_nodes_do(model: nn.Module) -> None:
    """A manager that rewrites around our nodes leaves what we know of them."""
    qmodel = _prepared(model)
    before = {n.name: facts(n) for n in qmodel.graph.nodes if KEY in n.meta}
    manager = PassManager(passes=[_without_dead_code, CSEPass()])
    found = manager(qmodel).graph_module
    after = {n.name: facts(n) for n in found.graph.nodes}
    kept = set(before) & set(after)
    assert len(kept) > 20 and all(after[name] == before[name] for name in kept)
    assert str(gdnsq_fx.analyze(qmodel, [_X], draws=1))
