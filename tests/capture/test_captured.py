"""The captured module keeps the whole tree of the model, also when it is copied."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gdnsq_fx.capture.capture import capture
from gdnsq_fx.capture.captured import CapturedModule

_X = torch.randn(2, 4)


class _Net(nn.Module):
    """Used out of order; unused and tied parts, buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 4)
        self.unused = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.first = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.bias = nn.Parameter(torch.randn(4))
        self.spare = nn.Parameter(torch.randn(1))
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("mask", torch.ones(4), persistent=False)
        self.register_buffer("nothing", None)
        self.constant = torch.tensor(3.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied(self.first(x).relu()) * self.mask + self.bias
        return self.last(x * self.scale * self.constant + torch.ones(4))


@pytest.fixture(params=["captured", "copied", "copied twice"])
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, CapturedModule]:
    torch.manual_seed(0)
    model = _Net()
    captured = capture(model, (_X,), {})
    for _ in range(request.param.count("copied") + request.param.count("twice")):
        captured = copy.deepcopy(captured)
    return model, captured


Pair = tuple[nn.Module, CapturedModule]


def test_computes_the_same(pair: Pair) -> None:
    model, captured = pair
    assert isinstance(captured, CapturedModule)
    assert torch.equal(captured(_X), model(_X))


def test_state_dict_has_the_names_the_order_and_the_values(pair: Pair) -> None:
    model, captured = pair
    wanted, got = model.state_dict(), captured.state_dict()
    assert list(got) == list(wanted)
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


def test_a_checkpoint_loads_strictly_both_ways(pair: Pair) -> None:
    model, captured = pair
    other = _Net()
    captured.load_state_dict(other.state_dict())
    assert torch.equal(captured(_X), other(_X))
    model.load_state_dict(captured.state_dict())
    assert torch.equal(model(_X), other(_X))


def test_parameters_and_modules_have_their_order(pair: Pair) -> None:
    model, captured = pair
    for names in ("named_parameters", "named_modules"):
        walk: Callable[[nn.Module], list[str]] = lambda m, n=names: [  # noqa: E731
            name for name, _ in getattr(m, n)()
        ]
        assert walk(captured) == walk(model), names


def test_tied_weights_stay_tied(pair: Pair) -> None:
    _, captured = pair
    assert captured.tied.weight is captured.first.weight


def test_nothing_is_shared_with_the_model(pair: Pair) -> None:
    model, captured = pair
    mine = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
    assert not any(t.data_ptr() in mine for t in captured.state_dict().values())


def test_non_persistent_buffers_are_there_and_move_along(pair: Pair) -> None:
    _, captured = pair
    assert "mask" not in captured.state_dict()
    assert captured.double().mask.dtype == torch.float64
    assert captured.nothing is None


def test_mode_is_kept() -> None:
    for training in (False, True):
        captured = capture(_Net().train(training), (_X,), {})
        for module in (captured, copy.deepcopy(captured)):
            assert all(m.training is training for m in module.modules())


def test_a_copy_is_independent() -> None:
    captured = capture(_Net(), (_X,), {})
    captured.meta["note"] = ["mine"]
    twin = copy.deepcopy(captured)
    wanted = captured(_X)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.meta["note"].append("yours")
    assert torch.equal(captured(_X), wanted)
    assert captured.meta["note"] == ["mine"]
