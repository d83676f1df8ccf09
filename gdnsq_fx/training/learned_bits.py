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

from gdnsq_fx.analysis.continuous_cost import ContinuousCost
from gdnsq_fx.budget import Budget
from gdnsq_fx.sites import WeightSite, assign_targets
from gdnsq_fx.training.budgeted_bits import (
    WIDTHS,
    BudgetedBits,
    predicted_divergences,
)
from gdnsq_fx.training.constraint import Cap
from gdnsq_fx.training.edges import (
    largest_capacities,
    mean_capacities,
    open_edge,
    project_edge,
    raise_edge,
)
from gdnsq_fx.training.process_group import ProcessGroup
from gdnsq_fx.training.schedule import Schedule
from gdnsq_fx.training.side_by_side import EPSILON
from gdnsq_fx.training.water_filling import water_filled

# Bits are made whole once an edge on its way to one bit would have 1 + this.
WHOLE_BELOW = 0.25


class LearnedBits(BudgetedBits):
    """Bits that come down together to the budget, and are whole near the end."""

    def __init__(
        self,
        graph_module: GraphModule,
        budget: Budget,
        schedule: Schedule,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(graph_module, budget, schedule, group)
        self._cost = ContinuousCost(self._model)
        ceilings = [self._model.ceiling(name, budget) for name in self._model.edges]
        self._ceilings = _vector(ceilings).clamp(max=WIDTHS[-1])
        self._plan = self._best(predicted_divergences(graph_module) or self._learned())
        assign_targets(graph_module, self._plan)

    def penalty(self, growth: float) -> Tensor:
        """The penalty, a differentiable scalar in units of the loss.

        Args:
            growth: t, how strong it is by now.
        """
        if self.is_final:
            return self._fixed.penalty(growth)
        capacities = mean_capacities(self._edges)
        pressure = torch.relu(capacities - self._ceilings + EPSILON).mean()
        for name, bound in self._budget.totals.items():
            excess = self._cost(name, capacities) / bound - 1.0
            pressure = pressure + torch.relu(excess + EPSILON)
        scale = self._fixed.loss_scale
        return pressure.to(scale.device, scale.dtype) * scale * growth

    def align_gradients(self, cap: Cap) -> None:
        """As `Constraint.align_gradients`, once bits are whole."""
        if self.is_final:
            super().align_gradients(cap)

    @torch.no_grad()
    def project(self, cap: Cap) -> None:
        """Lower capacities until every total is within what is allowed by now.

        Args:
            cap: target -> bits that an edge with this target may have by now.
        """
        for edge in self._edges:
            if isinstance(edge, WeightSite):
                edge.quantizer.forget()  # the update moved what forward met
        if not self.is_final and cap(1.0) <= 1.0 + WHOLE_BELOW:
            self._make_whole()
        if self.is_final:
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

    def state(self) -> dict[str, Tensor]:
        """What the steps to come depend on, beside the model; as copies."""
        return {**super().state(), "plan": self._stored(self._plan)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        super().load_state(state)
        self._plan = self._restored(state["plan"])

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
        chosen = self._best(self._learned())
        assign_targets(self._graph_module, chosen)
        self.is_final = True
        targets = _vector([chosen[name] for name in self._model.edges])
        missing = (targets - largest_capacities(self._edges)).clamp(min=0.0)
        for edge, bits in zip(self._edges, missing.tolist(), strict=True):
            raise_edge(edge, bits)


def _vector(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
