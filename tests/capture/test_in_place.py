"""Writes in place, into views, inputs and new tensors, happen in the graph too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_X = torch.rand(4, 4) + 0.5
_LARGE = (torch.rand(6, 4) + 0.5,)


class _Apply(nn.Module):
    """Applies a function; has parameters for it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.rand(4))
        self.relu = nn.ReLU(inplace=True)
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def _write(m: Any, x: Tensor, place: Any, value: Any) -> Tensor:
    x = x * 1.0
    x[place] = value
    return m.fc(x)


def _rows(m: Any, x: Tensor) -> Tensor:
    out = torch.empty(x.shape[0], 2, 4)
    for i in range(2):
        out[:, i] = m.fc(x) * i
    return out


def _through_a_view(m: Any, x: Tensor) -> Tensor:
    y = x * m.gain
    first = y[:, :2]
    y.view(-1)[::2] += 1.0
    y.t()[0].zero_()
    return m.fc(y) + first.sum()


def _augmented(m: Any, x: Tensor) -> Tensor:
    y = same = m.fc(x)
    y += x
    y *= m.gain
    y[:, 1:] -= 1.0
    return y + same


_WRITES: dict[str, Callable[..., Any]] = {
    "column": lambda m, x: _write(m, x, (slice(None), 0), 1.0),
    "row": lambda m, x: _write(m, x, 1, m.gain),
    "slice": lambda m, x: _write(m, x, (slice(1, None), slice(None, 2)), m.gain[:2]),
    "mask": lambda m, x: _write(m, x, x > 1.0, 0.0),
    "indices": lambda m, x: _write(m, x, torch.tensor([0, 2]), m.gain * 2.0),
    "ellipsis": lambda m, x: _write(m, x, (..., -1), x.sum(1)),
    "rows of a new tensor": _rows,
    "view": _through_a_view,
    "augmented": _augmented,
    "methods": lambda m, x: m.fc(x).add_(1.0).neg_().clamp_(max=0.5),
    "input": lambda m, x: (x.add_(1.0), m.fc(x))[1] + x,
    "module": lambda m, x: (y := m.fc(x), m.relu(y))[0] + y,
    "function": lambda m, x: F.relu(m.fc(x), inplace=True),
    "out": lambda m, x: torch.add(x.detach(), 1.0, out=torch.empty(x.shape)),
    "fill": lambda m, x: x * torch.zeros(x.shape[1]).fill_(3.0),
    "scatter": lambda m, x: torch.zeros_like(x).scatter_(1, x.argmax(1)[:, None], 1.0),
    "copy": lambda m, x: torch.zeros(x.shape).copy_(m.fc(x)),
    "masked fill": lambda m, x: m.fc(x).masked_fill_(x > 1.0, 0.0),
    "zero of a detached": lambda m, x: (y := m.fc(x), y.detach().zero_())[0] + x,
}


@pytest.mark.parametrize("case", _WRITES)
def test_writes_in_place(case: str, same: Any) -> None:
    same(_Apply(_WRITES[case]), _X, others=(_LARGE,))
