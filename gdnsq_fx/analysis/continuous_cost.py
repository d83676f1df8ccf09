"""What capacities cost: `CostModel` for real bits, differentiable.

During training a capacity stands for the bits of its edge:

    weight_bytes  sum_e N_e b_e / 8 + 8 for each scale group
    bops          sum_(e,f) MACs_ef b_e b_f, with 32 for an operand in floating point
    mean bits     sum_e N_e b_e / sum_e N_e
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gdnsq_fx.analysis.capacity import FLOAT_BITS
from gdnsq_fx.analysis.cost_model import BYTES_PER_GROUP, CostModel


class ContinuousCost:
    """The costs of a model as functions of one vector of bits.

    Args:
        model: sizes of the edges; its ``edges`` give the order of the vector.
    """

    def __init__(self, model: CostModel) -> None:
        self.edges = model.edges
        place = {edge: index for index, edge in enumerate(self.edges)}
        count = len(self.edges)
        self._weights = _vector([model.weights.get(e, 0) for e in self.edges])
        self._activations = _vector([model.activations.get(e, 0) for e in self.edges])
        self._group_bytes = float(BYTES_PER_GROUP * sum(model.groups.values()))
        # Operands in floating point read one entry more, behind the edges.
        pairs = [[count if e is None else place[e] for e in key] for key in model.macs]
        self._pairs = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
        self._macs = _vector(list(model.macs.values()))
        self._costs: dict[str, Callable[[Tensor], Tensor]] = {
            "weight_bytes": self._weight_bytes,
            "bops": self._bops,
            "mean_weight_bits": lambda bits: _mean(self._weights, bits),
            "mean_act_bits": lambda bits: _mean(self._activations, bits),
        }

    def __call__(self, name: str, bits: Tensor) -> Tensor:
        """One cost, a differentiable scalar in float64.

        Args:
            name: as in `Budget.totals`.
            bits: ``[edges]``, float64, on the CPU.
        """
        return self._costs[name](bits)

    def marginal(self, name: str, bits: Tensor) -> Tensor:
        """Derivative of one cost with respect to each of ``bits``, ``[edges]``."""
        leaf = bits.detach().clone().requires_grad_()
        with torch.enable_grad():
            (found,) = torch.autograd.grad(self(name, leaf), leaf)
        return found

    def _weight_bytes(self, bits: Tensor) -> Tensor:
        return self._weights @ bits / 8.0 + self._group_bytes

    def _bops(self, bits: Tensor) -> Tensor:
        known = torch.cat([bits, bits.new_tensor([float(FLOAT_BITS)])])
        return (self._macs * known[self._pairs].prod(1)).sum()


def _vector(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _mean(elements: Tensor, bits: Tensor) -> Tensor:
    return elements @ bits / elements.sum().clamp(min=1.0)
