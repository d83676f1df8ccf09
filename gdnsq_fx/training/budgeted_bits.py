"""What bits under a budget for the whole model have in common, however they are found.

Some time in the run each edge gets its final whole bits; from then on `Constraint` ends
the run as it ends any other. Until then the gradient of the loss with respect to each
capacity says what the bits of that edge are worth (`Sensitivity`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from gdnsq_fx.analysis.allocation import Divergences, best_allocation
from gdnsq_fx.analysis.cost_model import CostModel
from gdnsq_fx.annotations import facts
from gdnsq_fx.budget import Budget
from gdnsq_fx.errors import BudgetError
from gdnsq_fx.sites import WeightSite, assign_targets, hard_bits, sites
from gdnsq_fx.training.constraint import Cap, Constraint
from gdnsq_fx.training.edges import Edge, mean_capacities, slope
from gdnsq_fx.training.process_group import ProcessGroup
from gdnsq_fx.training.schedule import Schedule
from gdnsq_fx.training.sensitivity import Sensitivity

WIDTHS = tuple(range(1, 9))
# Of the loss that errors of a weight cost before training. Weights learn to live with
# their levels, activations cannot: ResNet-20 at the bit operations of W3A3, 200 steps,
# one seed, ends at 85.1 % with 1, at 86.2 % with 0.2, at 85.1 % with 0.05 (uniform bits
# at 86.0 %).
LEFT_BY_TRAINING = 0.2
# Of its divergence, what the next bit of an edge saves at least: noise of predictions,
# by which more bits may seem to cost more, must not leave a part of the budget unspent.
LEAST_SAVED = 1e-3
# A slope is remembered for this share of the descent.
MEMORY = 0.25


class BudgetedBits(ABC):
    """The constraint of a global budget; what `Constraint` is to fixed targets.

    Args:
        graph_module: a prepared model; quantizers and their targets change in place.
        budget: what must not be exceeded in the end.
        schedule: its descent says until when bits are sought.
        group: processes that train the model, for which the main one decides.

    Attributes:
        is_final: targets do not change any more.

    Raises:
        BudgetError: no whole bits meet the budget; the model is left as it was.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        budget: Budget,
        schedule: Schedule,
        group: ProcessGroup | None = None,
    ) -> None:
        self.is_final = False
        self._graph_module = graph_module
        self._group = group or ProcessGroup()
        self._budget = budget
        self._model = CostModel.of(graph_module)
        by_name = {site.edge: site for site in sites(graph_module)}
        self._edges: list[Edge] = [by_name[name] for name in self._model.edges]
        self._fixed = Constraint(graph_module)
        self._before = self._fixed.targets
        memory = MEMORY * schedule.descent_steps
        self._sensitivity = Sensitivity(len(self._edges), memory)

    @property
    def targets(self) -> dict[str, int]:
        """Target bit-width of every edge, final or not."""
        return self._fixed.targets

    def observe_loss(self, loss: Tensor) -> None:
        """As `Constraint.observe_loss`."""
        self._fixed.observe_loss(loss)

    def penalty(self, growth: float) -> Tensor:
        """As `Constraint.penalty`."""
        return self._fixed.penalty(growth)

    @torch.no_grad()
    def observe_gradients(self) -> None:
        """Learn what bits are worth from the gradients of the loss alone; call after
        its backward, before that of the penalty, which may exceed it by far."""
        if not self.is_final:
            slopes = torch.stack([slope(edge) for edge in self._edges])
            self._sensitivity.observe(slopes, mean_capacities(self._edges))

    def align_gradients(self, cap: Cap) -> None:
        """As `Constraint.align_gradients`."""
        self._fixed.align_gradients(cap)

    @abstractmethod
    def project(self, cap: Cap) -> None:
        """Lower capacities to what is allowed by now; settle the bits where due.

        Args:
            cap: target -> bits that an edge with this target may have by now.
        """

    @abstractmethod
    def open_to(self, bits: float) -> None:
        """Start over at ``bits`` everywhere, or at the plan where that has more."""

    def undo(self) -> None:
        """Give every edge the target back that it had before."""
        assign_targets(self._graph_module, self._before)

    def mean_capacity(self) -> float:
        """As `Constraint.mean_capacity`."""
        return self._fixed.mean_capacity()

    def violations(self) -> dict[str, tuple[int, int]]:
        """As `Constraint.violations`."""
        return self._fixed.violations()

    def state(self) -> dict[str, Tensor]:
        """What the steps to come depend on, beside the model; as copies."""
        return {
            **self._sensitivity.state(),
            "targets": self._stored(self.targets),
            "is_final": torch.tensor(self.is_final),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        self._sensitivity.load_state(state)
        assign_targets(self._graph_module, self._restored(state["targets"]))
        self.is_final = bool(state["is_final"])

    def _stored(self, bits: Mapping[str, int]) -> Tensor:
        return torch.tensor([bits[name] for name in self._model.edges])

    def _restored(self, stored: Tensor) -> dict[str, int]:
        return dict(zip(self._model.edges, stored.tolist(), strict=True))

    def _best(self, divergences: Divergences) -> dict[str, int]:
        """Whole bits within every bound, at the least loss."""
        return self._group.on_main(
            lambda: dict(best_allocation(divergences, self._model, self._budget).bits)
        )

    def _learned(self) -> Divergences:
        """What each edge would cost at each width by the gradients so far."""
        return falling(self._model.edges, self._sensitivity.values())


def falling(edges: tuple[str, ...], levels: Tensor) -> Divergences:
    """Divergences ``a_e 4^-b``, as of evenly spaced levels."""
    return {
        name: {bits: level * 4.0**-bits for bits in WIDTHS}
        for name, level in zip(edges, levels.tolist(), strict=True)
    }


def divergences_tensor(divergences: Divergences, edges: Sequence[str]) -> Tensor:
    """As one tensor ``[edges, len(WIDTHS)]``, float64: exact."""
    rows = [[divergences[name][bits] for bits in WIDTHS] for name in edges]
    return torch.tensor(rows, dtype=torch.float64)


def divergences_of(stored: Tensor, edges: Sequence[str]) -> Divergences:
    """What `divergences_tensor` was made of."""
    return {
        name: dict(zip(WIDTHS, row, strict=True))
        for name, row in zip(edges, stored.tolist(), strict=True)
    }


def costs_within(graph_module: GraphModule, budget: Budget) -> dict[str, float]:
    """The costs of a model by its hard bits, names as in `Budget`.

    Raises:
        BudgetError: they exceed the budget.
    """
    costs = CostModel.of(graph_module).costs(hard_bits(graph_module))
    above = {name: costs[name] for name, b in budget.bounds.items() if costs[name] > b}
    if above:
        raise BudgetError(f"costs above the budget {budget.bounds}: {above}")
    return costs


def predicted_divergences(graph_module: GraphModule) -> Divergences | None:
    """What the last analysis predicted, as far as training is likely to leave it.

    None where it did not predict every width in `WIDTHS`.
    """
    found: dict[str, Mapping[int, float]] = {}
    for site in sites(graph_module):
        edge = facts(site.node).edge
        found[site.edge] = {} if edge is None else edge.divergence_at
    if any(not set(WIDTHS) <= set(at) for at in found.values()):
        return None
    return left_by_training(graph_module, found)


def left_by_training(
    graph_module: GraphModule, divergences: Divergences
) -> dict[str, dict[int, float]]:
    """What training is likely to leave of predictions, falling with every bit."""
    left: dict[str, dict[int, float]] = {}
    for site in sites(graph_module):
        share = LEFT_BY_TRAINING if isinstance(site, WeightSite) else 1.0
        costs: dict[int, float] = {}
        most = math.inf
        for bits in WIDTHS:
            costs[bits] = min(share * divergences[site.edge][bits], most)
            most = (1.0 - LEAST_SAVED) * costs[bits]
        left[site.edge] = costs
    return left
