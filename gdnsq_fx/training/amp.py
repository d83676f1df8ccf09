"""Automatic mixed precision: forward in a narrow type, parameters in float32."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gdnsq_fx.errors import ConfigError
from gdnsq_fx.inputs import model_device

Autocast = Literal["bfloat16", "float16"]
_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class MixedPrecision:
    """What an optimizer step does differently under ``torch.autocast``.

    Parameters stay in float32, those of the quantizers included, and so do codes,
    capacities and the penalty: a quantizer widens its input to its step's type. Its
    levels are rounded to the narrow type where a layer reads them, in training alone.
    In float16 small gradients vanish, so the loss is scaled up and gradients down.

    Args:
        model: on one device; decides which autocast.
        autocast: None leaves everything as it is.

    Raises:
        ConfigError: another type, or weights that are not float32.
    """

    def __init__(self, model: nn.Module, autocast: Autocast | None) -> None:
        self._type = None if autocast is None else _type_of(autocast, model)
        device = model_device(model)
        self._device = "cpu" if device is None else device.type
        scaled = self._type is torch.float16
        self._scaler: Any = torch.amp.GradScaler(self._device) if scaled else None

    def autocast(self) -> AbstractContextManager[object]:
        """The block in which outputs and loss are computed."""
        if self._type is None:
            return nullcontext()
        return torch.autocast(self._device, self._type)

    def backward(self, loss: Tensor) -> None:
        """Backward from the loss, scaled in float16."""
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def unscale(self, optimizer: Optimizer) -> None:
        """Gradients in the loss's own units from here on."""
        if self._scaler is not None:
            self._scaler.unscale_(optimizer)

    def update(self, optimizer: Optimizer, *, usable: bool) -> None:
        """Take the step if it is usable; after an overflow lower the scale."""
        if usable:
            optimizer.step()  # finite gradients: the scaler would do the same
        if self._scaler is not None:
            self._scaler.update()

    @property
    def may_overflow(self) -> bool:
        """Whether an overflow may come of the scale alone, which then goes down."""
        return self._scaler is not None and self._scaler.get_scale() > 1.0

    def state(self) -> dict[str, Tensor]:
        """Of the scaler, if there is one."""
        if self._scaler is None:
            return {}
        found = self._scaler.state_dict()
        values = [found["scale"], found["_growth_tracker"]]
        return {"scaler": torch.tensor(values, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned."""
        if self._scaler is None:
            return
        scale, tracker = state["scaler"].tolist()
        own = self._scaler.state_dict()
        self._scaler.load_state_dict(
            {**own, "scale": scale, "_growth_tracker": int(tracker)}
        )


def _type_of(autocast: str, model: nn.Module) -> torch.dtype:
    if autocast not in _TYPES:
        raise ConfigError(
            f"autocast must be one of {', '.join(_TYPES)} or None, got {autocast!r}"
        )
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    narrow = {dtype for dtype in floating if dtype is not torch.float32}
    if narrow:
        raise ConfigError(
            f"autocast needs weights in float32, and some are {narrow.pop()}; call "
            "model.float() before gdnsq_fx.prepare, or leave autocast out"
        )
    return _TYPES[autocast]
