"""Fine-tune inside the ``Trainer`` of Lightning: a module and a callback.

    pip install lightning
    python examples/lightning_callback.py

The module's loss adds the penalty; the callback projects after every optimizer step. A
small network and random data, so that nothing is downloaded.
"""

from __future__ import annotations

import copy
import tempfile
from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.data import DataLoader, TensorDataset

import gdnsq_fx
from gdnsq_fx.sites import hard_bits
from gdnsq_fx.training.constraint import Constraint
from gdnsq_fx.training.parameter_groups import parameter_groups

STEPS, BATCH = 100, 32


class Quantized(lightning.LightningModule):
    """A prepared model, the model it came from, and what holds its bits."""

    def __init__(
        self, qmodel: GraphModule, teacher: nn.Module, schedule: gdnsq_fx.Schedule
    ) -> None:
        super().__init__()
        self.qmodel = qmodel
        self.teacher = teacher.requires_grad_(False)
        self.schedule = schedule
        self.constraint = Constraint(qmodel)
        self.constraint.open_to(schedule.start_bits)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Distillation from the original model, and the penalty."""
        (images,) = batch
        with torch.no_grad():
            wanted = self.teacher.eval()(images)
        loss = gdnsq_fx.distillation_loss(self.qmodel(images), wanted)
        self.log("loss", loss)
        self.constraint.observe_loss(loss)
        progress = self.schedule.progress(self.global_step)
        return loss + self.constraint.penalty(progress)

    def configure_optimizers(self) -> Any:
        """Each quantizer at the rate that its descent needs."""
        groups = parameter_groups(self.qmodel, self.schedule, lr=1e-3)
        optimizer = torch.optim.Adam(groups)
        factor = self.schedule.learning_rate_factor
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        scheduler = {"scheduler": rates, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Projection(Callback):
    """Holds every capacity under the cap, which comes down to its target."""

    def on_before_optimizer_step(
        self, trainer: Any, pl_module: Any, optimizer: Any
    ) -> None:
        """Before it, ``global_step`` does not count this step yet."""
        cap = partial(pl_module.schedule.cap, pl_module.global_step)
        pl_module.constraint.align_gradients(cap)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the optimizer step; ``global_step`` counts it already."""
        cap = partial(pl_module.schedule.cap, pl_module.global_step - 1)
        pl_module.constraint.project(cap)


def main() -> None:
    """Bring a small network to two bits."""
    lightning.seed_everything(0, verbose=False)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    data = torch.randn(512, 16)
    config = gdnsq_fx.QuantConfig(weight_bits=2, act_bits=2, first_last=None)
    qmodel = gdnsq_fx.prepare(copy.deepcopy(model), data[:BATCH], config, [data])
    module = Quantized(qmodel.train(), model, gdnsq_fx.Schedule(STEPS, start_bits=2))
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            callbacks=[Projection()],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(TensorDataset(data), BATCH, shuffle=True))
        print("loss:", f"{float(trainer.callback_metrics['loss']):.4f}")
    qmodel.eval()
    print("bits:", hard_bits(qmodel))
    print("above target:", module.constraint.violations())


if __name__ == "__main__":
    main()
