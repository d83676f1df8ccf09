"""Golden files: printed text kept beside the tests, rewritten with one flag."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

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
