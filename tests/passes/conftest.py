"""What the tests of the passes share: a printed graph, and other people's passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager
from torch.fx.passes.shape_prop import ShapeProp

from gdnsq_fx.capture.capture import capture
from gdnsq_fx.inputs import InputStructure
from gdnsq_fx.passes import (
    AnnotateOperations,
    Calibrate,
    ExposeWeights,
    InsertQuantizers,
    PropagateShapes,
    run_passes,
)
from gdnsq_fx.spec import QuantConfig


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other take most of the time
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def show() -> Callable[[GraphModule], str]:
    """Print a graph independently of node names and of the order of unrelated nodes.

    Nodes are numbered from the output backwards, inputs of a node first; nodes that
    nobody reads come last.
    """
    return _show


@pytest.fixture
def exposed() -> Callable[..., GraphModule]:
    """Capture a model and expose its weights."""
    return _exposed


@pytest.fixture
def calibrated() -> Callable[..., GraphModule]:
    """``calibrated(model, x, **settings)``: with quantizers, placed on ``x``."""
    return _calibrated


@pytest.fixture
def alone() -> Callable[..., PassResult]:
    """Run one pass in torch's own manager."""
    return lambda one, module: PassManager(passes=[one])(module)


@pytest.fixture
def shape_prop() -> Callable[..., Callable[[GraphModule], PassResult]]:
    """Torch's ShapeProp as a pass for its manager."""
    return _shape_prop


def _exposed(model: nn.Module, *args: Any) -> GraphModule:
    captured = capture(model, args, {})
    return run_passes(captured, (AnnotateOperations(), ExposeWeights()))


def _calibrated(model: nn.Module, x: Tensor, **settings: Any) -> GraphModule:
    config = QuantConfig(**{"first_last": None, **settings})
    steps = (PropagateShapes((x,)), InsertQuantizers(config))
    calibrate = Calibrate([x], InputStructure.of(x))
    return run_passes(_exposed(model, x), (*steps, calibrate))


def _shape_prop(*args: Any) -> Callable[[GraphModule], PassResult]:
    def run(module: GraphModule) -> PassResult:
        ShapeProp(module).propagate(*args)
        return PassResult(module, False)

    return run


def _show(module: GraphModule) -> str:
    numbers: dict[Node, int] = {}
    nodes = list(module.graph.nodes)
    for node in [nodes[-1], *nodes]:
        _number(node, numbers)
    return "\n".join(_line(node, numbers) for node in numbers)


def _number(node: Node, numbers: dict[Node, int]) -> None:
    if node in numbers:
        return
    for producer in node.all_input_nodes:
        _number(producer, numbers)
    numbers[node] = len(numbers)


def _line(node: Node, numbers: dict[Node, int]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, Node):
            return f"%{numbers[value]}"
        if isinstance(value, list | tuple):
            return "[" + ", ".join(text(item) for item in value) + "]"
        return repr(value)

    if node.op == "output":
        return f"return {text(node.args[0])}"
    target = getattr(node.target, "__name__", str(node.target))
    if node.op in ("placeholder", "get_attr"):
        return f"%{numbers[node]} = {target}"
    values = [*map(text, node.args)]
    values += [f"{name}={text(value)}" for name, value in node.kwargs.items()]
    dot = {"call_module": "self.", "call_method": "."}.get(node.op, "")
    return f"%{numbers[node]} = {dot}{target}({', '.join(values)})"
