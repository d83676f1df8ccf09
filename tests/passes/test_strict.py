"""``strict=True``: nothing stays in floating point that nobody excluded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gdnsq_fx

_X = torch.randn(2, 3, 4)


class _Net(nn.Module):
    """A layer that the table does not know, and one that refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((3, 4))
        self.hooked = nn.Linear(4, 4)
        self.hooked.register_forward_hook(_pass_on)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hooked(self.norm(x)))


def _pass_on(*_: Any) -> None:
    return None


def _prepare(model: nn.Module, **settings: Any) -> Any:
    config = gdnsq_fx.QuantConfig(strict=True, **settings)
    return gdnsq_fx.prepare(model, _X, config, [_X])


def test_lists_each_with_its_reason_and_line_and_says_the_remedy() -> None:
    with pytest.raises(gdnsq_fx.NotQuantizedError) as caught:
        _prepare(_Net())
    text = str(caught.value)
    assert "2 operations would stay in floating point" in text
    assert "norm: LayerNorm is not in the op table (test_strict.py:" in text
    assert "hooked: has hooks, which a function call would drop" in text
    assert "exclude=('norm', ...)" in text
    assert "with_rows(...)" in text


def test_what_was_excluded_was_asked_for() -> None:
    qmodel = _prepare(_Net(), exclude=("op:LayerNorm", "hooked"))
    skipped = gdnsq_fx.analyze(qmodel, [_X]).coverage.skipped
    assert {s.name: s.reason for s in skipped} == {
        "norm": "excluded by the configuration",
        "hooked": "excluded by the configuration",
    }


def test_first_and_last_layers_may_be_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert _prepare(model, first_last="exclude") is not None


def test_a_batch_norm_that_is_not_folded_is_no_skip() -> None:
    model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.ReLU(), nn.BatchNorm1d(3)).eval()
    config = gdnsq_fx.QuantConfig(strict=True)
    assert gdnsq_fx.prepare(model, _X, config, [_X], fold_batch_norm=True) is not None


def test_a_refused_call_says_why() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4, max_norm=1.0)
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.embed(x))

    x = torch.tensor([[0, 3]])
    config = gdnsq_fx.QuantConfig(strict=True)
    with pytest.raises(gdnsq_fx.NotQuantizedError, match="max_norm rewrites rows"):
        gdnsq_fx.prepare(Net(), x, config, [x])


def test_strict_must_be_a_flag() -> None:
    with pytest.raises(gdnsq_fx.ConfigError, match="strict must be True or False"):
        gdnsq_fx.QuantConfig(strict="yes")  # type: ignore[arg-type]
    with pytest.raises(
        gdnsq_fx.ConfigError, match="scope must be one of compute, full"
    ):
        gdnsq_fx.QuantConfig(scope="all")  # type: ignore[arg-type]
