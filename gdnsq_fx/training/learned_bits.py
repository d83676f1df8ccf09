"""A budget for the whole model: each edge learns how many of its bits are worth it.

    cost  start ---.___
                       ``--.__|__ budget ----------------- budget
          |<- bits learned ->|<--- whole bits: hold, anneal --->|

While bits are learned, the gradient of the loss with respect to each capacity says what
the bits of that edge are worth (`Sensitivity`). The exterior-point penalty

    P = C t (sum_k relu(cost_k / bound_k - 1 + eps) + mean_e relu(cap_e - T_e + eps))

over the bounds on totals and the ceilings T presses on capacities by what they cost. A
cap on each total, lowered with the schedule, makes the budget certain: what exceeds it
is taken where it is worth least (`water_filled`). Near the end of the descent an
integer programme makes bits whole, within every bound and at the least loss by the same
sensitivities. From then on each edge has a target of its own, and `Constraint` ends the
run as it ends any other.

Divergences that `analyze(..., widths=range(1, 9))` predicted before make the first
plan. Whole bits follow the gradients alone: the network in training adapts to its
quantizers, which no prediction before it can know.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule

from gdnsq_fx.analysis.allocation import Divergences, best_allocation
from gdnsq_fx.analysis.continuous_cost import ContinuousCost
from gdnsq_fx.analysis.cost_model import CostModel
from gdnsq_fx.annotations import facts
from gdnsq_fx.budget import Budget
from gdnsq_fx.errors import BudgetError
from gdnsq_fx.sites import WeightSite, assign_targets, hard_bits, sites
from gdnsq_fx.training.constraint import Cap, Constraint
from gdnsq_fx.training.edges import (
    largest_capacities,
    mean_capacities,
    open_edge,
    project_edge,
    raise_edge,
    slope,
)
from gdnsq_fx.training.process_group import ProcessGroup
from gdnsq_fx.training.schedule import Schedule
from gdnsq_fx.training.sensitivity import Sensitivity
from gdnsq_fx.training.side_by_side import EPSILON
from gdnsq_fx.training.water_filling import water_filled

WIDTHS = tuple(range(1, 9))
# Bits are made whole once an edge on its way to one bit would have 1 + this.
WHOLE_BELOW = 0.25
# A slope is remembered for this share of the descent.
MEMORY = 0.25


class LearnedBits:
    """The constraint of a global budget; what `Constraint` is to fixed targets.

    Args:
        graph_module: a prepared model; quantizers and their targets change in place.
        budget: what must not be exceeded in the end.
        schedule: how fast the cost comes down.
        group: processes that train the model, for which the main one decides.

    Attributes:
        is_whole: bits are whole by now, and targets final.

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
        self._graph_module = graph_module
        self._group = group or ProcessGroup()
        self._budget = budget
        self._model = CostModel.of(graph_module)
        self._cost = ContinuousCost(self._model)
        by_name = {site.edge: site for site in sites(graph_module)}
        self._edges = [by_name[name] for name in self._model.edges]
        ceilings = [self._model.ceiling(name, budget) for name in self._model.edges]
        self._ceilings = _vector(ceilings).clamp(max=WIDTHS[-1])
        self._fixed = Constraint(graph_module)
        self._before = self._fixed.targets
        memory = MEMORY * schedule.descent_steps
        self._sensitivity = Sensitivity(len(self._edges), memory)
        self.is_whole = False
        first = predicted_divergences(graph_module) or self._learned()
        self._plan = self._whole_bits(first)
        assign_targets(graph_module, self._plan)

    @property
    def targets(self) -> dict[str, int]:
        """Target bit-width of every edge; until bits are whole, the first plan."""
        return self._fixed.targets

    def observe_loss(self, loss: Tensor) -> None:
        """As `Constraint.observe_loss`."""
        self._fixed.observe_loss(loss)

    def penalty(self, growth: float) -> Tensor:
        """The penalty, a differentiable scalar in units of the loss.

        Args:
            growth: t, how strong it is by now.
        """
        if self.is_whole:
            return self._fixed.penalty(growth)
        capacities = mean_capacities(self._edges)
        pressure = torch.relu(capacities - self._ceilings + EPSILON).mean()
        for name, bound in self._budget.totals.items():
            excess = self._cost(name, capacities) / bound - 1.0
            pressure = pressure + torch.relu(excess + EPSILON)
        scale = self._fixed.loss_scale
        return pressure.to(scale.device, scale.dtype) * scale * growth

    @torch.no_grad()
    def observe_gradients(self) -> None:
        """Learn what bits are worth from the gradients of the loss alone; call after
        its backward, before that of the penalty, which may exceed it by far."""
        if self.is_whole:
            return
        slopes = torch.stack([slope(edge) for edge in self._edges])
        self._sensitivity.observe(slopes, mean_capacities(self._edges))

    def align_gradients(self, cap: Cap) -> None:
        """As `Constraint.align_gradients`, once bits are whole."""
        if self.is_whole:
            self._fixed.align_gradients(cap)

    @torch.no_grad()
    def project(self, cap: Cap) -> None:
        """Lower capacities until every total is within what is allowed by now.

        Args:
            cap: target -> bits that an edge with this target may have by now.
        """
        for edge in self._edges:
            if isinstance(edge, WeightSite):
                edge.quantizer.forget()  # the update moved what forward met
        if not self.is_whole and cap(1.0) <= 1.0 + WHOLE_BELOW:
            self._make_whole()
        if self.is_whole:
            self._fixed.project(cap)
            return
        bits = self._within_totals(cap)
        for edge, lowered in zip(self._edges, bits.tolist(), strict=True):
            project_edge(edge, lowered)

    @torch.no_grad()
    def open_to(self, bits: float) -> None:
        """Start over at ``bits`` everywhere, or at the plan where that has more."""
        for edge in self._edges:
            open_edge(edge, max(bits, self._plan[edge.edge]))

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
        targets = [self.targets[name] for name in self._model.edges]
        plan = [self._plan[name] for name in self._model.edges]
        return {
            **self._sensitivity.state(),
            "targets": torch.tensor(targets),
            "plan": torch.tensor(plan),
            "is_whole": torch.tensor(self.is_whole),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        names = self._model.edges
        self._sensitivity.load_state(state)
        self._plan = dict(zip(names, state["plan"].tolist(), strict=True))
        targets = dict(zip(names, state["targets"].tolist(), strict=True))
        assign_targets(self._graph_module, targets)
        self.is_whole = bool(state["is_whole"])

    def _within_totals(self, cap: Cap) -> Tensor:
        """Capacities under the totals, which go the way of the plan; ``[edges]``."""
        allowed = _vector([cap(bits) for bits in self._ceilings.tolist()])
        bits = torch.minimum(largest_capacities(self._edges), allowed)
        path = _vector([cap(self._plan[name]) for name in self._model.edges])
        for name, bound in self._budget.totals.items():
            bits = water_filled(
                self._cost,
                name,
                max(bound, float(self._cost(name, path))),
                capacities=bits,
                # No edge falls faster than one bound for one bit.
                floors=bits.clamp(max=cap(1.0)),
                sensitivities=self._sensitivity.values(),
            )
        return bits

    def _make_whole(self) -> None:
        """Fix a target for every edge, and give those that rise their bits at once."""
        chosen = self._whole_bits(self._learned())
        assign_targets(self._graph_module, chosen)
        self.is_whole = True
        targets = _vector([chosen[name] for name in self._model.edges])
        missing = (targets - largest_capacities(self._edges)).clamp(min=0.0)
        for edge, bits in zip(self._edges, missing.tolist(), strict=True):
            raise_edge(edge, bits)

    def _whole_bits(self, divergences: Divergences) -> dict[str, int]:
        return self._group.on_main(
            lambda: dict(best_allocation(divergences, self._model, self._budget).bits)
        )

    def _learned(self) -> Divergences:
        """What each edge would cost at each width by the gradients so far."""
        found = self._sensitivity.values().tolist()
        return {
            name: {bits: value * 4.0**-bits for bits in WIDTHS}
            for name, value in zip(self._model.edges, found, strict=True)
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
    """What the last analysis predicted, None where not for every width in `WIDTHS`."""
    found: dict[str, Mapping[int, float]] = {}
    for site in sites(graph_module):
        edge = facts(site.node).edge
        at = {} if edge is None else edge.divergence_at
        if not set(WIDTHS) <= set(at):
            return None
        found[site.edge] = {bits: at[bits] for bits in WIDTHS}
    return found


def _vector(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
