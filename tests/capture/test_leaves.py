"""Which modules stay whole: what reads ``self.training``, and layers of torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, StochasticDepth

from gdnsq_fx.capture.capture import capture
from gdnsq_fx.capture.leaves import is_bare, stays_whole


class _NormRelu(nn.BatchNorm2d):
    """A wrapper that derives from BatchNorm, and has a child."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


class _Noise(nn.Module):
    """Neither children nor parameters; reads ``self.training``."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


@pytest.mark.parametrize(
    ("module", "whole", "bare"),
    [
        (nn.BatchNorm1d(2), True, False),
        (nn.SyncBatchNorm(2), True, False),
        (_NormRelu(2), True, False),
        (nn.Dropout(), True, True),
        (StochasticDepth(0.5, "row"), False, True),
        (_Noise(), False, True),
        (nn.Linear(2, 2), True, False),
        (nn.MultiheadAttention(2, 1), False, False),
        (nn.LSTM(2, 2), False, False),
        (_Scale(), False, False),
        (nn.Sequential(nn.ReLU()), False, False),
        (Conv2dNormActivation(2, 2), False, False),
    ],
)
def test_leaf_rule(module: nn.Module, whole: bool, bare: bool) -> None:
    assert stays_whole(module) is whole
    assert is_bare(module) is bare


def test_leaves_in_a_graph_follow_train_and_eval() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 2, 1), _NormRelu(2), _Noise(), _Scale(), nn.Dropout(), nn.Flatten()
    )
    x = torch.randn(3, 2, 4, 4)
    captured = capture(model, (x,), {})
    calls = [n.target for n in captured.graph.nodes if n.op == "call_module"]
    assert calls == ["0", "1", "2", "4", "5"]
    for training in (True, False, True):
        model.train(training), captured.train(training)
        torch.manual_seed(1)
        wanted = model(x)
        torch.manual_seed(1)
        assert torch.equal(captured(x), wanted)


def test_a_bare_module_may_read_training_in_its_forward() -> None:
    class Functional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, self.training)

    x = torch.randn(4, 4)
    captured = capture(nn.Sequential(Functional(), nn.Linear(4, 4)), (x,), {})
    wanted = captured.eval()(x)
    assert torch.equal(captured(x), wanted)
    assert not torch.equal(captured.train()(x), wanted)
