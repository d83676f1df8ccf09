"""Weights below 8 bits in an ONNX file: their size, their codes, the same kernels."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.deploy import onnx as onnx_format
from gdnsq_fx.deploy.program import Example

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

_X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3, padding=1)
        self.mid = nn.Conv2d(64, 65, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(65)
        self.up = nn.ConvTranspose2d(65, 64, 2, stride=2)
        self.fc = nn.Linear(64, 300)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.mid(self.conv(x).relu())).relu()
        return self.fc(self.up(x).relu().mean((2, 3)))


_PACKED = ("mid", "up", "fc")  # the first has too few weights


def _deployable(bits: int, net: nn.Module | None = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    settings = {"weight_bits": bits, "act_bits": 8, "first_last": None, **settings}
    config = gdnsq_fx.QuantConfig(**settings)
    qmodel = gdnsq_fx.prepare((net or _Net()).eval(), _X, config, [_X])
    return gdnsq_fx.convert(qmodel, deployable=True)


def _write(model: GraphModule, path: Path, packed: bool) -> Path:
    onnx_format.write_onnx(model, Example((_X,), {}), path, packed=packed)
    return path


def _session(path: Path, optimized: Path | None = None, **entries: str) -> Any:
    options = runtime.SessionOptions()
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _outputs(session: Any) -> list[Any]:
    return session.run(None, {session.get_inputs()[0].name: _X.numpy()})


@pytest.mark.parametrize("bits", range(1, 7))
@pytest.mark.parametrize("per_channel", [True, False])
def test_codes_come_back(bits: int, per_channel: bool, tmp_path: Path) -> None:
    model = _deployable(bits, per_channel=per_channel)
    path = _write(model, tmp_path / "model.onnx", packed=True)
    written = onnx.load(path)
    onnx.checker.check_model(written, full_check=True)
    assert written.opset_import[0].version == 21
    names = [f"quantizers.{name}_weight.codes" for name in _PACKED]
    stored = {one.name for one in written.graph.initializer}
    assert stored.isdisjoint(names)
    for name in names:
        written.graph.output.append(onnx.ValueInfoProto(name=name))
    session = runtime.InferenceSession(
        written.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for name, codes in zip(names, _outputs(session)[1:], strict=True):
        assert torch.equal(torch.tensor(codes), model.get_buffer(name)), name


@pytest.mark.parametrize("bits", [4, 3, 2, 1])
def test_the_same_kernels_and_results(bits: int, tmp_path: Path) -> None:
    model = _deployable(bits)
    found = []
    for packed in (False, True):
        path = _write(model, tmp_path / f"{packed}.onnx", packed)
        session = _session(path, tmp_path / f"optimized-{packed}.onnx")
        nodes = onnx.load(tmp_path / f"optimized-{packed}.onnx").graph.node
        kinds = collections.Counter(node.op_type for node in nodes)
        found.append((kinds, _outputs(session)[0].tobytes()))
    assert found[0] == found[1]
    assert found[0][0]["QLinearConv"] >= 1 and "BitShift" not in found[1][0]


@pytest.mark.parametrize("bits", range(1, 7))
def test_a_weight_takes_its_bits(bits: int, tmp_path: Path) -> None:
    model = _deployable(bits)
    plain = _write(model, tmp_path / "plain.onnx", packed=False).stat().st_size
    packed = _write(model, tmp_path / "packed.onnx", packed=True).stat().st_size
    names = [f"quantizers.{name}_weight.codes" for name in _PACKED]
    saved = sum(model.get_buffer(name).numel() for name in names) * (8 - bits) / 8
    assert 0 <= saved - (plain - packed) <= 2048 * len(_PACKED)


def test_nothing_else_is_stored(tmp_path: Path) -> None:
    """No source lines of the exporter, no shapes of inner values, no zeros twice."""
    path = _write(_deployable(2), tmp_path / "model.onnx", packed=True)
    written = onnx.load(path)
    assert not written.graph.value_info and not written.metadata_props
    assert not any(n.metadata_props or n.doc_string for n in written.graph.node)
    assert b"test_onnx_storage" not in path.read_bytes()
    stored = [
        (t.data_type, tuple(t.dims), onnx.numpy_helper.to_array(t).tobytes())
        for t in written.graph.initializer
    ]
    assert len(set(stored)) == len(stored)


def test_channels_that_were_coarsened(tmp_path: Path) -> None:
    """A normalization with a gamma of nearly 0 leaves codes of no pattern."""
    net = _Net()
    net.norm.weight.data[:5] = torch.tensor([0.0, 1e-4, -1e-5, 1e-6, 1e-9])
    net.norm.bias.data[:5] = 3.0
    model = _deployable(4, net)
    path = _write(model, tmp_path / "model.onnx", packed=True)
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert "ScatterND" in kinds
    plain = _write(model, tmp_path / "plain.onnx", packed=False)
    got, wanted = (_outputs(_session(one))[0] for one in (path, plain))
    assert got.tobytes() == wanted.tobytes()


def test_large_models_have_a_second_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = _deployable(3), tmp_path / "model.onnx"
    size = gdnsq_fx.export(model, path, _X)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    wanted = _outputs(_session(path))[0]
    monkeypatch.setattr(onnx_format, "_LARGEST", 1000)
    assert gdnsq_fx.export(model, path, _X) == pytest.approx(size, rel=0.2)
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert path.stat().st_size < size / 2
    assert _outputs(_session(path))[0].tobytes() == wanted.tobytes()
