"""What all tests share: golden files, rewritten with one flag, and a small network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx

REWRITE = "--rewrite-golden"
ALL_MODELS = "--all-models"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        REWRITE, action="store_true", help="write golden files instead of comparing"
    )
    parser.addoption(
        ALL_MODELS, action="store_true", help="tests/zoo: all models, not a sample"
    )


def pytest_configure() -> None:
    # Tiny tensors: a second thread only waits for the first, at length on a busy CPU.
    torch.set_num_threads(1)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)``: text equals ``golden/name`` beside the test's file."""

    def check(name: str, text: str) -> None:
        path = Path(request.path).parent / "golden" / name
        if request.config.getoption(REWRITE):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
            return
        assert path.exists(), f"{path} is missing; run pytest with {REWRITE}"
        wanted = path.read_text(encoding="utf-8")
        assert text == wanted, f"if this is meant, run pytest with {REWRITE}"

    return check


class _ResidualNet(nn.Module):
    """A padded convolution with a norm, a residual sum, a linear layer.

    Args:
        rectified: no value of the sum is negative.
    """

    def __init__(self, rectified: bool = True) -> None:
        super().__init__()
        self.rectified = rectified
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.mid = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        x = self.mid(x) + x
        if self.rectified:
            x = x.relu()
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="session")
def residual_net() -> type[nn.Module]:
    """A small network for inputs ``[batch, 3, height, width]``; returns 5 numbers."""
    return _ResidualNet


@pytest.fixture(scope="session")
def prepared_residual() -> Callable[..., GraphModule]:
    """``prepared_residual(x, bits, **settings)``: of seed 0, calibrated on ``x``."""

    def prepared(x: Tensor, bits: int = 4, **settings: Any) -> GraphModule:
        torch.manual_seed(0)
        given = {"weight_bits": bits, "act_bits": bits, "first_last": None, **settings}
        config = gdnsq_fx.QuantConfig(**given)
        return gdnsq_fx.prepare(_ResidualNet().eval(), x, config, [x])

    return prepared


@pytest.fixture(scope="session")
def converted_residual(
    prepared_residual: Callable[..., GraphModule],
) -> Callable[..., GraphModule]:
    """``converted_residual(x, bits, deployable, **settings)``: that, converted."""

    def converted(
        x: Tensor, bits: int = 4, deployable: bool = False, **settings: Any
    ) -> GraphModule:
        qmodel = prepared_residual(x, bits, **settings)
        return gdnsq_fx.convert(qmodel, deployable=deployable)

    return converted
