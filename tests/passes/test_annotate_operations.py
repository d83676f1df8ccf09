"""Every call node learns its row of the op table and the name of its layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from gdnsq_fx.annotations import facts
from gdnsq_fx.capture.capture import capture
from gdnsq_fx.opinfo import OpInfo
from gdnsq_fx.optable import DEFAULT_TABLE
from gdnsq_fx.passes import AnnotateOperations

_X = torch.randn(2, 3, 6, 6)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x)) + x


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = _Block()
        self.kernel = nn.Parameter(torch.randn(4, 3, 1, 1))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.block(x))
        x = torch.conv2d(x, self.kernel)
        x = self.head(x.mean((2, 3)))
        return F.linear(x, self.head.weight[:, :2])


def _captured(model: nn.Module, *args: Tensor) -> GraphModule:
    return capture(model, args or (_X,), {})


def _table(module: GraphModule) -> str:
    rows = [(facts(n), n) for n in module.graph.nodes if n.op.startswith("call_")]
    return "\n".join(f"{f.op.name if f.op else '-'} {f.layer}" for f, _ in rows)


def test_operations_and_layer_names_and_the_graph_stays(show) -> None:
    module = _captured(_Net())
    before = show(module)
    result = AnnotateOperations()(module)
    assert show(module) == before and result.modified is False
    assert result.graph_module is module
    assert _table(module) == (
        "conv2d block.conv\nrelu block.relu\nadd block.add\n"
        "conv2d block.conv#2\nrelu block.relu_1\nadd block.add_1\n"
        "conv2d conv2d\nmean mean\nlinear head\npart getitem\nlinear head#2"
    )


def test_second_run_changes_nothing() -> None:
    module = _captured(_Net())
    AnnotateOperations()(module)
    first = [facts(n) for n in module.graph.nodes]
    assert AnnotateOperations()(module).modified is False
    assert [facts(n) for n in module.graph.nodes] == first


def test_computes_what_eager_computes(alone) -> None:
    model = _Net().eval()
    module = alone(AnnotateOperations(), _captured(model)).graph_module
    assert torch.equal(module(_X), model(_X))
    assert facts(next(iter(module.graph.find_nodes(op="call_module")))).op is not None


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(4, 4, 3)
        self.norm = nn.LayerNorm((2, 3))
        self.linear = nn.Linear(3, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.linear(self.norm(self.bilinear(a, b)))


def test_a_layer_with_weights_that_the_table_does_not_know_says_so() -> None:
    module = _captured(_Pair(), torch.randn(2, 4), torch.randn(2, 4))
    AnnotateOperations()(module)
    layers = [facts(n) for n in module.graph.nodes if n.op == "call_module"]
    assert {f.layer: f.skip for f in layers} == {
        "bilinear": None,
        "norm": "LayerNorm is not in the op table",
        "linear": None,
    }


class _Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x


def test_a_users_table() -> None:
    module = _captured(nn.Sequential(_Doubling()))
    AnnotateOperations()(module)
    assert _table(module) == "- 0"
    row = OpInfo("double", ("x",), modules=(_Doubling,))
    AnnotateOperations(DEFAULT_TABLE.with_rows(row))(module)
    assert _table(module) == "double 0"


def test_functional_layer_is_named_after_the_owner_of_its_weight() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.ModuleDict({"fc": nn.Linear(4, 4)})
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = F.linear(x, self.part["fc"].weight, bias=self.part["fc"].bias)
            x = F.linear(input=x, weight=self.part["fc"].weight)
            return F.linear(x, self.weight)

    module = _captured(Net(), torch.randn(2, 4))
    AnnotateOperations()(module)
    assert _table(module) == "linear part.fc\nlinear part.fc#2\nlinear linear_2"
