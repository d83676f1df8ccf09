"""Where a captured graph and its model part, for the message of the self-check."""

from __future__ import annotations

from collections import defaultdict, deque
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from gdnsq_fx.annotations import source_of
from gdnsq_fx.state import cloned, preserved_state


def first_difference(
    model: nn.Module,
    captured: GraphModule,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    training: bool,
) -> str:
    """``, first at NAME (file.py:line)``; empty where no module shows a difference.

    The outputs of the modules that the graph calls are compared one by one.
    """
    targets = {str(n.target) for n in captured.graph.find_nodes(op="call_module")}
    outputs: defaultdict[str, deque[Tensor]] = defaultdict(deque)
    with preserved_state(model, captured), torch.no_grad(), ExitStack() as stack:
        model.train(training)
        for path, module in model.named_modules():
            if path in targets:
                hook = _keeper(outputs[path])
                stack.enter_context(_removed(module.register_forward_hook(hook)))
        torch.manual_seed(0)
        args, kwargs = cloned(inputs)
        model(*args, **kwargs)
    comparison = _Comparison(captured, outputs)
    with preserved_state(model, captured), torch.no_grad():
        captured.train(training)
        torch.manual_seed(0)
        args, kwargs = cloned(inputs)
        names = list(captured.graph.find_nodes(op="placeholder"))
        values = [*args, *(kwargs[str(n.target)] for n in names[len(args) :])]
        try:
            comparison.run(*values)
        except Exception:  # it fails at the node that was reached last
            comparison.found = comparison.found or comparison.last
    node = comparison.found
    if node is None:
        return ""
    where = source_of(node)
    return f", first at {node.name} ({where})" if where else f", first at {node.name}"


class _Comparison(Interpreter):
    def __init__(self, module: GraphModule, outputs: dict[str, deque[Tensor]]) -> None:
        super().__init__(module)
        self.outputs = outputs
        self.found: Node | None = None
        self.last: Node | None = None

    def run_node(self, n: Node) -> Any:
        self.last = n
        value = super().run_node(n)
        kept = self.outputs.get(str(n.target)) if n.op == "call_module" else None
        if self.found is None and kept and isinstance(value, Tensor):
            wanted = kept.popleft()
            same = wanted.shape == value.shape
            if not same or not torch.allclose(
                wanted, value, 1e-3, 1e-4, equal_nan=True
            ):
                self.found = n
        return value


def _keeper(kept: deque[Tensor]) -> Any:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            kept.append(output.clone())

    return keep


def _removed(handle: Any) -> Any:
    stack = ExitStack()
    stack.callback(handle.remove)
    return stack
