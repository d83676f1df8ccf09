"""What a model returns is not rounded by who else reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gdnsq_fx


class _Similarity(nn.Module):
    """Returns what its product reads, as CLIP does, and its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 32), nn.Linear(16, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left, right = self.left(x), self.right(x)
        left = left / left.norm(dim=-1, keepdim=True)
        right = right / right.norm(dim=-1, keepdim=True)
        return left @ right.t(), right, x


def test_outputs_that_a_product_reads(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    x = torch.randn(40, 16)
    qmodel = gdnsq_fx.prepare(_Similarity().eval(), x, calibration=[x])
    imodel = gdnsq_fx.convert(qmodel, deployable=True)
    path = tmp_path / "model.onnx"
    gdnsq_fx.export(imodel, path, x, dynamic_batch=False)
    found = gdnsq_fx.verify(imodel, path, [x], runtimes=["onnxruntime"], progress=False)
    assert found.ok, found
    graph = onnx.load(path).graph
    readers = {name for node in graph.node for name in node.input}
    given = {value.name for value in graph.input}
    assert not readers & {value.name for value in graph.output} - given
