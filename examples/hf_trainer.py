"""Fine-tune inside the ``Trainer`` of transformers: a loss and a callback.

    pip install transformers accelerate
    python examples/hf_trainer.py

A tiny classifier with random weights and random data, so that nothing is downloaded.
The loss adds the penalty; the callback projects after every optimizer step.
"""

from __future__ import annotations

import copy
import tempfile
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import gdnsq_fx
from gdnsq_fx.sites import hard_bits
from gdnsq_fx.training.constraint import Constraint
from gdnsq_fx.training.parameter_groups import parameter_groups

STEPS, BATCH, LENGTH = 30, 8, 12


class Sentences(Dataset[dict[str, Tensor]]):
    """Random tokens; the class is the parity of the first one."""

    def __init__(self) -> None:
        self.ids = torch.randint(0, 50, (64, LENGTH))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids[0] % 2}


class QuantizedTrainer(Trainer):
    """Task loss, distillation from the original model, and the penalty."""

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module,
        constraint: Constraint,
        schedule: gdnsq_fx.Schedule,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher
        self.constraint = constraint
        self.schedule = schedule

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Called by ``Trainer`` for each batch."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        with gdnsq_fx.recomputed_levels():  # less memory, the same gradients
            output = model(**inputs)
        with torch.no_grad():
            wanted = self.teacher(**inputs)
        loss = nn.functional.cross_entropy(output["logits"], labels)
        loss = loss + gdnsq_fx.distillation_loss(output, wanted)
        if model.training:
            self.constraint.observe_loss(loss)
            progress = self.schedule.progress(self.state.global_step)
            loss = loss + self.constraint.penalty(progress)
        return (loss, output) if return_outputs else loss


class Projection(TrainerCallback):
    """Holds every capacity under the cap, which comes down to its target."""

    def __init__(self, constraint: Constraint, schedule: gdnsq_fx.Schedule) -> None:
        self.constraint = constraint
        self.schedule = schedule

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Before it, ``global_step`` does not count this step yet."""
        self.constraint.align_gradients(partial(self.schedule.cap, state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimizer step; ``global_step`` counts it already."""
        self.constraint.project(partial(self.schedule.cap, state.global_step - 1))


def main() -> None:
    """Bring a tiny BERT to four bits."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
    )
    model, data = BertForSequenceClassification(config).eval(), Sentences()
    rows = [data[index] for index in range(BATCH)]
    example = {
        key: torch.stack([row[key] for row in rows])
        for key in ("input_ids", "attention_mask")
    }
    bits = gdnsq_fx.QuantConfig(weight_bits=4, act_bits=4)
    qmodel = gdnsq_fx.prepare(copy.deepcopy(model), example, bits, [example])

    schedule, constraint = gdnsq_fx.Schedule(STEPS, start_bits=4), Constraint(qmodel)
    constraint.open_to(schedule.start_bits)
    optimizer = torch.optim.Adam(parameter_groups(qmodel, schedule, lr=1e-3))
    factor = schedule.learning_rate_factor
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    with tempfile.TemporaryDirectory() as folder:
        trainer = QuantizedTrainer(
            qmodel,
            TrainingArguments(
                folder,
                max_steps=STEPS,
                per_device_train_batch_size=BATCH,
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
            ),
            train_dataset=data,
            optimizers=(optimizer, rates),
            callbacks=[Projection(constraint, schedule)],
            teacher=model,
            constraint=constraint,
            schedule=schedule,
        )
        print("loss:", f"{trainer.train().training_loss:.4f}")
    qmodel.eval()
    print("widest:", max(hard_bits(qmodel).values()), "bits")
    print("above target:", constraint.violations())


if __name__ == "__main__":
    main()
