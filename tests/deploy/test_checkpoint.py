"""A converted model in a file: what is in it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.deploy import checkpoint
from gdnsq_fx.deploy.files import FileContents, read_file, write_file
from gdnsq_fx.errors import FileFormatError, PassError
from gdnsq_fx.spec import Override, QuantConfig

_X = torch.randn(8, 4)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 64)
        self.norm = nn.BatchNorm1d(64)
        self.fc2 = nn.Linear(64, 3)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("mask", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.fc1(x)).relu()) * self.scale * self.mask


def _converted(model: nn.Module | None = None, **settings: Any) -> GraphModule:
    torch.manual_seed(0)
    config = QuantConfig(**{"first_last": None, **settings})
    qmodel = gdnsq_fx.prepare(model or _Net(), _X, config, [_X])
    return gdnsq_fx.convert(qmodel)


def test_round_trip(tmp_path: Path) -> None:
    imodel = _converted(weight_bits=3, act_bits=5)
    size = checkpoint.write(imodel, tmp_path / "m.safetensors")
    assert size == (tmp_path / "m.safetensors").stat().st_size
    contents = checkpoint.read(tmp_path / "m.safetensors")
    assert contents.path == str(tmp_path / "m.safetensors")
    assert contents.config == QuantConfig(weight_bits=3, act_bits=5, first_last=None)
    assert contents.max_codes == {
        "quantizers.fc1_input": 31, "quantizers.fc2_input": 31
    }  # fmt: skip
    state = imodel.state_dict()
    assert contents.tensors.keys() == state.keys()
    for name, value in state.items():
        assert contents.tensors[name].dtype == value.dtype, name
        assert torch.equal(contents.tensors[name], value), name


def test_all_of_a_configuration_survives(tmp_path: Path) -> None:
    settings: Any = {
        "weight_bits": 3,
        "act_bits": 9,
        "per_channel": False,
        "estimator": "aewgs",
        "offset": "integer",
        "include": ("fc*",),
        "overrides": {"fc2": Override(weight_bits=16), "op:linear": {"act_bits": 11}},
    }
    imodel = _converted(**settings)
    checkpoint.write(imodel, tmp_path / "m.safetensors")
    found = checkpoint.read(tmp_path / "m.safetensors").config
    assert found == QuantConfig(first_last=None, **settings)
    loaded = gdnsq_fx.load(tmp_path / "m.safetensors", _Net(), _X)
    assert torch.equal(loaded(_X), imodel(_X))


@pytest.mark.parametrize("bits", range(1, 17))
def test_codes_take_their_bits_and_no_more(bits: int, tmp_path: Path) -> None:
    imodel = _converted(weight_bits=bits, act_bits=bits)
    path = tmp_path / "m.safetensors"
    checkpoint.write(imodel, path)
    with safe_open(path, framework="pt") as opened:  # type: ignore[no-untyped-call]
        packed = json.loads(opened.metadata()["packed"])
        stored = opened.get_tensor("quantizers.fc1_weight.codes")
    assert packed["quantizers.fc1_weight.codes"] == {"bits": bits, "shape": [64, 4]}
    assert stored.numel() == 64 * 4 * bits // 8
    loaded = gdnsq_fx.load(path, _Net(), _X)
    assert torch.equal(loaded(_X), imodel(_X))


def test_codes_that_need_fewer_bits_take_fewer(tmp_path: Path) -> None:
    """A constant weight has one level, which one bit holds."""
    model = _Net()
    model.fc1.weight.data.fill_(0.5)
    imodel = _converted(model, weight_bits=8)
    checkpoint.write(imodel, tmp_path / "m.safetensors")
    loaded = gdnsq_fx.load(tmp_path / "m.safetensors", _Net(), _X)
    assert torch.equal(loaded(_X), imodel(_X))


def test_no_floating_point_weight_is_in_the_file(tmp_path: Path) -> None:
    checkpoint.write(_converted(), tmp_path / "m.safetensors")
    names = checkpoint.read(tmp_path / "m.safetensors").tensors
    assert not any(name.endswith("fc1.weight") for name in names)
    assert "fc1.bias" in names and "norm.running_mean" in names and "scale" in names


def test_refuses_what_is_not_converted(tmp_path: Path) -> None:
    qmodel = gdnsq_fx.prepare(_Net(), _X, calibration=[_X])
    for model in (qmodel, torch.fx.symbolic_trace(_Net())):
        with pytest.raises(PassError, match="only a converted model can be saved"):
            checkpoint.write(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


# --- damaged and foreign contents -------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> Path:
    checkpoint.write(_converted(), tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def _rewritten(path: Path, **changes: Any) -> Path:
    """The same file with another description, sealed as `save` would."""
    found = read_file(path)
    with safe_open(path, framework="pt") as opened:  # type: ignore[no-untyped-call]
        packed = json.loads(opened.metadata()["packed"])
    bits = {name: entry["bits"] for name, entry in packed.items()}
    description = {**found.description, **changes}
    description = {k: v for k, v in description.items() if v != "left out"}
    write_file(path, found.tensors, bits, description)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"config": "left out"},
        {"max_codes": "left out"},
        {"config": None},
        {"config": [1, 2]},
        {"config": {"weight_bits": 99}},
        {"config": {"colour": "red"}},
        {"config": {"include": 5}},
        {"config": {"overrides": []}},
        {"max_codes": None},
        {"max_codes": [1]},
        {"max_codes": {"a": "many"}},
        {"max_codes": {"a": None}},
        {"max_codes": {"a": {}}},
    ],
)
def test_a_description_that_is_not_ours(changes: Any, written: Path) -> None:
    with pytest.raises(FileFormatError, match="does not describe a converted model"):
        checkpoint.read(_rewritten(written, **changes))


def test_an_infinite_number_of_levels(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON as Python reads it may hold Infinity, which is no integer."""
    found = read_file(written)
    description = {**found.description, "max_codes": {"a": float("inf")}}
    contents = FileContents(found.tensors, description)
    monkeypatch.setattr(checkpoint, "read_file", lambda path: contents)
    with pytest.raises(FileFormatError, match="does not describe a converted model"):
        checkpoint.read(written)


