"""Distillation of values inside the network, by name of their node.

    P = distillation + sum over names of weight * mean((student - teacher)^2)

The teacher must have the same nodes: it is the prepared model at identity precision,
with the weights of the teacher that was given.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from gdnsq_fx.errors import ConfigError
from gdnsq_fx.inputs import Batch
from gdnsq_fx.training.objective import Objective, teacher_for


class Tapped(nn.Module):
    """A graph that notes some of its values on every call.

    Parameters and modules are shared with the model.

    Args:
        model: a prepared model.
        names: of nodes of its graph, as ``print(model.graph)`` shows them.

    Raises:
        ConfigError: there is no such node.
    """

    def __init__(self, model: GraphModule, names: tuple[str, ...]) -> None:
        super().__init__()
        self._names = names
        self._model = model
        self._graph = GraphModule(model, _with_taps(model.graph, names))
        self.features: dict[str, Tensor] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output; its ``features`` are those of this call."""
        self._graph.training = self._model.training
        output, *found = self._graph(*args, **kwargs)
        self.features = dict(zip(self._names, found, strict=True))
        return output


class FeatureObjective:
    """An objective, and the mean squared difference of named values.

    Args:
        base: whose teacher is a copy of the model (see `graph_teacher`).
        qmodel: the model that is trained.
        weights: name of a node -> weight.

    Raises:
        ConfigError: there is no such node, or nothing is distilled.
    """

    def __init__(
        self, base: Objective, qmodel: GraphModule, weights: Mapping[str, float]
    ) -> None:
        if not base.weight:
            raise ConfigError("features are part of distillation, whose weight is 0")
        names = tuple(weights)
        self._student = Tapped(qmodel, names)
        assert isinstance(base.teacher, GraphModule)
        self._teacher = Tapped(base.teacher, names)
        self._base = base
        self._base.teacher = self._teacher
        self._weights = dict(weights)

    @property
    def module(self) -> nn.Module:
        """The model, noting its values: what the loss must be given."""
        return self._student

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Loss of one batch.

        Args:
            model: `module`, or what wraps it.
            batch: inputs, targets.
        """
        loss = self._base(model, batch)
        for name, weight in self._weights.items():
            mine, wanted = self._student.features[name], self._teacher.features[name]
            loss = loss + weight * (mine - wanted).float().square().mean()
        return loss


def graph_teacher(qmodel: GraphModule, teacher: nn.Module | None) -> GraphModule:
    """A copy of the model at identity precision, with the weights of the teacher.

    Raises:
        ConfigError: the teacher has other parameters or buffers than the model.
    """
    copied = teacher_for(qmodel, None)
    assert isinstance(copied, GraphModule)
    if teacher is None or teacher is qmodel:
        return copied
    state = teacher.state_dict()
    own = {k: t for k, t in copied.state_dict().items() if "quantizers." not in k}
    differing = own.keys() ^ {k for k in state if "quantizers." not in k}
    both = own.keys() & state.keys()
    differing |= {key for key in both if own[key].shape != state[key].shape}
    if differing:
        raise ConfigError(
            f"features need a teacher with the parameters of the model, and "
            f"{sorted(differing)[:5]} differ; give the model that was prepared, "
            "without fold_batch_norm, or no teacher"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])
    return copied


def _with_taps(original: Graph, names: tuple[str, ...]) -> Graph:
    graph = copy.deepcopy(original)
    nodes = {node.name: node for node in graph.nodes if node.op != "output"}
    taps: list[Node] = []
    for name in names:
        if name not in nodes:
            near = difflib.get_close_matches(name, nodes, n=5, cutoff=0.3)
            raise ConfigError(
                f"features: the graph has no node {name!r}; similar ones are {near}, "
                "and print(qmodel.graph) shows all"
            )
        with graph.inserting_after(nodes[name]):  # before anything writes into it
            taps.append(graph.call_method("clone", (nodes[name],)))
    (output,) = graph.find_nodes(op="output")
    output.args = ((output.args[0], *taps),)
    return graph
