"""Puts the quantizers of `Grid` objects into a graph."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule, Node

from gdnsq_fx.annotations import annotate, facts, shape_facts
from gdnsq_fx.errors import PassError
from gdnsq_fx.nested import path_of
from gdnsq_fx.quantize.activation_quantizer import ActivationQuantizer
from gdnsq_fx.quantize.quantizer import Quantizer
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer
from gdnsq_fx.stored import stored_value

from ._grids import Grid, Place
from ._slots import op_of
from ._weights import view_chain

CONTAINER = "quantizers"


class Inserter:
    """Puts quantizers into one graph.

    Args:
        owner: the graph module.
        nonnegative: values that are proven to be at least 0.
        weights: see `weight_values`.
        taken: names of edges in the whole model, to which those made here are added.
        device: that of the model.
    """

    def __init__(
        self,
        owner: GraphModule,
        nonnegative: set[Node],
        weights: set[Node],
        taken: set[str],
        device: torch.device,
    ) -> None:
        self.owner = owner
        self.nonnegative = nonnegative
        self.weights = weights
        self.taken = taken
        self.device = device
        self.replaced: list[Node] = []

    def insert(self, grid: Grid) -> None:
        """One module, and a node for each place where it is called."""
        name, number = grid.name, 2
        while name in self.taken:
            name, number = f"{grid.name}'{number}", number + 1
        self.taken.add(name)
        container = _container(self.owner)
        key = name.removeprefix(f"{path_of(self.owner)}.")
        key = key.replace(".", "_").replace("#", "_").replace("'", "_")
        while key in container:
            key += "_"
        container[key] = self._made(name, grid)
        for place in grid.places:
            self._call(place, f"{CONTAINER}.{key}", name, grid.layout is not None)

    def erase_unread(self) -> None:
        """Drop the views of a weight that are taken of its quantizer now."""
        for node in sorted(self.replaced, reverse=True):
            if not node.users:
                self.owner.graph.erase_node(node)

    def _call(self, place: Place, target: str, name: str, is_weight: bool) -> None:
        producer = place.producer
        graph = self.owner.graph
        readers = [slot.node for slot in place.slots]
        kept: set[Node] = set()
        if place.everywhere:
            kept = {user for user in producer.users if facts(user).asked}
            readers = [user for user in producer.users if user not in kept]
        if is_weight:
            readers = list(producer.users)
        # Right before its first reader: an in-place operation may stand in between.
        with graph.inserting_before(min(readers)):
            called = f"{target.rpartition('.')[2]}_q"
            node = graph.create_node("call_module", target, (producer,), {}, called)
        node.meta["nn_module_stack"] = producer.meta.get("nn_module_stack", {})
        annotate(node, **shape_facts(producer), layer=name)
        if place.everywhere:
            producer.replace_all_uses_with(node, lambda user: user not in {*kept, node})
            return
        copies = {producer: node}
        for slot in place.slots:
            value = self._read_through(slot.producer, copies) if is_weight else node
            operand = slot.operand
            op_of(slot.node).with_argument(
                slot.node, operand.argument, value, operand.index
            )

    def _read_through(self, value: Node, copies: dict[Node, Node]) -> Node:
        """The same views of the quantized weight; other readers keep theirs."""
        for node in view_chain(value, self.weights):
            if node in copies:
                continue
            with self.owner.graph.inserting_before(node):
                copies[node] = self.owner.graph.node_copy(
                    node, lambda one: copies.get(one, one)
                )
            self.replaced.append(node)
        return copies[value]

    def _made(self, name: str, grid: Grid) -> Quantizer:
        producers = [place.producer for place in grid.places]
        if grid.layout is None:
            nonnegative = self.nonnegative.issuperset(producers)
            made = ActivationQuantizer(name, grid.spec, nonnegative=nonnegative)
            made.to(self.device)
        else:
            weight = stored_value(self.owner, producers[0]).detach()
            made = WeightQuantizer(name, grid.spec, grid.layout, weight)
        made.train(self.owner.training)
        return made


def _container(owner: GraphModule) -> nn.ModuleDict:
    if not hasattr(owner, CONTAINER):
        owner.add_module(CONTAINER, nn.ModuleDict())
    container = getattr(owner, CONTAINER)
    if not isinstance(container, nn.ModuleDict):
        raise PassError(
            f"the model has an attribute named {CONTAINER!r}, which this library needs "
            "for its quantizers; rename it"
        )
    return container
