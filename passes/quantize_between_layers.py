"""QuantizeBetweenLayers: what layers hand to each other lies on eight bits.

    %relu = relu(%add);  %conv_input_q = quantizers.conv_input(%relu)  # of 4 bits, say
    %add_1 = add(%bn, %relu)
      ->
    %add_1_other_q = quantizers.add_1_other(%relu)
    %conv_input_q = quantizers.conv_input(%add_1_other_q)
    %add_1_input_q = quantizers.add_1_input(%bn)
    %add_1 = add(%add_1_input_q, %add_1_other_q)

Integer kernels of a runtime write integers: a convolution whose output is read in
floating point runs in floating point. Hence a grid on whatever sums, concatenations and
smooth functions read, and on what sums and concatenations write, except for averages.
Unlike those of the scope ``full``, each tensor has a grid of its own, for runtimes have
kernels that add at two scales, and a quantizer that is there already serves where it
has as many bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from gdnsq_fx.annotations import KEY, facts, model_facts
from gdnsq_fx.effects import writes_in_place
from gdnsq_fx.errors import PassError
from gdnsq_fx.inputs import model_device
from gdnsq_fx.nested import joined, path_of
from gdnsq_fx.patterns import any_matches
from gdnsq_fx.quantize.activation_quantizer import ActivationQuantizer
from gdnsq_fx.quantize.quantizer import Quantizer
from gdnsq_fx.sites import (
    activation_sites,
    bit_width,
    quantizer_behind,
    require_quantizers,
)
from gdnsq_fx.spec import QuantConfig, QuantSpec
from gdnsq_fx.stored import storage_root, weight_values

from ._base import Pass, rewrite_each
from ._grids import Grid, Key, Place
from ._inserter import Inserter
from ._signs import nonnegative_values
from ._slots import GRIDDED, Slot, is_float_tensor, op_of, value_slots

_BITS = 8
_MEETING = ("join", "concat")
# Small, and no kernel before them needs their grid; OpenVINO 2026.4 reads beyond memory
# where one of them gets integers.
_AVERAGES = ("avg_pool", "mean")


@dataclass(frozen=True, eq=False)
class QuantizeBetweenLayers(Pass):
    """Insert the quantizers; place their levels with ``Calibrate(..., added=True)``.

    Layers that the configuration excludes stay as they are, and so do outputs of the
    model. Does nothing where it was done before.

    Attributes:
        shared: paths of quantizers that other operations are to read from as well;
            None: those that have eight bits or more. `ModelFacts` notes them, so that a
            file can name them.
    """

    shared: tuple[str, ...] | None = None

    def requires(self, graph_module: GraphModule) -> None:
        """A prepared model."""
        model_facts(graph_module)
        require_quantizers(graph_module, self.name)
        if not any(facts(n).shape is not None for n in graph_module.graph.nodes):
            raise PassError(
                f"{self.name} needs to know which values are tensors; run "
                "PropagateShapes first"
            )

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Insert what is missing in the graph and in those inside."""
        known = model_facts(graph_module)
        if known.between is not None:
            return False
        wide = _wide(graph_module) if self.shared is None else set(self.shared)
        taken = {m.edge for m in graph_module.modules() if isinstance(m, Quantizer)}
        device = model_device(graph_module) or torch.device("cpu")
        used: set[str] = set()

        def fill(one: GraphModule) -> bool:
            weights = weight_values(one)
            inserter = Inserter(one, nonnegative_values(one), weights, taken, device)
            filler = _Filler(inserter, known.config, wide)
            changed = filler.fill()
            used.update(filler.used)
            return changed

        modified = rewrite_each(graph_module, fill)
        if modified:
            graph_module.meta[KEY] = replace(known, between=tuple(sorted(used)))
        return modified


def _wide(graph_module: GraphModule) -> set[str]:
    sites = activation_sites(graph_module)
    return {s.path for s in sites if bit_width(s.quantizer.levels()) >= _BITS}


