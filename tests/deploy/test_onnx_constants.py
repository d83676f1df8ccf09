"""Layers that depend on no input are no layers of integers in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gdnsq_fx


class _Positions(nn.Module):
    """Keys of positions: two layers that depend on the size of the batch alone."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(12, 64))
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.query = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.positions.expand(x.shape[0], -1, -1)
        keys = self.second(self.first(positions).relu())
        return self.query(x) @ keys.transpose(1, 2)


class _Split(nn.Module):
    """A weight whose parts belong to a layer of constants and to one of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(12, 64))
        self.both = nn.Parameter(torch.randn(128, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        of_keys, of_queries = self.both.chunk(2)
        keys = nn.functional.linear(self.positions, of_keys)
        return nn.functional.linear(x, of_queries) @ keys.t()


def test_a_weight_of_both_kinds_of_layers(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    x = torch.randn(2, 5, 64)
    qmodel = gdnsq_fx.prepare(_Split().eval(), x, calibration=[x])
    imodel = gdnsq_fx.convert(qmodel, deployable=True)
    path = tmp_path / "model.onnx"
    gdnsq_fx.export(imodel, path, x, dynamic_batch=False)
    found = gdnsq_fx.verify(imodel, path, [x], runtimes=["onnxruntime"], progress=False)
    assert found.ok, found
    # The layer of the input reads its part as codes still.
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("DequantizeLinear") >= 3, kinds


def test_layers_of_positions(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    x = torch.randn(2, 5, 64)
    qmodel = gdnsq_fx.prepare(_Positions().eval(), x, calibration=[x])
    imodel = gdnsq_fx.convert(qmodel, deployable=True)
    path, loaded = tmp_path / "model.onnx", tmp_path / "loaded.onnx"
    gdnsq_fx.export(imodel, path, x, dynamic_batch=False)
    # This runtime alone takes layers of constants for layers of weights alone.
    found = gdnsq_fx.verify(imodel, path, [x], runtimes=["onnxruntime"], progress=False)
    assert found.ok, found
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(loaded)
    runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kernels = [node.op_type for node in onnx.load(loaded).graph.node]
    assert "MatMulIntegerToFloat" in kernels  # of a query and the constant keys
    assert "MatMulNBits" not in kernels


def test_what_an_optimizer_drops_is_written_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's does with the bounds of equal clamps (Gemma 4 of timm)."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export, asked = torch.onnx.export, []

    def dropping(*args: Any, optimize: bool, **options: Any) -> Any:
        asked.append(optimize)
        found = export(*args, optimize=optimize, **options)
        if optimize:
            found.model.graph.initializers.popitem()
        return found

    monkeypatch.setattr(torch.onnx, "export", dropping)
    x = torch.randn(2, 6)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    qmodel = gdnsq_fx.prepare(model.eval(), x, calibration=[x])
    imodel = gdnsq_fx.convert(qmodel, deployable=True)
    path = tmp_path / "model.onnx"
    gdnsq_fx.export(imodel, path, x)
    assert asked == [True, False]
    assert gdnsq_fx.verify(
        imodel, path, [x], runtimes=["onnxruntime"], progress=False
    ).ok


class _Table(nn.Module):
    """A network of stored coordinates, whose results are added (Swin v2)."""

    def __init__(self) -> None:
        super().__init__()
        self.coordinates = nn.Buffer(torch.randn(16, 2))
        self.network = nn.Sequential(
            nn.Linear(2, 24), nn.Dropout(0.1), nn.ReLU(), nn.Linear(24, 5)
        )
        self.fc = nn.Linear(5, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) @ self.network(self.coordinates)


def test_a_network_of_a_stored_table(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    x = torch.randn(4, 5)
    qmodel = gdnsq_fx.prepare(_Table().eval(), x, calibration=[x])
    imodel = gdnsq_fx.convert(qmodel, deployable=True)
    path = tmp_path / "model.onnx"
    gdnsq_fx.export(imodel, path, x)
    found = gdnsq_fx.verify(imodel, path, [x], runtimes=["onnxruntime"], progress=False)
    assert found.ok, found
