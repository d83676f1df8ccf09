"""Mixed precision: the bits of every edge that lose least within a budget.

An integer programme, solved exactly by HiGHS through `scipy.optimize.milp`:

    minimize    sum_e sum_b D_e(b) x_eb        divergence of edge e at b bits, predicted
    subject to  sum_b x_eb = 1                 one width for each edge
                sum_e sum_b c_e(b) x_eb <= C   for each linear cost (bytes, mean bits)

Bit operations multiply the widths of two edges. Their products are variables of their
own, ``y = x_eb x_fc``, tied to both factors by ``sum_c y = x_eb`` and
``sum_b y = x_fc``; with whole x these leave y no choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from gdnsq_fx.analysis.capacity import FLOAT_BITS
from gdnsq_fx.analysis.cost_model import CostModel
from gdnsq_fx.budget import Budget
from gdnsq_fx.errors import BudgetError

SOLVER_TOLERANCE = 1e-6

Divergences = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Allocation:
    """A bit-width for every edge.

    Attributes:
        bits: edge -> bits.
        predicted_divergence: sum over the edges, nats per sample.
        costs: what it takes of everything that a `Budget` may bound.
        budget: what it had to meet.
    """

    bits: Mapping[str, int]
    predicted_divergence: float
    costs: Mapping[str, float]
    budget: Budget

    def __str__(self) -> str:
        rows = [(edge, bits) for edge, bits in self.bits.items()]
        table = tabulate(rows, headers=("edge", "bits"), tablefmt="simple")
        bounds = self.budget.bounds
        lines = [
            f"{name} {cost:,.6g}"
            + (f" of {bounds[name]:,.6g}" if name in bounds else "")
            for name, cost in self.costs.items()
        ]
        total = f"predicted divergence {self.predicted_divergence:.4g}"
        return "\n".join([table, "", total, *lines])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def best_allocation(
    divergences: Divergences, cost: CostModel, budget: Budget
) -> Allocation:
    """The assignment of least predicted divergence that meets a budget.

    Args:
        divergences: edge -> bits -> predicted divergence, for every edge of ``cost``;
            these are also the widths that are allowed.
        cost: what bits cost.
        budget: what must not be exceeded.

    Raises:
        BudgetError: no assignment meets it; names the smallest feasible value.
    """
    check_feasible(divergences, cost, budget)
    allowed = {
        edge: {b: d for b, d in at.items() if b <= cost.ceiling(edge, budget)}
        for edge, at in divergences.items()
    }
    bits = _Programme(allowed, cost, budget.totals).solve()
    slack = SOLVER_TOLERANCE
    while not cost.meets(bits, budget):  # the solver's idea of "at most" is a float's
        tighter = {name: b * (1.0 - slack) for name, b in budget.totals.items()}
        bits = _Programme(allowed, cost, tighter).solve()
        slack *= 2.0
    bits = _filled(bits, allowed, cost, budget)
    total = sum(divergences[edge][width] for edge, width in bits.items())
    return Allocation(bits, total, cost.costs(bits), budget)


def _filled(
    bits: dict[str, int], allowed: Divergences, cost: CostModel, budget: Budget
) -> dict[str, int]:
    """Spend what the solver left over on edges whose gain its tolerance hides.

    Divergences span many orders of magnitude, and the programme is solved to a share of
    the largest. Each edge gets the next width while that fits and is worth something.
    """
    bits = dict(bits)
    waiting = [e for e in bits if _gain(allowed[e], bits[e]) > 0.0]
    while waiting:
        edge = max(waiting, key=lambda e: _gain(allowed[e], bits[e]))
        raised = {**bits, edge: _next_width(allowed[edge], bits[edge])}
        if cost.meets(raised, budget):
            bits = raised
        # Costs grow with every width: what does not fit now never will.
        if bits is not raised or _gain(allowed[edge], bits[edge]) <= 0.0:
            waiting.remove(edge)
    return bits


def _next_width(at: Mapping[int, float], bits: int) -> int:
    return min((b for b in at if b > bits), default=bits)


def _gain(at: Mapping[int, float], bits: int) -> float:
    """What the next width of an edge saves, nats per sample."""
    return at[bits] - at[_next_width(at, bits)]


def check_feasible(divergences: Divergences, cost: CostModel, budget: Budget) -> None:
    """Every cost grows with every width, so the narrowest assignment decides.

    Raises:
        BudgetError: it does not meet the budget; names the smallest feasible value.
    """
    least = cost.costs({edge: min(divergences[edge]) for edge in cost.edges})
    for name, bound in budget.bounds.items():
        if least[name] > bound:
            raise BudgetError(
                f"{name} cannot be {bound:,.6g}: the narrowest widths take "
                f"{least[name]:,.6g}; ask for at least that, or allow fewer bits"
            )


class _Programme:
    """Rows and columns of the integer programme."""

    def __init__(
        self, divergences: Divergences, cost: CostModel, bounds: Mapping[str, float]
    ) -> None:
        self.cost = cost
        self.columns: dict[tuple[Any, ...], int] = {}
        self.objective: list[float] = []
        self.whole: list[int] = []
        self.entries: list[tuple[int, int, float]] = []
        self.lower: list[float] = []
        self.upper: list[float] = []
        self.widths = {edge: sorted(divergences[edge]) for edge in cost.edges}
        for edge, widths in self.widths.items():
            for bits in widths:
                self._column((edge, bits), divergences[edge][bits], whole=True)
            self._row([(self.columns[edge, b], 1.0) for b in widths], 1.0, 1.0)
        for name, bound in bounds.items():
            terms = self._bops() if name == "bops" else self._linear(name)
            self._row(terms, -math.inf, bound)

    def solve(self) -> dict[str, int]:
        """Bits of each edge."""
        # Imported late: it takes longer than all of this library.
        from scipy.optimize import LinearConstraint, milp
        from scipy.sparse import coo_array

        size = (len(self.lower), len(self.columns))
        rows, places, values = zip(*self.entries, strict=True)
        matrix = coo_array((values, (rows, places)), shape=size).tocsr()
        # Divergences span many orders of magnitude; the solver's tolerances do not.
        scale = max(max(self.objective), 1e-300)
        found = milp(
            [value / scale for value in self.objective],
            integrality=self.whole,
            bounds=(0, 1),
            constraints=LinearConstraint(matrix, self.lower, self.upper),  # type: ignore[arg-type]
            options={"mip_rel_gap": SOLVER_TOLERANCE},
        )
        if found.x is None:
            raise BudgetError(f"the integer programme was not solved: {found.message}")
        return {edge: self._chosen(edge, found.x) for edge in self.widths}

    def _chosen(self, edge: str, solution: Any) -> int:
        shares = [solution[self.columns[edge, bits]] for bits in self.widths[edge]]
        return self.widths[edge][shares.index(max(shares))]

    def _column(self, key: tuple[Any, ...], weight: float, *, whole: bool) -> int:
        self.objective.append(weight)
        self.whole.append(int(whole))
        return self.columns.setdefault(key, len(self.columns))

    def _row(
        self, terms: Sequence[tuple[int, float]], lower: float, upper: float
    ) -> None:
        # In units of the bound, so that bytes and bit operations weigh alike.
        unit = abs(upper) or 1.0
        self.entries += [(len(self.lower), place, v / unit) for place, v in terms]
        self.lower.append(lower / unit)
        self.upper.append(upper / unit)

    def _linear(self, name: str) -> list[tuple[int, float]]:
        cost = self.cost
        if name == "weight_bytes":
            return [
                (self.columns[edge, bits], float(cost.edge_bytes(edge, bits)))
                for edge in cost.weights
                for bits in self.widths[edge]
            ]
        elements = cost.weights if name == "mean_weight_bits" else cost.activations
        total = sum(elements.values()) or 1
        return [
            (self.columns[edge, bits], count * bits / total)
            for edge, count in elements.items()
            for bits in self.widths[edge]
        ]

    def _bops(self) -> list[tuple[int, float]]:
        terms: list[tuple[int, float]] = []
        for (first, second), macs in self.cost.macs.items():
            if first is None and second is None:
                constant = self._column(("float", macs), 0.0, whole=False)
                self._row([(constant, 1.0)], 1.0, 1.0)
                terms.append((constant, float(macs * FLOAT_BITS**2)))
            elif first is None or second is None or first == second:
                edge = first or second
                assert edge is not None
                for bits in self.widths[edge]:
                    other = bits if first == second else FLOAT_BITS
                    terms.append((self.columns[edge, bits], float(macs * bits * other)))
            else:
                terms += self._products(first, second, macs)
        return terms

    def _products(self, first: str, second: str, macs: int) -> list[tuple[int, float]]:
        made = {
            (a, b): self._column((first, a, second, b), 0.0, whole=False)
            for a in self.widths[first]
            for b in self.widths[second]
        }
        for a in self.widths[first]:
            row = [(made[a, b], 1.0) for b in self.widths[second]]
            self._row([*row, (self.columns[first, a], -1.0)], 0.0, 0.0)
        for b in self.widths[second]:
            row = [(made[a, b], 1.0) for a in self.widths[first]]
            self._row([*row, (self.columns[second, b], -1.0)], 0.0, 0.0)
        return [(place, float(macs * a * b)) for (a, b), place in made.items()]
