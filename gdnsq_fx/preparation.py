"""The steps of `prepare` and `load` before calibration."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.fx import GraphModule

from gdnsq_fx.annotations import KEY, ModelFacts
from gdnsq_fx.capture.capture import capture
from gdnsq_fx.errors import ConfigError
from gdnsq_fx.inputs import ExampleInput, check_device
from gdnsq_fx.opinfo import OpTable
from gdnsq_fx.passes import (
    AnnotateOperations,
    ExposeWeights,
    FoldBatchNorm,
    InsertQuantizers,
    Pass,
    PropagateShapes,
)
from gdnsq_fx.spec import QuantConfig


def warn_of_meta(calibration: Iterable[Any] | None) -> None:
    """A model without values cannot be calibrated now.

    Raises:
        ConfigError: calibration batches were given all the same.
    """
    if calibration is not None:
        raise ConfigError(
            "a model on the meta device has no values to calibrate with; leave "
            "calibration out and run gdnsq_fx.passes.Calibrate once it has weights"
        )
    warnings.warn(
        "the model is on the meta device: its quantizers are not calibrated; load the "
        "weights, then run gdnsq_fx.passes.Calibrate",
        stacklevel=3,
    )


def checked_config(config: object) -> QuantConfig:
    """The configuration, or the default for None.

    Raises:
        ConfigError: it is something else.
    """
    if config is None:
        return QuantConfig()
    if not isinstance(config, QuantConfig):
        raise ConfigError(
            f"config must be a QuantConfig, got {config!r}; write "
            "gdnsq_fx.QuantConfig(weight_bits=2, act_bits=2)"
        )
    return config


def captured_model(
    model: nn.Module,
    example_input: ExampleInput,
    facts: ModelFacts,
    table: OpTable,
    *,
    inplace: bool = False,
    opaque: Mapping[str, str] = MappingProxyType({}),
) -> GraphModule:
    """The graph of a copy of the model (or of itself), with its facts."""
    args, kwargs = facts.inputs.args_kwargs(example_input)
    check_device(model, args, kwargs)
    captured = capture(model, args, kwargs, table, inplace=inplace, opaque=opaque)
    captured.meta[KEY] = facts
    return captured


def insertion_passes(
    example_input: ExampleInput, facts: ModelFacts, table: OpTable
) -> tuple[Pass, ...]:
    """The passes from a captured graph to one with quantizers."""
    args, kwargs = facts.inputs.args_kwargs(example_input)
    return (
        AnnotateOperations(table),
        ExposeWeights(table),
        PropagateShapes(args, kwargs),
        *((FoldBatchNorm(),) if facts.folded else ()),
        InsertQuantizers(facts.config),
    )
