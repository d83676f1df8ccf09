"""What the quantizers of activations and of weights share, and their switches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from gdnsq_fx.errors import CalibrationError
from gdnsq_fx.quantize.kernels import Kernels, checked_kernels
from gdnsq_fx.spec import Offset, QuantSpec


class Quantizer(nn.Module, ABC):
    """What both quantizers share: an edge, a spec, a learnable log2 step, a switch.

    Attributes:
        edge: name of the edge, such as ``layer1.0.conv1.weight``.
        spec: its fixed choices.
        enabled: when False the module passes its input on unchanged.
        kernels: what computes it, see `use_kernels`.
        log2_step: learnable, s = 2^log2_step.
    """

    log2_step: nn.Parameter
    most_halved: ClassVar[int]
    """Bits up to which the offset ``half_step`` means half steps, not whole ones."""

    def __init__(self, edge: str, spec: QuantSpec) -> None:
        super().__init__()
        self.edge = edge
        self.spec = spec
        self.enabled = True
        self.kernels: Kernels = "auto"

    @property
    def step(self) -> Tensor:
        """Step s > 0."""
        return torch.exp2(self.log2_step)

    @property
    def offset_mode(self) -> Offset:
        """That of the spec, but whole steps where bits have no use for halves."""
        halved = self.spec.offset == "half_step"
        wide = self.spec.bits > self.most_halved
        return "integer" if halved and wide else self.spec.offset

    @property
    def is_calibrated(self) -> bool:
        """Whether every step is a number yet."""
        return bool(torch.isfinite(self.log2_step).all())

    def extra_repr(self) -> str:
        """Edge, target and state for ``print(module)``."""
        state = "" if self.enabled else ", disabled"
        return (
            f"{self.edge}, bits<={self.spec.bits}, {self.spec.estimator}, "
            f"{self.offset_mode}{state}"
        )

    @abstractmethod
    def quantize(self, value: Tensor) -> Tensor:
        """The quantized value, whether enabled or not."""

    def forward(self, value: Tensor) -> Tensor:
        """Quantize, or pass on unchanged where disabled."""
        return self.quantize(value) if self.enabled else value

    def _require_calibration(self) -> None:
        if not self.is_calibrated:
            raise CalibrationError(
                f"{self.edge} was never calibrated; run the Calibrate pass, or "
                "gdnsq_fx.prepare, which does"
            )


def use_kernels(module: nn.Module, kernels: Kernels) -> None:
    """Choose what computes the quantizers of a prepared model.

    Args:
        module: anything that contains quantizers.
        kernels: ``eager``, operations of torch; ``native``, kernels in C on CPUs, where
            a C compiler is found; ``compile``, regions of `torch.compile`, where that
            works; or ``auto``: ``native`` on CPUs, ``compile`` on CUDA devices.

    Raises:
        ConfigError: another choice.
    """
    checked_kernels(kernels)
    for quantizer in module.modules():
        if isinstance(quantizer, Quantizer):
            quantizer.kernels = kernels


@contextmanager
def quantization_disabled(module: nn.Module) -> Generator[None]:
    """Run a prepared model at identity precision inside the ``with`` block.

    Args:
        module: anything that contains quantizers; they are switched back afterwards.
    """
    with _switched(module, False):
        yield


@contextmanager
def quantization_enabled(module: nn.Module) -> Generator[None]:
    """Run a prepared model with every quantizer on inside the ``with`` block."""
    with _switched(module, True):
        yield


@contextmanager
def _switched(module: nn.Module, enabled: bool) -> Generator[None]:
    quantizers = [m for m in module.modules() if isinstance(m, Quantizer)]
    switches = [q.enabled for q in quantizers]
    for quantizer in quantizers:
        quantizer.enabled = enabled
    try:
        yield
    finally:
        for quantizer, before in zip(quantizers, switches, strict=True):
            quantizer.enabled = before
