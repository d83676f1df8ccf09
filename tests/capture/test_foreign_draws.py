"""Random numbers from outside torch: drawn anew on each call, as in the model."""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gdnsq_fx.capture.capture import capture
from gdnsq_fx.foreign_random import foreign_state, restore_foreign_state

_X = torch.randn(3, 4)


class _Masked(nn.Module):
    """Zeroes columns in training, as speech models mask their input."""

    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.training:
            x = x * torch.tensor(self.draw())
        return self.last(x)


class _Net(nn.Module):
    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.masked = _Masked(draw)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.masked(x))


_DRAWS = {
    "numpy": lambda: np.random.rand(4).astype("float32"),
    "python": lambda: [random.random() for _ in range(4)],
}


@pytest.mark.parametrize("source", _DRAWS)
def test_numbers_are_drawn_on_every_call(source: str) -> None:
    model = _Net(_DRAWS[source]).train()
    captured = capture(model, (_X,), {})
    assert "draws random numbers outside torch" in captured.facts.opaque["masked"]
    names = {path for path, _ in captured.named_modules()}
    assert {"masked.first", "masked.last"} <= names
    state = foreign_state()
    wanted = [model(_X) for _ in range(3)]
    restore_foreign_state(state)
    got = [captured(_X) for _ in range(3)]
    for one, other in zip(wanted, got, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.equal(got[0], got[1])


@pytest.mark.parametrize("source", _DRAWS)
def test_capture_leaves_the_generators_as_they_were(source: str) -> None:
    state = foreign_state()
    capture(_Net(_DRAWS[source]), (_X,), {})
    assert foreign_state() == state


def test_states_differ_after_a_draw_and_come_back() -> None:
    state = foreign_state()
    one = np.random.rand(), random.random(), np.random.randn()
    assert foreign_state() != state
    restore_foreign_state(state)
    assert (np.random.rand(), random.random(), np.random.randn()) == one


def test_numpy_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    state = foreign_state()
    assert state.numpy == ()
    random.random()
    assert foreign_state() != state
    restore_foreign_state(state)
    assert foreign_state() == state
