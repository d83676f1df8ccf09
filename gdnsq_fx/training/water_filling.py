"""Fewer bits where they are worth least: reverse water-filling.

The noise of a quantizer falls as 4^-b, and so does, to second order, the loss that it
causes: D_e(b) = a_e 4^-b with the *sensitivity* a_e. Of all capacities of one cost
sum_e c_e b_e, those have the least sum_e D_e whose slopes per cost are level,

    a_e 4^-b_e / c_e = theta    hence    b_e = 1/2 log2(a_e / c_e) - 1/2 log2(theta),

clamped to what each edge may have (Cover & Thomas, Elements of Information Theory,
section 10.3.3: the water level theta). An edge stays as it is until the water reaches
it. Products of bits count by their slopes at the capacities given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdnsq_fx.analysis.continuous_cost import ContinuousCost

HALVINGS = 50


def water_filled(
    cost: ContinuousCost,
    name: str,
    limit: float,
    *,
    capacities: Tensor,
    floors: Tensor,
    sensitivities: Tensor,
) -> Tensor:
    """Capacities lowered until one cost is at most a limit, losing least.

    Args:
        cost: what bits cost.
        name: the cost that is limited, as in `Budget.totals`.
        limit: in its units; at least what ``floors`` cost.
        capacities: bits of each edge now, which no edge exceeds, ``[edges]`` float64.
        floors: bits below which no edge falls, at most ``capacities``.
        sensitivities: a_e > 0 in any common unit.

    Returns:
        ``[edges]`` bits; those that do not add to the cost are as before.
    """
    if float(cost(name, capacities)) <= limit:
        return capacities
    marginal = cost.marginal(name, capacities)
    paid = marginal > 0.0
    height = 0.5 * torch.log2(sensitivities / marginal.clamp(min=1e-300))
    low = float((height - capacities)[paid].min())
    high = float((height - floors)[paid].max())

    def at(level: float) -> Tensor:
        # torch.clamp with tensors takes the upper bound where the two cross.
        lowered = (height - level).clamp(floors, capacities)
        return torch.where(paid, lowered, capacities)

    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        if float(cost(name, at(middle))) <= limit:
            high = middle
        else:
            low = middle
    return at(high)
