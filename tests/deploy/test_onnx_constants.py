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