class _Filler:
    """One graph; ``used`` collects the quantizers that others read from now."""

    def __init__(self, inserter: Inserter, config: QuantConfig, wide: set[str]) -> None:
        self.inserter = inserter
        self.owner = inserter.owner
        self.config = config
        self.wide = wide
        self.used: set[str] = set()
        nodes = self.owner.graph.nodes
        writes = [n for n in nodes if n.all_input_nodes and writes_in_place(n)]
        self.writes = [(n, storage_root(n.all_input_nodes[0])) for n in writes]

    def fill(self) -> bool:
        """Insert; whether anything changed."""
        wanted: dict[Key, list[Slot]] = {}
        for node in self.owner.graph.nodes:
            self._note(node, wanted)
        done = [self._give_grid(key, slots) for key, slots in wanted.items()]
        return any(done)

    def _note(self, node: Node, wanted: dict[Key, list[Slot]]) -> None:
        """What a node reads, and what it writes where tensors meet."""
        op = facts(node).op
        if op is None or op.kind not in GRIDDED or op.name in _AVERAGES:
            return
        if any_matches(self.config.exclude, facts(node).layer, op.name):
            return
        slots = value_slots(node, self.config, self.inserter.weights)
        for slot in slots:
            if quantizer_behind(self.owner, slot.producer) is None:
                key = (slot.producer, self._writes_between(slot.producer, node))
                wanted.setdefault(key, []).append(slot)
        end = _end(node)
        if slots and op.kind in _MEETING and self._lacks_grid(end):
            wanted.setdefault((end, 0), [])

    def _lacks_grid(self, value: Node) -> bool:
        """Whether some reader would make the kernel before it write floating point."""
        if not is_float_tensor(value) or quantizer_behind(self.owner, value):
            return False
        if all(_averages(user) for user in value.users):
            return False
        read_by = [self._quantizer(user) for user in value.users]
        return read_by.count(None) > 0 or len(read_by) > 1

    def _give_grid(self, key: Key, slots: list[Slot]) -> bool:
        """Let all readers, or those that ask, read one quantized value."""
        producer, version = key
        everywhere = self._is_settled(producer)
        if not everywhere and not slots:
            return False
        for user in producer.users:
            path = joined(path_of(self.owner), str(user.target))
            same = self._writes_between(producer, user) == version
            if self._quantizer(user) is not None and same and path in self.wide:
                self.used.add(path)
                return _share(producer, user, slots, everywhere)
        name = slots[0].name if slots else f"{facts(producer).layer}.output"
        spec = QuantSpec(_BITS, self.config.estimator, "integer")
        place = Place(producer, tuple(slots), everywhere)
        self.inserter.insert(Grid(name, spec, None, (place,)))
        return True

    def _quantizer(self, node: Node) -> ActivationQuantizer | None:
        if node.op != "call_module":
            return None
        found = self.owner.get_submodule(str(node.target))
        return found if isinstance(found, ActivationQuantizer) else None

    def _is_settled(self, producer: Node) -> bool:
        """Whether all readers see the same value, and none is the model's output."""
        root = storage_root(producer)
        written = any(w > producer and target is root for w, target in self.writes)
        return not written and all(user.op != "output" for user in producer.users)

    def _writes_between(self, producer: Node, reader: Node) -> int:
        root = storage_root(producer)
        return sum(
            producer < write < reader and target is root
            for write, target in self.writes
        )


def _averages(node: Node) -> bool:
    op = facts(node).op
    return op is not None and op.name in _AVERAGES


def _end(node: Node) -> Node:
    """Where the grid of an output belongs: behind a ReLU or view that alone reads it.

    They commute with rounding, and kernels absorb them.
    """
    while len(node.users) == 1:
        (user,) = node.users
        op = facts(user).op
        if op is None or op.kind not in ("plain", "view") or op.is_compute:
            break
        if op.sign == "any" or not is_float_tensor(user):
            break
        node = user
    return node


def _share(
    producer: Node, quantized: Node, slots: Iterable[Slot], everywhere: bool
) -> bool:
    """Let others read from a quantizer that is there; whether any does now."""
    if everywhere:
        if len(producer.users) == 1:
            return False
        producer.append(quantized)
        producer.replace_all_uses_with(quantized, lambda user: user is not quantized)
        return True
    for slot in slots:
        operand = slot.operand
        op_of(slot.node).with_argument(
            slot.node, operand.argument, quantized, operand.index
        )
    return True
