"""Which constraint a run obeys: fixed targets, or bits found within a budget."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from gdnsq_fx.analysis.allocation import Divergences
from gdnsq_fx.budget import Budget
from gdnsq_fx.errors import ConfigError
from gdnsq_fx.training.budgeted_bits import BudgetedBits
from gdnsq_fx.training.constraint import Constraint
from gdnsq_fx.training.learned_bits import LearnedBits
from gdnsq_fx.training.planned_bits import PlannedBits
from gdnsq_fx.training.process_group import ProcessGroup
from gdnsq_fx.training.schedule import Schedule


def constraint_for(
    qmodel: GraphModule,
    budget: object,
    schedule: Schedule,
    group: ProcessGroup | None = None,
    predicted: Divergences | None = None,
) -> Constraint | BudgetedBits:
    """Fixed targets, or bits that are found within a `Budget`: from a plan where the
    schedule starts at its targets, else coming down.

    Args:
        qmodel: a prepared model.
        budget: a `Budget`, or None for fixed targets.
        schedule: of the run.
        group: the processes that train the model.
        predicted: what a plan is made from, as in `PlannedBits`.

    Raises:
        BudgetError: no bits meet it. ConfigError: it is none.
    """
    if budget is None:
        return Constraint(qmodel)
    if not isinstance(budget, Budget):
        raise ConfigError(
            f"budget must be a Budget, got {budget!r}; write "
            "gdnsq_fx.Budget(weight_bytes=...)"
        )
    if starts_at_plan(schedule):
        return PlannedBits(qmodel, budget, schedule, group, predicted)
    return LearnedBits(qmodel, budget, schedule, group)


def starts_at_plan(schedule: Schedule) -> bool:
    """Whether a run under a budget starts at whole bits."""
    return schedule.start_bits <= 1.0


@dataclass(frozen=True)
class Limits:
    """What a run must obey, before there is a model to train.

    Attributes:
        budget, predicted: as in `constraint_for`.
    """

    budget: Budget | None = None
    predicted: Divergences | None = None

    def constraint(
        self, qmodel: GraphModule, schedule: Schedule, group: ProcessGroup
    ) -> Constraint | BudgetedBits:
        """As `constraint_for`, of the working model."""
        return constraint_for(qmodel, self.budget, schedule, group, self.predicted)
