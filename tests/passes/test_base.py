"""What every pass promises: checks around the work, and an honest result."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from torch.fx.passes.infra.pass_base import PassBase
from torch.fx.passes.infra.pass_manager import PassManager

import gdnsq_fx.passes
from gdnsq_fx.errors import PassError
from gdnsq_fx.passes import Pass


class _Net(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + 1.0


@dataclasses.dataclass(frozen=True)
class _Negate(Pass):
    """Put a minus before the output, once; notes when it is asked what."""

    log: tuple[list[str], ...] = ([],)

    def _note(self, moment: str, module: GraphModule) -> None:
        last = list(module.graph.nodes)[-1].args[0].name
        self.log[0].append(f"{moment} {last}")

    def requires(self, graph_module: GraphModule) -> None:
        self._note("requires", graph_module)

    def ensures(self, graph_module: GraphModule) -> None:
        self._note("ensures", graph_module)

    def rewrite(self, graph_module: GraphModule) -> bool:
        output = list(graph_module.graph.nodes)[-1]
        value = output.args[0]
        if value.name == "neg":
            return False
        with graph_module.graph.inserting_before(output):
            output.args = (graph_module.graph.call_function(torch.neg, (value,)),)
        return True


@dataclasses.dataclass(frozen=True)
class _Breaks(Pass):
    """Leave a graph whose nodes are out of order."""

    def rewrite(self, graph_module: GraphModule) -> bool:
        first, *_, output = graph_module.graph.nodes
        output.append(first)
        return True


def test_requires_sees_the_input_and_ensures_the_result() -> None:
    log: list[str] = []
    _Negate((log,))(symbolic_trace(_Net()))
    assert log == ["requires add", "ensures neg"]
    log.clear()
    PassManager(passes=[_Negate((log,))])(symbolic_trace(_Net()))
    assert log == ["requires add", "ensures neg"]


def test_modified_is_honest_and_the_code_is_compiled_again() -> None:
    module, x = symbolic_trace(_Net()), torch.randn(3)
    wanted = -_Net()(x)
    result = _Negate()(module)
    assert result.modified is True and torch.equal(module(x), wanted)
    result = _Negate()(module)
    assert result.modified is False and torch.equal(module(x), wanted)


def test_a_result_is_linted() -> None:
    with pytest.raises(RuntimeError, match="before it has been defined"):
        _Breaks()(symbolic_trace(_Net()))


def test_a_refusal_leaves_the_graph_alone() -> None:
    @dataclasses.dataclass(frozen=True)
    class Refuses(_Negate):
        def requires(self, graph_module: GraphModule) -> None:
            raise PassError("not today")

    module = symbolic_trace(_Net())
    before = str(module.graph)
    with pytest.raises(PassError, match="not today"):
        Refuses()(module)
    assert str(module.graph) == before


def _passes() -> list[Any]:
    exported = [getattr(gdnsq_fx.passes, name) for name in gdnsq_fx.passes.__all__]
    classes = [e for e in exported if isinstance(e, type) and e is not Pass]
    assert len(classes) == 15
    return classes


@pytest.mark.parametrize("cls", _passes())
def test_every_pass_is_a_frozen_dataclass_of_torchs_kind(cls: Any) -> None:
    assert issubclass(cls, Pass) and issubclass(cls, PassBase)
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert cls.__doc__ and ("Attributes" in cls.__doc__) == bool(
        dataclasses.fields(cls)
    )
    assert cls.__module__.rpartition(".")[2].replace("_", "") == cls.__name__.lower()
