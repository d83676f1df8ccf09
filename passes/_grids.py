"""From slots to quantizers: which tensors share one, and where it is called.

A weight has one quantizer, on the tensor that views were taken of (``_weights.py``). An
activation has one, however many read it. In the scope ``full`` it stands where the
tensor is made, all its readers read it from there, and the inputs of a join share one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from gdnsq_fx.channels import PER_TENSOR, ChannelLayout
from gdnsq_fx.effects import writes_in_place
from gdnsq_fx.nested import joined, path_of
from gdnsq_fx.sites import quantizer_behind
from gdnsq_fx.spec import QuantSpec
from gdnsq_fx.stored import storage_root

from ._slots import Slot, is_float_tensor, op_of
from ._weights import base_layout, view_chain, viewed

Key = tuple[Node, int]
"""A producer, and how many in-place writes have changed it: each makes a new value."""


@dataclass(frozen=True)
class Place:
    """One call of a quantizer.

    Attributes:
        producer: what it quantizes.
        slots: the operands that read it.
        everywhere: all readers of the producer are to read the quantized value.
    """

    producer: Node
    slots: tuple[Slot, ...]
    everywhere: bool = False


@dataclass(frozen=True)
class Grid:
    """One quantizer to insert; ``layout`` is None for an activation."""

    name: str
    spec: QuantSpec
    layout: ChannelLayout | None
    places: tuple[Place, ...]


@dataclass
class _Group:
    """Activations that share a grid, while it is being found out."""

    slots: list[Slot] = field(default_factory=list[Slot])
    places: dict[Key, list[Slot]] = field(default_factory=dict[Key, list[Slot]])


def weight_grids(
    owner: GraphModule, slots: Iterable[Slot], weights: set[Node]
) -> list[Grid]:
    """One quantizer for each weight that the slots read."""
    by_base: dict[Node, list[tuple[Slot, ChannelLayout]]] = {}
    for slot in slots:
        if quantizer_behind(owner, slot.producer) is not None:
            continue
        chain = view_chain(slot.producer, weights)
        op = op_of(slot.node)
        layout = PER_TENSOR
        if slot.config.per_channel and op.is_compute:
            layout = op.layout_of(op.bind(slot.node), slot.operand)
        found = base_layout(owner, chain, layout)
        by_base.setdefault(chain[0], []).append((slot, found))
    grids: list[Grid] = []
    for base, readers in by_base.items():
        layouts = {layout for _, layout in readers}
        same = tuple(slot for slot, _ in readers)
        specs = [slot.config.weight_spec() for slot in same]
        grids.append(
            Grid(
                _name_of(base, owner) or same[0].name,
                _widest(specs),
                layouts.pop() if len(layouts) == 1 else PER_TENSOR,
                (Place(base, same),),
            )
        )
    return grids


def activation_grids(
    owner: GraphModule, slots: Iterable[Slot], weights: set[Node], *, full: bool
) -> list[Grid]:
    """The quantizers of the activations that the slots read."""
    finder = _Finder(owner, weights, full)
    for slot in slots:
        finder.add(slot)
    return finder.grids()


class _Finder:
    def __init__(self, owner: GraphModule, weights: set[Node], full: bool) -> None:
        self.owner = owner
        self.weights = weights
        self.full = full
        self.groups: dict[Key, _Group] = {}
        self.met: dict[Node, Key] = {}
        self.joined: dict[Node, Key] = {}
        nodes = owner.graph.nodes
        writes = [n for n in nodes if n.all_input_nodes and writes_in_place(n)]
        self.writes = [(n, storage_root(n.all_input_nodes[0])) for n in writes]

    def add(self, slot: Slot) -> None:
        """Note who reads what, and which tensors meet."""
        if quantizer_behind(self.owner, slot.producer) is not None:
            return
        base = self._base(slot.producer) if self.full else slot.producer
        key = self.joined.get(base)  # side by side on one grid already
        if key is None:
            key = (base, self._writes_before(base, slot.node))
            group = self.groups.setdefault(key, _Group())
            group.places.setdefault(key, [])
            if base is slot.producer:
                group.places[key].append(slot)
        self.groups[key].slots.append(slot)
        op = op_of(slot.node)
        if op.kind in ("join", "concat"):
            self._meet(slot, key)

    def grids(self) -> list[Grid]:
        """One for each group."""
        every = {id(group): group for group in self.groups.values()}.values()
        return [
            Grid(
                min(group.slots, key=lambda slot: slot.node).name,
                _widest([slot.config.act_spec() for slot in group.slots]),
                None,
                tuple(
                    Place(key[0], tuple(slots), self.full and self._is_stable(key[0]))
                    for key, slots in sorted(group.places.items())
                ),
            )
            for group in every
            if group.places
        ]

    def _meet(self, slot: Slot, key: Key) -> None:
        """The operands of a join have one grid; those of a concat lie on it behind."""
        first = self.met.setdefault(slot.node, key)
        self._unite(first, key)
        if op_of(slot.node).kind == "concat" and self._is_stable(slot.node):
            self.joined[slot.node] = first

    def _unite(self, first: Key, second: Key) -> None:
        kept, merged = self.groups[first], self.groups[second]
        if kept is merged:
            return
        kept.slots += merged.slots
        kept.places.update(merged.places)
        for key, group in list(self.groups.items()):
            if group is merged:
                self.groups[key] = kept

    def _base(self, node: Node) -> Node:
        """What a value is a view of, as long as nothing writes into it."""
        base = node
        while (source := viewed(node)) is not None and source not in self.weights:
            if not self._is_stable(source):
                break
            node = source
            base = node if is_float_tensor(node) else base  # a tuple has no grid
        return base

    def _is_stable(self, node: Node) -> bool:
        root = storage_root(node)
        return all(target is not root for _, target in self.writes)

    def _writes_before(self, producer: Node, reader: Node) -> int:
        root = storage_root(producer)
        return sum(write < reader and target is root for write, target in self.writes)


def _widest(specs: list[QuantSpec]) -> QuantSpec:
    """The settings with the larger bit-width: no layer loses what it was promised."""
    return max(specs, key=lambda spec: spec.bits)


def _name_of(base: Node, owner: GraphModule) -> str:
    """Name of a parameter of a layer in the whole model; empty for anything else."""
    if base.op != "get_attr" or "." not in str(base.target):
        return ""
    return joined(path_of(owner), str(base.target))
