"""Products with batches of weights run in integers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gdnsq_fx


class _Blocks(nn.Module):
    """Blocks of a diagonal as a batch of weights; one stored with its rows last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 6, 8))
        self.bias = nn.Parameter(torch.randn(4, 1, 8))
        self.second = nn.Parameter(torch.randn(4, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.baddbmm(self.bias, x.permute(1, 0, 2), self.first).relu()
        return (x @ self.second.transpose(1, 2)).permute(1, 0, 2)


def test_batches_of_weights(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    x = torch.randn(7, 4, 6)
    qmodel = gdnsq_fx.prepare(_Blocks().eval(), x, calibration=[x])
    imodel = gdnsq_fx.convert(qmodel, deployable=True)
    path = tmp_path / "model.onnx"
    gdnsq_fx.export(imodel, path, x)
    runtimes = ["onnxruntime", "openvino"]
    found = gdnsq_fx.verify(imodel, path, [x], runtimes=runtimes, progress=False)
    assert found.ok, found
