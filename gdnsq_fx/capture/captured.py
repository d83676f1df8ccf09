"""A GraphModule that keeps every parameter, buffer and module of its model."""

# The registries of a module have no public way to be handed over whole.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule

from gdnsq_fx.capture.pickled import PickledByNodes
from gdnsq_fx.capture.specialized import Specialization
from gdnsq_fx.state import preserved_modes

_KEY = "gdnsq_fx.capture"
_REGISTRIES = ("_modules", "_parameters", "_buffers")


@dataclass(frozen=True)
class CaptureFacts:
    """What was learnt while a model was captured.

    Attributes:
        specialized: what the graph keeps as it was on the example.
        opaque: path of a module that could not be looked into -> why; those inside
            others as well.
        real: the model reads data, so that it ran on real values.
        modes: for each mode that ``train(mode)`` of the model sets, the modules that
            it leaves in the other one, by path.
        left: path of a module inside an opaque one that has weights and no graph of its
            own -> why.
    """

    specialized: tuple[Specialization, ...] = ()
    opaque: Mapping[str, str] = field(default_factory=dict[str, str])
    real: bool = False
    modes: Mapping[bool, tuple[str, ...]] = field(
        default_factory=dict[bool, tuple[str, ...]]
    )
    left: Mapping[str, str] = field(default_factory=dict[str, str])


class CapturedModule(PickledByNodes):
    """`torch.fx.GraphModule` over the model's own module tree.

    Torch's class copies only what the graph refers to, at construction and again at
    every deep copy, so that ``state_dict()`` would lose keys. This one keeps the whole
    tree: an original checkpoint loads, and fine-tuned weights load back.
    """

    kept_meta = (_KEY,)

    def __init__(self, root: nn.Module, graph: Graph, class_name: str = "") -> None:
        super().__init__(root, graph, class_name or type(root).__name__)
        _adopt(self, root)

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        twin: CapturedModule = super().__deepcopy__(memo)  # type: ignore[assignment]
        # The memo already holds a copy of every child; this only fetches them.
        tree = nn.Module()
        for kind in _REGISTRIES:
            setattr(tree, kind, copy.deepcopy(getattr(self, kind), memo))
        tree._non_persistent_buffers_set = self._non_persistent_buffers_set
        tree.training = self.training
        _adopt(twin, tree)
        return twin

    @property
    def facts(self) -> CaptureFacts:
        """What was learnt on the way; kept in ``meta``, which copies keep."""
        return capture_facts(self)

    @facts.setter
    def facts(self, facts: CaptureFacts) -> None:
        self.meta[_KEY] = facts

    def train(self, mode: bool = True) -> CapturedModule:
        """As ``train`` of the model, which may hold some modules in evaluation."""
        super().train(mode)
        for path in self.facts.modes.get(mode, ()):
            self.get_submodule(path).training = not mode
        return self


def capture_facts(graph_module: GraphModule) -> CaptureFacts:
    """What was learnt when a model was captured, also of one that was converted."""
    found = graph_module.meta.get(_KEY)
    return found if isinstance(found, CaptureFacts) else CaptureFacts()


def mode_exceptions(model: nn.Module) -> dict[bool, tuple[str, ...]]:
    """Which modules ``train(mode)`` of a model leaves in the other mode."""
    found: dict[bool, tuple[str, ...]] = {}
    with preserved_modes(model):
        for mode in (True, False):
            model.train(mode)
            paths = (p for p, m in model.named_modules() if p and m.training != mode)
            found[mode] = tuple(paths)
    return {mode: paths for mode, paths in found.items() if paths}


def _adopt(graph_module: GraphModule, root: nn.Module) -> None:
    """Give a graph module all that a model registers, in the model's order.

    What only the graph has (constants that tracing met) follows as non-persistent
    buffers, so that ``state_dict()`` has the model's keys and no other.
    """
    constants = set(graph_module._buffers) - set(root._buffers)
    for kind in _REGISTRIES:
        mine, theirs = getattr(graph_module, kind), getattr(root, kind)
        rest = {name: value for name, value in mine.items() if name not in theirs}
        mine.clear()
        mine.update(theirs)
        mine.update(rest)
    hidden = set(root._non_persistent_buffers_set) | constants
    graph_module._non_persistent_buffers_set = hidden
    graph_module.training = root.training
