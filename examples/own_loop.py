"""Fine-tune in a loop of one's own: loss, constraint and schedule as pieces.

    python examples/own_loop.py

`gdnsq_fx.finetune` does the same, and checks, validates, logs and resumes besides.
"""

from __future__ import annotations

import itertools
from functools import partial

import torch
from torch import nn

import gdnsq_fx
from gdnsq_fx.sites import hard_bits
from gdnsq_fx.training.constraint import Constraint
from gdnsq_fx.training.parameter_groups import parameter_groups

STEPS = 200


def main() -> None:
    """Bring a small network to two bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    batches = list(torch.randn(8, 64, 16))
    config = gdnsq_fx.QuantConfig(weight_bits=2, act_bits=2, first_last=None)
    qmodel = gdnsq_fx.prepare(model, batches[0], config, calibration=batches)

    schedule, constraint = gdnsq_fx.Schedule(STEPS, start_bits=2), Constraint(qmodel)
    constraint.open_to(schedule.start_bits)
    optimizer = torch.optim.Adam(parameter_groups(qmodel, schedule, lr=1e-3))
    factor = schedule.learning_rate_factor
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    qmodel.train()
    for step, x in zip(range(STEPS), itertools.cycle(batches), strict=False):
        with torch.no_grad():
            wanted = model(x)
        with gdnsq_fx.recomputed_levels():  # less memory, the same gradients
            output = qmodel(x)
        loss = gdnsq_fx.distillation_loss(output, wanted)
        constraint.observe_loss(loss)
        optimizer.zero_grad()
        (loss + constraint.penalty(schedule.progress(step))).backward()
        cap = partial(schedule.cap, step)
        constraint.align_gradients(cap)
        optimizer.step()
        rates.step()
        constraint.project(cap)
    qmodel.eval()

    print("loss:", f"{float(loss.detach()):.4f}")
    print("bits:", hard_bits(qmodel))
    print("above target:", constraint.violations())


if __name__ == "__main__":
    main()
