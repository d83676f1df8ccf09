"""One captured model for training and evaluation: heads, noise, statistics, leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth, stochastic_depth

from gdnsq_fx.capture.capture import capture

_X, _LARGE = torch.randn(3, 4), torch.randn(5, 4)


class _Outputs(NamedTuple):
    logits: Tensor
    aux: Tensor | None


class _Auxiliary(nn.Module):
    """A second head in training only, as GoogLeNet and Inception have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)
        self.aux: nn.Module | None = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        aux = self.aux(x) if self.training and self.aux is not None else None
        logits = self.head(x)
        return _Outputs(logits, aux) if self.training else logits


@pytest.mark.parametrize("training", [False, True])
def test_a_head_in_training_only(training: bool, same: Any) -> None:
    captured = same(
        _Auxiliary().train(training), _X, modes=(True, False, True), others=((_LARGE,),)
    )
    assert isinstance(captured.train()(_X), _Outputs)
    assert captured.eval()(_X).shape == (3, 2)


def test_a_captured_model_starts_in_the_models_mode() -> None:
    assert isinstance(capture(_Auxiliary().train(), (_X,), {})(_X), _Outputs)
    assert isinstance(capture(_Auxiliary().eval(), (_X,), {})(_X), Tensor)


def test_a_head_within_a_sub_module(same: Any) -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = _Auxiliary()

        def forward(self, x: Tensor) -> Tensor:
            found = self.inner(x)
            return found if isinstance(found, Tensor) else found.logits + found.aux

    same(Sums(), _X, others=((_LARGE,),))


class _Trained(nn.Module):
    """Applies a function that reads ``self.training``."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.fc(x))


_READS_TRAINING: dict[str, Callable[..., Tensor]] = {
    "dropout": lambda m, x: F.dropout(x, 0.5, m.training),
    "dropout by name": lambda m, x: F.dropout(x, p=0.5, training=m.training),
    "dropout in place": lambda m, x: F.dropout(x, 0.5, m.training, True) * 1.0,
    "probability": lambda m, x: F.dropout(x, 0.5 if m.training else 0.0),
    "alpha dropout": lambda m, x: F.alpha_dropout(x, 0.5, m.training),
    "stochastic depth": lambda m, x: x + stochastic_depth(x, 0.5, "row", m.training),
    "random relu": lambda m, x: F.rrelu(x, training=m.training),
    "noise": lambda m, x: x + torch.randn_like(x) if m.training else x,
    "other layer": lambda m, x: m.other(x) if m.training else x,
    "other layer twice": lambda m, x: m.other(m.other(x)) if m.training else m.other(x),
    "batch norm": lambda m, x: F.batch_norm(
        x, m.norm.running_mean, m.norm.running_var, training=m.training
    ),
    "ensemble": lambda m, x: (
        torch.stack([x, m.other(x)]).mean(0) if not m.training else x
    ),
}


@pytest.mark.parametrize("case", _READS_TRAINING)
def test_training_read_in_forward(case: str, same: Any) -> None:
    model = _Trained(_READS_TRAINING[case])
    captured = same(model, _X, others=((_LARGE,),), modes=(True, False, True))
    assert not torch.equal(captured.train()(_X), captured.eval()(_X))


def test_stochastic_depth_and_dropout_modules(same: Any) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.drops = nn.ModuleList(
                [StochasticDepth(0.5, "row"), nn.Dropout(0.5), nn.FeatureAlphaDropout()]
            )

        def forward(self, x: Tensor) -> Tensor:
            for drop in self.drops:
                x = x + drop(self.fc(x))
            return x

    captured = same(Residual(), _X, others=((_LARGE,),))
    assert not torch.equal(captured.train()(_X), captured.eval()(_X))


def test_random_numbers_continue_from_call_to_call(same: Any) -> None:
    """Not baked: two calls differ, and one seed gives one result."""
    captured = same(_Trained(lambda m, x: x + torch.rand(x.shape[0], 1)), _X)
    first, second = captured(_X), captured(_X)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_of_batch_norm(momentum: float | None, same: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=momentum))
    captured = same(model, _X, modes=(True, True, False), others=((_LARGE,),))
    assert int(captured.get_buffer("1.num_batches_tracked")) == 4


def test_batch_norm_without_statistics(same: Any) -> None:
    same(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)), _X)


# --- modes that differ within one model -------------------------------------------


class _Frozen(nn.BatchNorm1d):
    """Stays in evaluation while the model trains."""

    def train(self, mode: bool = True) -> _Frozen:
        return super().train(False)


def test_a_sub_module_that_overrides_train(same: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), _Frozen(4), nn.BatchNorm1d(4), nn.Dropout())
    model.train()
    captured = same(model, _X, modes=(None, True, False), others=((_LARGE,),))
    assert not captured.train().get_submodule("1").training


def test_a_norm_held_in_evaluation(same: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)).train()
    model[1].eval()
    captured = same(model, _X, modes=(None,), others=((_LARGE,),))
    assert captured.get_submodule("2").training
    assert not captured.get_submodule("1").training
    assert int(captured.get_buffer("1.num_batches_tracked")) == 0


class _Detector(nn.Module):
    """Overrides ``train()`` of the whole model, as detection backbones do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout()

    def train(self, mode: bool = True) -> _Detector:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(x))


def test_a_model_that_overrides_train(same: Any) -> None:
    captured = same(_Detector().train(), _X, modes=(None, True, False, True))
    assert int(captured.get_buffer("norm.num_batches_tracked")) == 0
