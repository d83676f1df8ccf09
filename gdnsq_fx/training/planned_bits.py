"""A budget for the whole model, from whole bits that meet it from the first step on.

    cost  budget --------------------|----------------- budget
          |<- a plan, bits weighed ->|<- the final plan: hold, anneal ->|

A run of few hundred steps has none to spare for bits that it will not keep
(``recipe.py``). So it starts at a plan: whole bits within every bound, by an integer
programme, each edge at levels of least squared error for its width. The plan is made
from predictions D_e(b): those of `analyze(..., widths=range(1, 9))` where that was
called before, else those that `finetune` makes of its first training batches
(``first_prediction.py``). Without any, bits are worth what they cost, which is as
uniform as whole bits can be.

Until half of the descent the gradients tell what bits are worth where the network is
now (`Sensitivity`), a_e 4^-b. Then the plan is made anew, once: from the gradients
alone where nothing was predicted, else with the level of each prediction moved half-way
(in logarithms) to that of the gradients. Their noise must not undo a good plan, so the
new one counts only where its loss is at most `CLEARLY` times that of the old one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule

from gdnsq_fx.analysis.allocation import Divergences
from gdnsq_fx.analysis.continuous_cost import ContinuousCost
from gdnsq_fx.budget import Budget
from gdnsq_fx.sites import (
    WeightSite,
    activation_sites,
    assign_targets,
    hard_bits,
    weight_sites,
)
from gdnsq_fx.training.budgeted_bits import (
    BudgetedBits,
    divergences_of,
    divergences_tensor,
    falling,
    predicted_divergences,
)
from gdnsq_fx.training.clip_weights import clip_outliers
from gdnsq_fx.training.constraint import Cap
from gdnsq_fx.training.edges import Edge, raise_edge
from gdnsq_fx.training.process_group import ProcessGroup
from gdnsq_fx.training.schedule import Schedule
from gdnsq_fx.training.widen_activations import widen_binary

# Bits at which edges without predictions are priced; bit operations are products.
EVERYWHERE = 3.0
# Of an edge that costs nothing within a budget, as a share of the largest price.
LEAST_PRICE = 1e-6
# Share of the descent after which the plan is made anew.
REVISED_AT = 0.5
CLEARLY = 0.75
# Name of the predictions in the state.
PREDICTED = "predicted"


class PlannedBits(BudgetedBits):
    """Whole bits from the start, weighed once on the way.

    Args:
        graph_module, budget, schedule, group: as in `BudgetedBits`.
        predicted: what each edge costs at each of `WIDTHS`, as training is likely to
            leave it; by default what the last analysis left on the model, if anything.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        budget: Budget,
        schedule: Schedule,
        group: ProcessGroup | None = None,
        predicted: Divergences | None = None,
    ) -> None:
        super().__init__(graph_module, budget, schedule, group)
        self._revised_at = max(round(REVISED_AT * schedule.descent_steps), 1)
        self._seen = 0
        # Of the main process: all must decide alike, now and at the revision.
        self._predicted = self._group.from_main(
            predicted or predicted_divergences(graph_module)
        )
        assign_targets(graph_module, self._best(self._predicted or self._alike()))

    @torch.no_grad()
    def observe_gradients(self) -> None:
        """As `BudgetedBits.observe_gradients`."""
        super().observe_gradients()
        self._seen += not self.is_final

    @torch.no_grad()
    def project(self, cap: Cap) -> None:
        """Make the plan anew where that is due, and bring every capacity to it.

        Args:
            cap: target -> bits that an edge with this target may have by now.
        """
        if not self.is_final and self._seen >= self._revised_at:
            self._revise()
        self._fixed.project(cap)

    @torch.no_grad()
    def open_to(self, bits: float) -> None:
        """Place the levels of edges whose width the plan changes, then as
        `Constraint.open_to`."""
        del bits  # at most that of the plan: see `constraint_for`
        targets = self.targets
        for edge in self._edges:
            if targets[edge.edge] == self._before[edge.edge]:
                continue
            if isinstance(edge, WeightSite):
                edge.quantizer.open_to(edge.weight(), targets[edge.edge])
            else:
                edge.quantizer.change_width(targets[edge.edge])
        clip_outliers(weight_sites(self._graph_module), 1.0)
        widen_binary(activation_sites(self._graph_module))

    def violations(self) -> dict[str, tuple[int, int]]:
        """As `Constraint.violations`; before the plan is final, every edge, so that no
        state is kept as the best whose bits are not those of the end."""
        if self.is_final:
            return self._fixed.violations()
        bits, targets = hard_bits(self._graph_module), self.targets
        return {edge: (bits[edge], targets[edge]) for edge in bits}

    def state(self) -> dict[str, Tensor]:
        """What the steps to come depend on, beside the model; as copies."""
        state = {**super().state(), "seen": torch.tensor(self._seen)}
        if self._predicted is not None:
            state[PREDICTED] = divergences_tensor(self._predicted, self._model.edges)
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        super().load_state(state)
        self._seen = int(state["seen"])
        if PREDICTED in state:
            self._predicted = divergences_of(state[PREDICTED], self._model.edges)

    def _alike(self) -> Divergences:
        """What asks for the same bits everywhere: worth as much as they cost."""
        cost = ContinuousCost(self._model)
        bits = torch.full((len(self._edges),), EVERYWHERE, dtype=torch.float64)
        price = torch.zeros_like(bits)
        for name, bound in self._budget.totals.items():
            price += cost.marginal(name, bits) / bound
        price = price.clamp(min=LEAST_PRICE * float(price.max()) or 1.0)
        return falling(self._model.edges, price)

    def _revise(self) -> None:
        """Make the plan anew, and move the edges that it gives other bits."""
        self.is_final = True
        now, weighed = self.targets, self._weighed()
        chosen = self._best(weighed)
        if _total(weighed, chosen) > CLEARLY * _total(weighed, now):
            return
        assign_targets(self._graph_module, chosen)
        for edge in self._edges:
            _move(edge, now[edge.edge], chosen[edge.edge])

    def _weighed(self) -> Divergences:
        """What each edge costs at each width, by the gradients and the prediction."""
        learned = self._learned()
        if self._predicted is None:
            return learned
        weighed: dict[str, dict[int, float]] = {}
        for edge, bits in self.targets.items():
            at = self._predicted[edge]
            factor = math.sqrt(learned[edge][bits] / at[bits]) if at[bits] else 1.0
            weighed[edge] = {b: d * factor for b, d in at.items()}
        return weighed


def _move(edge: Edge, before: int, bits: int) -> None:
    """Other levels for another width; fewer for a weight are left to the projection."""
    if isinstance(edge, WeightSite):
        if bits > before:
            raise_edge(edge, math.log2((2.0**bits - 1.0) / (2.0**before - 1.0)))
    elif bits != before:
        edge.quantizer.change_width(bits)


def _total(divergences: Divergences, bits: Mapping[str, int]) -> float:
    return sum(divergences[edge][width] for edge, width in bits.items())
