"""Fine-tuned, converted and in a runtime, a network says the same of real images.

The networks and what is measured are those of ``tests/benchmarks/parity.py``, with
fewer images and steps.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from gdnsq_fx.demo.digits import accuracy

for _library in ("sklearn", "onnxscript", "onnxruntime", "torchvision"):
    pytest.importorskip(_library)

_BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
_DATA = Path(__file__).parents[3] / "shared" / "data"
_PRECISIONS = ("W8A8", "W4A4", "W3A3", "W2A2", "W1A1", "mixed 4, 2, 8, 3")
_STEPS = 5
_IMAGES = 1000


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(_BENCHMARKS))
    return importlib.import_module


@cache
def _network(networks: Any, name: str) -> Any:
    if name == "digits CNN":
        network = networks.digits_network(8, 3)
    elif name == "transformer":
        network = networks.digits_transformer()
    else:
        network = networks.resnet20_network(_DATA, _IMAGES)
    assert accuracy(network.model, network.images, network.labels) > 80.0
    return network


def _parity(load: Callable[[str], Any], name: str, bits: str, runtimes: Any) -> Any:
    networks, measuring = load("parity_networks"), load("parity_measure")
    network = _network(networks, name)
    network = replace(
        network, images=network.images[:_IMAGES], labels=network.labels[:_IMAGES]
    )
    (precision,) = [p for p in measuring.PRECISIONS if p.name == bits]
    return measuring.measure(network, precision, _STEPS, runtimes)


def _check(found: Any, runtimes: tuple[str, ...]) -> None:
    certificate = found.certificate
    assert certificate.ok, str(certificate)
    assert found.images >= _IMAGES and certificate.inputs == found.images
    assert found.differing == 0 and abs(found.fake - found.converted) <= 0.1
    assert tuple(one.name for one in certificate.runtimes) == runtimes
    for one in certificate.runtimes:
        assert one.wrong == 0 and one.unexplained_inputs == 0
        if one.rounding == 0:  # not one value was rounded the other way
            assert one.differing == 0 and one.other_argmax == 0
        # What a rounding the other way leads to; a few in a thousand at most.
        assert one.other_argmax <= min(one.differing_inputs, _IMAGES // 200)


@pytest.mark.parametrize("name", ["digits CNN", "transformer"])
@pytest.mark.parametrize("bits", _PRECISIONS)
def test_torch_and_onnxruntime_on_digits(
    name: str, bits: str, load: Callable[[str], Any]
) -> None:
    runtimes = ("torch", "onnxruntime")
    _check(_parity(load, name, bits, runtimes), runtimes)


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["W8A8", "W2A2"])
def test_torch_and_onnxruntime_on_cifar(bits: str, load: Callable[[str], Any]) -> None:
    if not (_DATA / "cifar10-jpeg.tar.xz").exists():
        pytest.skip(f"no CIFAR-10 and no trained ResNet-20 in {_DATA}")
    runtimes = ("torch", "onnxruntime")
    _check(_parity(load, "ResNet-20", bits, runtimes), runtimes)


@pytest.mark.parametrize("bits", ["W4A4", "W1A1"])
def test_openvino(bits: str, load: Callable[[str], Any]) -> None:
    pytest.importorskip("openvino")
    _check(_parity(load, "digits CNN", bits, ("openvino",)), ("openvino",))


@pytest.mark.slow
def test_inductor(load: Callable[[str], Any]) -> None:
    pytest.importorskip("torchao")
    found = _parity(load, "digits CNN", "W4A4", ("torch", "inductor"))
    _check(found, ("torch", "inductor"))


def test_all_layers_integer(load: Callable[[str], Any]) -> None:
    runtimes = ("torch", "onnxruntime")
    _check(_parity(load, "digits CNN", "W4A4, all integer", runtimes), runtimes)
