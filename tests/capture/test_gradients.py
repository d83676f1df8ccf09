"""Gradients: where they are kept off, cut, or computed by a function of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gdnsq_fx.capture.capture import capture

_X = torch.rand(4, 4) + 0.5
_LARGE = (torch.rand(6, 4) + 0.5,)


class _Apply(nn.Module):
    """Applies a function; has parameters for it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.rand(4))
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


class _Round(torch.autograd.Function):
    """Rounds; the gradient passes with another factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def _no_grad(m: Any, x: Tensor) -> Tensor:
    y = m.fc(x)
    with torch.no_grad():
        centre = m.fc(x * m.gain).mean(0)
    return y - centre


def _clamped(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.gain.clamp_(max=0.5)
    return m.fc(x) * m.gain


def _into_a_given_tensor(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = torch.mv(m.fc.weight, m.gain, out=torch.empty(4))
        scale = scale.div_(m.gain.norm())
    return m.fc(x) * scale


def _nested_modes(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.fc(x)
        with torch.enable_grad():
            z = x * m.gain
    return y + z


@torch.no_grad()
def _decorated(m: Any, x: Tensor) -> Tensor:
    return m.fc(x)


_GRADIENTS: dict[str, Callable[..., Any]] = {
    "no_grad": _no_grad,
    "no_grad then enable_grad": _nested_modes,
    "parameter written": _clamped,
    "out under no_grad": _into_a_given_tensor,
    "decorated": lambda m, x: _decorated(m, x) + m.gain * x,
    "set_grad_enabled": lambda m, x: _set_grad(m, x),
    "detach": lambda m, x: m.fc(x).detach() + m.gain,
    "straight through": lambda m, x: (y := m.fc(x)) + (y.round() - y).detach(),
    "function": lambda m, x: _Round.apply(m.fc(x), 3.0) * m.gain,
    "function of a parameter": lambda m, x: F.linear(x, _Round.apply(m.fc.weight, 0.5)),
    "frozen": lambda m, x: m.fc(x) * m.gain.detach(),
    "data": lambda m, x: m.fc(x) * m.gain.data,
    "checkpoint": lambda m, x: checkpoint(m.fc, x, use_reentrant=False).sin(),
}


def _set_grad(m: Any, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(not m.training):
        y = m.fc(x)
    return y * m.gain


@pytest.mark.parametrize("case", _GRADIENTS)
def test_gradients(case: str, same: Any) -> None:
    same(_Apply(_GRADIENTS[case]), _X, others=(_LARGE,))


def test_gradients_are_kept_off_in_a_model_captured_without_them() -> None:
    with torch.no_grad():
        captured = capture(_Apply(_no_grad), (_X,), {})
    assert captured(_X).requires_grad
