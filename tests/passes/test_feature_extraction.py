"""torchvision's feature extraction, and other tracing, before and after ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from torch.fx.experimental.optimization import fuse
from torchvision.models.feature_extraction import (
    create_feature_extractor,
    get_graph_node_names,
)

import gdnsq_fx
from gdnsq_fx.capture.capture import capture

_X = torch.randn(2, 3, 8, 8)
_CONFIG = gdnsq_fx.QuantConfig(weight_bits=4, act_bits=4)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(F.dropout(x.mean((2, 3)), 0.2, self.training))


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


@_KINDS
def test_features_are_extracted(
    make: Callable[..., GraphModule], model: nn.Module
) -> None:
    made = make(model)
    _, names = get_graph_node_names(made)
    inner = next(name for name in names if name.endswith("relu"))
    last = names[-1]
    extractor = create_feature_extractor(made, {inner: "inner", last: "out"})
    for training in (False, True):
        made.train(training), extractor.train(training)
        torch.manual_seed(0)
        wanted = made(_X)
        torch.manual_seed(0)
        found = extractor(_X)
        assert torch.equal(found["out"], wanted)
        assert found["inner"].shape == (2, 4, 6, 6)


def test_an_extractor_is_prepared(model: nn.Module) -> None:
    extractor = create_feature_extractor(model, {"blocks.0": "features"})
    qmodel = gdnsq_fx.prepare(extractor, _X, _CONFIG, calibration=[_X])
    assert len(list(qmodel.quantizers.children())) == 4
    assert not qmodel.training
    with gdnsq_fx.quantization_disabled(qmodel):
        torch.testing.assert_close(qmodel(_X), extractor(_X))


def test_an_extractor_with_a_graph_for_each_mode_is_captured() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.aux = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(self.conv(x), 0.5, self.training)
            return self.aux(x) if self.training else x

    extractor = create_feature_extractor(
        Drops(), train_return_nodes={"aux": "out"}, eval_return_nodes={"dropout": "out"}
    )
    captured = _captured(extractor)
    for training in (False, True, False):
        found = []
        for one in (extractor, captured):
            one.train(training)
            torch.manual_seed(0)
            found.append(one(_X)["out"])
        assert torch.equal(*found)


class _Auxiliary(_Net):
    """A second head in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.norm(self.stem(x)))
        found = self.head(x.mean((2, 3)))
        return (found, self.aux(x.amax((2, 3)))) if self.training else found


def _features(module: GraphModule) -> nn.Module:
    train, evaluation = get_graph_node_names(module)
    out = {"train_return_nodes": train[-1:], "eval_return_nodes": evaluation[-1:]}
    extractor = create_feature_extractor(module, **out).eval()
    return _First(extractor)


class _First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return next(iter(self.inner(x).values()))


@_KINDS
@pytest.mark.parametrize("trace", [symbolic_trace, fuse, _features])
def test_a_model_with_a_head_in_training_only_is_traced_again(
    trace: Callable[..., nn.Module], make: Callable[..., GraphModule]
) -> None:
    made = make(_Auxiliary()).eval()
    again = trace(copy.deepcopy(made)).eval()
    torch.testing.assert_close(again(_X), made(_X))
