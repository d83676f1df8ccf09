"""How each method of the studies turns a trained ResNet-20 into a quantized one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from statistics import mean
from typing import Any

import torch
from cifar_images import Augmented, Images
from resnet20 import ResNet20
from torch import Tensor, nn

import gdnsq_fx
from gdnsq_fx.demo.seeding import seeded
from gdnsq_fx.inputs import Batch
from gdnsq_fx.training.batch_norm import reestimate_batch_norm

CALIBRATION = 512
# Batches on which every method measures the statistics of BatchNorm at the end.
REESTIMATED = 20


@dataclass(frozen=True)
class Setting:
    """What one run is about; the same for every method.

    Attributes:
        bits: of weights and activations; the first and the last layer stay in floating
            point, as in the paper.
        seed: of the order of the images, their augmentation and all random draws.
        steps, batch: optimizer steps, images in each.
    """

    bits: int
    seed: int
    steps: int
    batch: int


@dataclass(frozen=True)
class Trained:
    """A model in evaluation; mean bits before the last step brought them to target.

    Attributes:
        met: every bit-width is at or under its target.
    """

    model: nn.Module
    mean_bits: float
    met: bool


# What the teacher of this process answered, by the bytes of a batch.
_ANSWERS: dict[bytes, Tensor] = {}


class Remembering(nn.Module):
    """A teacher that answers each batch once: all runs of a seed see the same ones.

    Args:
        teacher: the only one that this process asks.
    """

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch."""
        key = hashlib.sha256(images.permute(0, 2, 3, 1).numpy().tobytes()).digest()
        if key not in _ANSWERS:
            _ANSWERS[key] = self.teacher(images).clone()
        return _ANSWERS[key]


Method = Callable[[ResNet20, Images, Setting], Trained]


def ours(**changes: Any) -> Method:
    """`finetune` as it is by default for this precision, but for ``changes``.

    ``calibrated=False`` calibrates on noise; ``config`` changes the `QuantConfig`,
    ``schedule`` the `Schedule`; all else goes to `finetune`.
    """

    def run(teacher: ResNet20, train: Images, setting: Setting) -> Trained:
        given = dict(changes)
        calibration = train.first(CALIBRATION).batches(setting.batch)
        if not given.pop("calibrated", True):
            calibration = _noise(calibration, setting.seed)
        config = gdnsq_fx.QuantConfig(
            setting.bits, setting.bits, first_last="exclude", **given.pop("config", {})
        )
        made = given.pop("schedule", None)
        schedule = None if made is None else made(setting.steps)
        qmodel = gdnsq_fx.prepare(teacher, calibration[0], config, calibration)
        with seeded(setting.seed):
            result = gdnsq_fx.finetune(
                qmodel,
                Augmented(train, setting.batch, setting.seed),
                steps=setting.steps,
                teacher=Remembering(teacher),
                schedule=schedule,
                batch_norm_batches=REESTIMATED,
                progress=False,
                **given,
            )
        reached = result.history[-2].mean_bits  # before the last step's projection
        return Trained(qmodel, reached, max(result.bits.values()) <= setting.bits)

    return run


def peer(
    convert: Callable[[nn.Module, int, list[Tensor]], nn.Module], lr: float
) -> Method:
    """Other quantizers, in the same loop at fixed bits."""

    def run(teacher: ResNet20, train: Images, setting: Setting) -> Trained:
        from study_loop import train as distil

        calibration = train.first(CALIBRATION).batches(setting.batch)
        copied = ResNet20()
        copied.load_state_dict(teacher.state_dict())
        with seeded(setting.seed):
            model = convert(copied.eval(), setting.bits, calibration)
            batches = Augmented(train, setting.batch, setting.seed)
            schedule = gdnsq_fx.Schedule(setting.steps, start_bits=setting.bits)
            distil(model, Remembering(teacher), batches, schedule, lr)
            rest = (Batch((images,), {}, None) for images, _ in batches)
            reestimate_batch_norm(model, islice(rest, REESTIMATED))
        return Trained(model, float(setting.bits), True)

    return run


def _noise(batches: list[Tensor], seed: int) -> list[Tensor]:
    """Normal noise instead of images, of the same mean and variance."""
    generator = torch.Generator().manual_seed(seed)
    center = mean(float(batch.mean()) for batch in batches)
    spread = mean(float(batch.std()) for batch in batches)
    return [
        torch.randn(batch.shape, generator=generator) * spread + center
        for batch in batches
    ]
