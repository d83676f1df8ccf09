"""The checks of the zoo find what they are there to find."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import Case
from checks import run_case
from outputs import compare, loss_of, tensors
from torch import Tensor, nn


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.fc(x)).relu())


class _Unlike(_Net):
    """Computes something else at every call, as no graph can."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


_CASE = Case(
    "torchvision/net", "net", "torchvision", _Net, lambda batch: torch.randn(batch, 6)
)


def _statuses(case: Case) -> dict[str, str]:
    return {result.check: result.status for result in run_case(case)}


def test_an_ordinary_model_passes_every_check() -> None:
    assert set(_statuses(_CASE).values()) == {"ok"}


def test_a_refusal_of_eager_is_not_applicable_and_must_be_true() -> None:
    one = replace(_CASE, example=lambda batch: torch.randn(1, 6))
    assert _statuses(one)["eager"] == "failed"
    found = _statuses(replace(one, refuses={"train": "BatchNorm of one sample"}))
    assert found["eager"] == "ok"
    assert found["train"] == found["step"] == "not applicable"
    false = replace(_CASE, refuses={"train": "it does not"})
    assert _statuses(false)["eager"] == "failed"


def test_a_model_that_is_not_captured_blocks_the_rest() -> None:
    found = _statuses(replace(_CASE, build=nn.Identity))
    assert found["capture"] == "failed"
    assert found["eval"] == found["train"] == found["convert"] == "blocked"


def test_a_graph_that_computes_something_else_is_found() -> None:
    found = _statuses(replace(_CASE, build=_Unlike))
    assert "failed" in (found["capture"], found["eval"])


_X = torch.tensor([0.0, 1.0, 2.0])
_IDS = torch.tensor([3, 100_000])


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda out: {**out, "a": out["a"] + 1e-3}, "differs by"),
        (lambda out: {**out, "a": out["a"].double()}, "float64"),
        (lambda out: {**out, "a": out["a"][:2]}, r"float32\[2\]"),
        (lambda out: {**out, "a": out["a"] / 0}, "differs by inf"),
        (lambda out: {**out, "a": out["a"].log()}, "differs by inf"),
        (lambda out: {**out, "ids": out["ids"] + 1}, "ids.* differs by inf"),
        (lambda out: {**out, "a": None}, "NoneType"),
        (lambda out: {**out, "n": 4}, "4 instead of 3"),
        (lambda out: {"a": out["a"]}, "missing"),
        (lambda out: OrderedDict(out), "OrderedDict instead of dict"),
        (lambda out: {**out, "cache": SimpleNamespace(k=-_X)}, "k differs by"),
    ],
)
def test_compare_finds(change: Callable[[Any], Any], cause: str) -> None:
    output = {"a": _X, "ids": _IDS, "n": 3, "cache": SimpleNamespace(k=_X)}
    assert compare(output, dict(output)).cause(1e-4) == ""
    with pytest.raises(AssertionError, match=cause):
        assert not compare(output, change(output)).cause(1e-4)


def test_the_floor_forgives_what_is_zero_up_to_rounding() -> None:
    wanted = {"weight": _X, "bias": torch.tensor([1e-9])}
    got = {"weight": _X, "bias": torch.tensor([-1e-9])}
    assert compare(wanted, got).cause(1e-4)
    assert not compare(wanted, got, floor=1e-3).cause(1e-4)


def test_losses_are_added_and_outputs_squared() -> None:
    x = _X.clone().requires_grad_()
    assert loss_of({"a": x.sum(), "b": x.max()}).item() == 5.0
    assert loss_of([x, {"k": (x,)}]).item() == pytest.approx(2 * 5.0 / 3.0)
    assert list(tensors([x, {"k": (x, 3)}])) == ["output[0]", "output[1]['k'][0]"]
