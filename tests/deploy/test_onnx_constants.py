"""Layers that depend on no input are no layers of integers in a file."""

from __future__ import annotations

from pathlib import Path

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
