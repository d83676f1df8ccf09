"""A budget for the whole model: each edge learns how many of its bits are worth it.

    capacities  start --.__   the cost of all together comes down to the budget ...
                           ``-.__|______________
                                 ^ ... then every edge gets whole bits, which stay

While the bits are being learned, the gradient of the loss with respect to each capacity
says what the edge's bits are worth (`Sensitivity`), the penalty

    P = C * t * (mean_k relu(cost_k / bound_k - 1 + eps) + excess over the ceilings)

presses on the cost, whose derivative divides the pressure among the edges, and a cap on
the total cost, lowered with the schedule, makes the budget certain (`water_filled`).
Near the end of the descent an integer programme turns capacities into whole bits, at
the least loss by the same sensitivities; from then on each edge has a target of its
own, and `Constraint` ends the run as it ends any other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from gdnsq_fx.analysis.allocation import best_allocation
from gdnsq_fx.analysis.continuous_cost import ContinuousCost
from gdnsq_fx.analysis.cost_model import CostModel
from gdnsq_fx.annotations import facts
from gdnsq_fx.budget import Budget
from gdnsq_fx.sites import (
    WeightSite,
    activation_sites,
    assign_targets,
    sites,
    weight_sites,
)
from gdnsq_fx.training.constraint import EPSILON, Cap, Constraint
from gdnsq_fx.training.schedule import Schedule
from gdnsq_fx.training.sensitivity import Sensitivity
from gdnsq_fx.training.water_filling import water_filled

WIDTHS = tuple(range(1, 9))
# Bits are made whole when an edge on its way to 1 bit would still have 1 + this.
WHOLE_BELOW = 0.25
# A slope is remembered for this share of the descent.
MEMORY = 0.25


class LearnedBits:
    """The constraint of a global budget; the counterpart of `Constraint`.

    Args:
        graph_module: a prepared model; quantizers and their targets change in place.
        budget: what must not be exceeded at the end.
        schedule: how fast the cost comes down.

    Raises:
        BudgetError: no bits meet the budget; the model is left as it was.
    """

    def __init__(
        self, graph_module: GraphModule, budget: Budget, schedule: Schedule
    ) -> None:
        self._graph_module = graph_module
        self._budget = budget
        self._model = CostModel.of(graph_module)
        self._cost = ContinuousCost(self._model)
        every = [*weight_sites(graph_module), *activation_sites(graph_module)]
        by_edge = {site.edge: site for site in every}
        self._sites = [by_edge[edge] for edge in self._model.edges]
        self._fixed = Constraint(graph_module)
        self._before = self._fixed.targets
        self._sensitivity = Sensitivity(
            len(self._sites), MEMORY * schedule.descent_steps
        )
        self._capacities: Tensor | None = None
        self._pressure: Tensor | None = None
        self._predicted = _predicted(graph_module)
        self.is_whole = False
        # The plan: where the cost goes, and the rates of the quantizers.
        self._plan = self._whole_bits()
        assign_targets(graph_module, self._plan)

    @property
    def targets(self) -> dict[str, int]:
        """Target bit-width of every edge: the plan until bits are whole."""
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
        capacities = self._mean_capacities()
        excess = [
            torch.relu(self._cost(name, capacities) / bound - 1.0 + EPSILON)
            for name, bound in self._budget.totals.items()
        ]
        above = torch.relu(capacities - self._ceilings() + EPSILON)
        penalty = self._fixed.loss_scale * growth * (sum(excess) + above.mean())
        self._capacities = capacities.detach()
        (self._pressure,) = torch.autograd.grad(penalty, capacities, retain_graph=True)
        return penalty

    @torch.no_grad()
    def observe_gradients(self) -> None:
        """Learn what bits are worth; call after the backward pass, before clipping."""
        if self._capacities is None or self._pressure is None:
            return
        # The gradient holds the penalty's own pressure, which is known.
        slopes = torch.stack([_slope(site) for site in self._sites]) + self._pressure
        self._sensitivity.observe(slopes, self._capacities)
        self._capacities = self._pressure = None

    @torch.no_grad()
    def project(self, cap: Cap) -> None:
        """Lower capacities until their cost is within what the schedule allows by now.

        Args:
            cap: bits allowed by now of an edge with this target.
        """
        if not self.is_whole and cap(1.0) <= 1.0 + WHOLE_BELOW:
            self._make_whole()
        if self.is_whole:
            self._fixed.project(cap)
            return
        capacities = self._largest_capacities()
        ceilings = torch.tensor([cap(float(c)) for c in self._ceilings()])
        capacities = torch.minimum(capacities, ceilings.double())
        path = _bits_vector({e: cap(b) for e, b in self._plan.items()})
        floors = capacities.clamp(max=cap(1.0))
        for name, bound in self._budget.totals.items():
            capacities = water_filled(
                self._cost,
                name,
                max(bound, float(self._cost(name, path))),
                capacities=capacities,
                floors=floors,
                sensitivities=self._sensitivity.values(),
            )
        for site, bits in zip(self._sites, capacities.tolist(), strict=True):
            if isinstance(site, WeightSite):
                site.quantizer.project(site.weight(), bits)
            else:
                site.quantizer.project(bits)

    @torch.no_grad()
    def open_to(self, bits: float) -> None:
        """Start over with at least ``bits`` everywhere: any edge may win any."""
        for site in self._sites:
            start = max(bits, float(site.quantizer.spec.bits))
            if isinstance(site, WeightSite):
                site.quantizer.open_to(site.weight(), start)
            else:
                site.quantizer.open_to(start)

    def undo(self) -> None:
        """Give every edge the target back that it had before."""
        assign_targets(self._graph_module, self._before)

    def mean_capacity(self) -> float:
        """As `Constraint.mean_capacity`."""
        return self._fixed.mean_capacity()

    def violations(self) -> dict[str, tuple[int, int]]:
        """As `Constraint.violations`."""
        return self._fixed.violations()

    @torch.no_grad()
    def _make_whole(self) -> None:
        """Fix a target for every edge, and give those that rise the bits at once."""
        chosen = self._whole_bits()
        assign_targets(self._graph_module, chosen)
        self.is_whole = True
        missing = _bits_vector(chosen) - self._largest_capacities()
        for site, bits in zip(self._sites, missing.clamp(min=0.0).tolist(), strict=True):
            site.quantizer.log2_step.sub_(bits)

    def _whole_bits(self) -> dict[str, int]:
        divergences = self._predicted or {}
        import os
        mode = os.environ.get("GX_MODE", "both")
        learned = self._sensitivity.values().tolist()
        if mode == "grad" or not self._predicted or (mode == "both" and self._sensitivity.seen):
            divergences = {
                edge: {b: value * 4.0**-b for b in WIDTHS}
                for edge, value in zip(self._model.edges, learned, strict=True)
            }
        if os.environ.get("GX_DUMP") and self._predicted and self._sensitivity.seen:
            for (e, v) in zip(self._model.edges, learned):
                print(f"{e:28s} {v:10.3g}", *(f"{self._predicted[e][b]*4**b:10.3g}" for b in (1,2,3,4,8)))
        return dict(best_allocation(divergences, self._model, self._budget).bits)

    def _mean_capacities(self) -> Tensor:
        """Capacity of every edge, mean over scale groups; ``[edges]`` float64."""
        return torch.stack([_capacity(s).mean().cpu().double() for s in self._sites])

    def _largest_capacities(self) -> Tensor:
        """Capacity of every edge, largest scale group; what its bits must hold."""
        return torch.stack([_capacity(s).amax().cpu().double() for s in self._sites])

    def _ceilings(self) -> Tensor:
        widest = float(WIDTHS[-1])
        allowed = [self._model.ceiling(e, self._budget) for e in self._model.edges]
        return torch.tensor([min(a, widest) for a in allowed], dtype=torch.float64)


def _capacity(site) -> Tensor:
    if isinstance(site, WeightSite):
        return site.quantizer.capacity(site.weight())
    return site.quantizer.capacity()


def _bits_vector(bits) -> Tensor:
    return torch.tensor(list(bits.values()), dtype=torch.float64)


def _slope(site) -> Tensor:
    """-d(loss + penalty)/d(bits) of all scale groups of an edge together."""
    gradient = site.quantizer.log2_step.grad
    if gradient is None:
        return torch.tensor(float("nan"), dtype=torch.float64)
    gradient = gradient.double()
    if isinstance(site, WeightSite):
        # cap = log2(span/s + 1) falls by 1 - 2^-cap where log2 s grows by 1
        capacity = _capacity(site).double()
        gradient = gradient / (1.0 - torch.exp2(-capacity)).clamp(min=0.5)
    return gradient.sum().cpu()


def _predicted(graph_module: GraphModule):
    found = {}
    for site in sites(graph_module):
        edge = facts(site.node).edge
        at = {} if edge is None else edge.divergence_at
        if not set(WIDTHS) <= set(at):
            return None
        found[site.edge] = {b: at[b] for b in WIDTHS}
    return found
