"""How much the loss depends on the bits of each edge, learned from gradients.

With D_e(b) = a_e 4^-b the slope of the loss is -dL/db_e = ln 4 a_e 4^-b_e = a_e x_e.
The sensitivity a_e is the line through the origin that fits the slopes g_e seen so far,

    a_e = sum_t m^-t g_e x_e / sum_t m^-t x_e^2,    x_e = ln 4 * 4^-b_e,

least squares with a memory of 1 / (1 - m) steps. Slopes of many bits, which are nearly
all noise, weigh little in it; the ones that count are those near the final precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# A slope below 0 is noise, but its edge must not lose all of its bits for it.
LEAST_SHARE = 1e-4


class Sensitivity:
    """Running estimate of a_e for every edge.

    Args:
        edges: how many.
        memory: steps over which a slope is forgotten, at least 1.
    """

    def __init__(self, edges: int, memory: float) -> None:
        self._keep = 1.0 - 1.0 / max(memory, 1.0)
        self._products = torch.zeros(edges, dtype=torch.float64)
        self._squares = torch.zeros(edges, dtype=torch.float64)

    def observe(self, slopes: Tensor, bits: Tensor) -> None:
        """Take in one step.

        Args:
            slopes: -dL/db of each edge, ``[edges]``; not a number where unknown.
            bits: capacity of each edge at which they were taken, ``[edges]``.
        """
        noise = math.log(4.0) * torch.exp2(-2.0 * bits)
        known = torch.isfinite(slopes)
        slopes = torch.where(known, slopes, torch.zeros_like(slopes))
        self._products.mul_(self._keep).add_(slopes * noise)
        self._squares.mul_(self._keep).add_(torch.where(known, noise.square(), 0.0))

    def values(self) -> Tensor:
        """a_e of each edge, ``[edges]`` float64, above 0; all 1 before any slope."""
        found = self._products / self._squares.clamp(min=1e-300)
        positive = found[found > 0.0]
        if not len(positive):
            return torch.ones_like(found)
        return found.clamp(min=LEAST_SHARE * float(positive.median()))

    def state(self) -> dict[str, Tensor]:
        """Copies of the sums."""
        return {"products": self._products.clone(), "squares": self._squares.clone()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        self._products.copy_(state["products"])
        self._squares.copy_(state["squares"])
