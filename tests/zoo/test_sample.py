"""A sample of the zoo; all of it with ``pytest tests/zoo --all-models``.

`sweep.py` runs the same checks with a process for each model, and writes a table.
"""

from __future__ import annotations

from typing import cast

import pytest
import torch
from cases import LIBRARIES, Library, all_cases, is_installed
from checks import run_case

SAMPLE = (
    "torchvision/googlenet",
    "torchvision/resnet18",
    "torchvision/ssdlite320_mobilenet_v3_large",
    "timm/test_efficientnet",
    "timm/test_maxvit",
    "timm/test_vit",
    "transformers/bert-sdpa",
    "transformers/clip-eager",
    "transformers/gpt2-sdpa",
    "transformers/llama-eager",
    "transformers/mamba",
    "transformers/mixtral-sdpa",
    "transformers/t5-eager",
    "transformers/whisper-sdpa",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" not in metafunc.fixturenames:
        return
    names = SAMPLE
    if metafunc.config.getoption("--all-models"):
        installed = [library for library in LIBRARIES if is_installed(library)]
        names = tuple(case.name for lib in installed for case in all_cases(lib))
    metafunc.parametrize("name", names)


def test_a_model_captured_trained_and_converted(name: str) -> None:
    library = cast(Library, name.partition("/")[0])
    if not is_installed(library):
        pytest.skip(f"{library} is not installed: pip install '.[test]'")
    (case,) = (case for case in all_cases(library) if case.name == name)
    with torch.random.fork_rng(devices=[]):
        results = list(run_case(case))
    passed = ("ok", "not applicable")
    misses = [f"{r.check}: {r.detail}" for r in results if r.status not in passed]
    assert not misses


@pytest.mark.parametrize("library", LIBRARIES)
def test_names_are_unique(library: Library) -> None:
    if not is_installed(library):
        pytest.skip(f"{library} is not installed: pip install '.[test]'")
    names = [case.name for case in all_cases(library)]
    assert len(names) == len(set(names))
    assert {n for n in SAMPLE if n.startswith(library)} <= set(names)


def test_every_module_of_timm_has_a_case() -> None:
    timm = pytest.importorskip("timm")
    families = {case.family for case in all_cases("timm")}
    assert not set(timm.list_modules()) - families
