"""Which constraint a run obeys: fixed targets, or bits found within a budget."""

from __future__ import annotations

from torch.fx import GraphModule

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
) -> Constraint | BudgetedBits:
    """Fixed targets, or bits that are found within a `Budget`: from a plan where the
    schedule starts at its targets, else coming down.

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
    kind = PlannedBits if schedule.start_bits <= 1.0 else LearnedBits
    return kind(qmodel, budget, schedule, group)