@pytest.mark.parametrize("code", [-2, 1 << 16, 1 << 40])
def test_numbers_of_levels_that_cannot_be(code: int, written: Path) -> None:
    codes = {"quantizers.fc1_input": code, "quantizers.fc2_input": 15}
    with pytest.raises(FileFormatError, match=r"levels on fc1\.input"):
        gdnsq_fx.load(_rewritten(written, max_codes=codes), _Net(), _X)


def test_an_edge_without_levels(written: Path) -> None:
    path = _rewritten(written, max_codes={"quantizers.fc1_input": 15})
    with pytest.raises(
        FileFormatError, match=r"no levels for fc2\.input.*Load it into"
    ):
        gdnsq_fx.load(path, _Net(), _X)


def _spoil(path: Path, name: str, value: Tensor | None) -> Path:
    found = read_file(path)
    with safe_open(path, framework="pt") as opened:  # type: ignore[no-untyped-call]
        packed = json.loads(opened.metadata()["packed"])
    bits = {k: v["bits"] for k, v in packed.items() if k != name}
    tensors = {k: v for k, v in found.tensors.items() if k != name}
    if value is not None:
        tensors[name] = value
    write_file(path, tensors, bits, found.description)
    return path


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fc1.bias", None),
        ("fc1.bias", torch.zeros(63)),
        ("fc1.bias", torch.zeros(64, dtype=torch.float64)),
        ("fc1.bias", torch.zeros(64, dtype=torch.int64)),
        ("quantizers.fc1_weight.codes", None),
        ("quantizers.fc1_weight.codes", torch.zeros(64, 4)),
        ("quantizers.fc1_weight.codes", torch.zeros(64, 5, dtype=torch.uint8)),
        ("quantizers.fc1_weight.step", torch.ones(1, 64)),
        ("quantizers.fc1_input.step", torch.ones((), dtype=torch.float16)),
        ("something.else", torch.zeros(1)),
    ],
)
def test_tensors_of_another_name_shape_or_type(
    name: str, value: Tensor | None, written: Path
) -> None:
    with pytest.raises(FileFormatError) as caught:
        gdnsq_fx.load(_spoil(written, name, value), _Net(), _X)
    assert "does not fit this model" in str(caught.value)
    assert name in str(caught.value)
