"""What makes a fine-tuning run the same run, so that its checkpoint may be used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

from torch import nn
from torch.fx import GraphModule

from gdnsq_fx.sites import sites
from gdnsq_fx.training.checkpoint_folder import Identity, digest
from gdnsq_fx.training.schedule import Schedule
from gdnsq_fx.training.settings import Settings
from gdnsq_fx.training.stored_state import model_state

# How often something is saved or looked at does not change where a run leads.
_FREE = ("checkpoint_every",)


def identity_of(
    qmodel: GraphModule,
    teacher: nn.Module,
    schedule: Schedule,
    settings: Settings,
    choices: Mapping[str, object],
) -> Identity:
    """Identity of a run that is about to begin.

    Weights and quantizers count as they are before the first step, values included:
    a teacher of other weights, or other levels, would not lead to the same end.

    Args:
        qmodel, teacher: as given to `finetune`, before anything is changed.
        schedule, settings: of the run.
        choices: whatever else it depends on; functions count by their name.
    """
    numbers = {k: v for k, v in asdict(settings).items() if k not in _FREE}
    specs = {site.edge: repr(site.quantizer.spec) for site in sites(qmodel)}
    return {
        **{name: repr(value) for name, value in asdict(schedule).items()},
        **{name: repr(value) for name, value in numbers.items()},
        **{name: _named(value) for name, value in choices.items()},
        "edges": json.dumps(specs),
        "model": digest(model_state(qmodel)),
        "teacher": digest(model_state(teacher)),
    }


def _named(value: object) -> str:
    if not callable(value):
        return repr(value)
    kind = type(value)
    return str(getattr(value, "__qualname__", f"{kind.__module__}.{kind.__name__}"))
