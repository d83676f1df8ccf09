"""What fine-tuning reached, and how it went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gdnsq_fx.budget import Budget


@dataclass(frozen=True)
class StepRecord:
    """One line of the history.

    Attributes:
        step: optimizer step, from 0.
        loss: loss without the penalty.
        mean_bits: mean capacity over all edges, bits per element.
        metric: what ``validate`` returned, None where it was not called.
    """

    step: int
    loss: float
    mean_bits: float
    metric: float | None = None


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning reached. ``budget_met`` is always True: a miss is an error.

    Attributes:
        steps: optimizer steps taken.
        bits: hard bit-width of every edge.
        target_bits: its target.
        budget_met: every hard bit-width is at or under its target.
        metric: ``validate`` of the final model, None without one.
        best_step: step, from 0, after which the model was as it is now; None where
            that is the last one, and no best state was asked for.
        history: records through the run.
        seconds: wall-clock time.
        budget: bounds on the whole model that were asked for, None without; the target
            bits are then those that were learned.
        costs: what the hard bit-widths take of everything a `Budget` may bound; None
            without one.
    """

    steps: int
    bits: dict[str, int]
    target_bits: dict[str, int]
    budget_met: bool
    metric: float | None
    seconds: float
    history: tuple[StepRecord, ...] = field(repr=False)
    best_step: int | None = None
    budget: Budget | None = None
    costs: Mapping[str, float] | None = None

    def __str__(self) -> str:
        widest = max(self.bits.values(), default=0)
        lines = [
            f"fine-tuned {self.steps} steps in {self.seconds:.0f} s; "
            f"{len(self.bits)} edges, all at or under target (widest: {widest} bits)"
        ]
        if self.budget is not None and self.costs is not None:
            lines += [
                f"{name} {self.costs[name]:,.6g} of {bound:,.6g}"
                for name, bound in self.budget.bounds.items()
            ]
        if self.metric is not None:
            lines.append(f"metric {self.metric:.4g}")
        return "\n".join(lines)
