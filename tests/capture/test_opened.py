"""What is opened and what stays whole; graph modules, operations of torchvision."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from gdnsq_fx.annotations import facts
from gdnsq_fx.capture.capture import capture
from gdnsq_fx.passes import AnnotateOperations, run_passes

_X, _LARGE = torch.randn(3, 4), torch.randn(5, 4)


class _Scores(nn.Module):
    """Neither children nor parameters, and most of the arithmetic."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.matmul(q, k.transpose(-2, -1)).softmax(-1)


class _Noise(nn.Module):
    """Behaves as dropout does."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape) < 0.5) if self.training else x


class _Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scores, self.noise = nn.Linear(4, 4), _Scores(), _Noise()

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(self.scores(self.fc(x), x))


def test_arithmetic_in_a_bare_module_is_visible(same: Any, operations: Any) -> None:
    called = operations(same(_Attends(), _X, others=((_LARGE,),)))
    assert "matmul" in called and "_Scores" not in called


def test_a_bare_module_that_reads_training_stays_whole(operations: Any) -> None:
    for training in (False, True):
        captured = capture(_Attends().train(training), (_X,), {})
        assert "_Noise" in operations(captured)


def test_a_scripted_child_stays_whole_with_a_reason(same: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    captured = same(nn.Sequential(nn.Linear(4, 4), child), _X, others=((_LARGE,),))
    (node,) = captured.graph.find_nodes(op="call_module", target="1")
    run_passes(captured, (AnnotateOperations(),))
    assert facts(node).skip


def test_a_graph_module_as_the_model(same: Any) -> None:
    model = symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()))
    captured = same(model, _X, others=((_LARGE,),))
    assert isinstance(captured, GraphModule) and captured.graph is not model.graph
    again = same(captured, _X, others=((_LARGE,),))
    assert len(again.graph.nodes) == len(captured.graph.nodes)


def test_a_graph_module_within_a_model(same: Any, operations: Any) -> None:
    inner = symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    captured = same(nn.Sequential(inner, nn.Linear(4, 2)), _X, others=((_LARGE,),))
    assert operations(captured).count("Linear") == 2


# --- operations of torchvision ----------------------------------------------------


def test_regions_are_aligned(same: Any) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: Tensor, boxes: list[Tensor]) -> Tensor:
            return torchvision.ops.roi_align(self.conv(x), boxes, output_size=2)

    box = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    two = [box, torch.cat([box, box + 1.0])]
    same(Heads(), torch.randn(2, 2, 8, 8), two)


@pytest.mark.parametrize("function", [torchvision.ops.nms, torch.ops.torchvision.nms])
def test_boxes_are_suppressed(function: Callable[..., Tensor], same: Any) -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, boxes: Tensor, scores: Tensor) -> Tensor:
            kept = function(boxes, scores, 0.5)
            return self.fc(boxes[kept])

    corner = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.1, 0.0, 4.0, 4.0], [5, 5, 7, 7.0]])
    others = ((corner.repeat(2, 1) + torch.arange(6)[:, None], torch.rand(6)),)
    same(Keeps(), corner, torch.rand(3), others=others)
