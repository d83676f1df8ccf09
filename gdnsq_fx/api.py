"""The facade: each function reads as a list of named steps."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.fx import GraphModule

from gdnsq_fx.analysis.divergence import Curvature
from gdnsq_fx.analysis.report import CapacityReport, build_report
from gdnsq_fx.annotations import KEY, ModelFacts, model_facts
from gdnsq_fx.capture.capture import capture
from gdnsq_fx.deploy import checkpoint
from gdnsq_fx.errors import (
    ConfigError,
    NothingToQuantizeError,
    NotQuantizedError,
    PassError,
    PatternError,
)
from gdnsq_fx.inputs import ExampleInput, InputStructure, check_device
from gdnsq_fx.opinfo import OpTable
from gdnsq_fx.optable import DEFAULT_TABLE
from gdnsq_fx.passes import (
    AnalyzeCapacity,
    AnnotateOperations,
    Calibrate,
    ExposeWeights,
    FoldBatchNorm,
    FreezeQuantizers,
    InsertQuantizers,
    LowerToInteger,
    Pass,
    PropagateShapes,
    release_masks,
    run_passes,
)
from gdnsq_fx.sites import require_quantizers
from gdnsq_fx.spec import QuantConfig


def prepare(
    model: nn.Module,
    example_input: ExampleInput,
    config: QuantConfig | None = None,
    calibration: Iterable[Any] | None = None,
    *,
    fold_batch_norm: bool = False,
    table: OpTable = DEFAULT_TABLE,
    inplace: bool = False,
) -> GraphModule:
    """Capture a model and insert calibrated, learnable quantizers.

    Args:
        model: any module; it is left untouched (but see ``inplace``).
        example_input: a tensor, a tuple of arguments, or a dict of keyword arguments.
        config: bits, estimators, what to include; W2A2 by default.
        calibration: batches that place the levels, alone or followed by targets;
            without them the example input does, with a warning.
        fold_batch_norm: fold BatchNorm into the layers before it (evaluation only).
        table: the op table; ``DEFAULT_TABLE.with_rows(OpInfo(...))`` adds operations.
        inplace: share parameters and sub-modules with the model instead of copying
            them, for large models: fine-tuning then changes the model's weights.

    Returns:
        A GraphModule in the model's mode whose ``state_dict()`` holds every key of the
        model's, plus ``quantizers.*``.

    Raises:
        CaptureError, ConfigError, PatternError, NothingToQuantizeError,
        NotQuantizedError, CalibrationError, BatchStructureError, DeviceMismatchError:
            as they say.
        PassError: the model is prepared already, or BatchNorm is to be folded while
            the model is in training.
    """
    config = _checked_config(config)
    if isinstance(model, GraphModule) and KEY in getattr(model, "meta", {}):
        raise PassError(
            "the model was prepared or converted before; prepare the original model"
        )
    inputs = InputStructure.of(example_input)
    if calibration is None:
        calibration = [example_input]
        warnings.warn(
            "no calibration batches: levels are placed from the example input alone; "
            "pass calibration=batches of real data",
            stacklevel=2,
        )
    facts = ModelFacts(config, inputs, fold_batch_norm)
    captured = _captured(model, example_input, facts, table, inplace=inplace)
    insertion = _insertion(example_input, facts, table)
    return run_passes(captured, (*insertion, Calibrate(calibration, inputs)))


def analyze(
    qmodel: GraphModule,
    batches: Iterable[Any],
    *,
    draws: int = 4,
    confirm: int = 0,
    curvature: Curvature = "softmax",
) -> CapacityReport:
    """Measure where quantization costs information; the model is left as it was.

    Args:
        qmodel: a prepared model.
        batches: real data, alone or followed by targets.
        draws: random sign vectors for each batch; more of them, less variance.
        confirm: measure this many of the worst edges as well, one at a time.
        curvature: ``softmax`` where outputs are logits, ``identity`` for regression.

    Raises:
        CalibrationError: no batch. PassError: not a prepared model.
    """
    inputs = model_facts(qmodel).inputs
    run_passes(qmodel, (AnalyzeCapacity(batches, inputs, draws, confirm, curvature),))
    return build_report(qmodel)


def convert(qmodel: GraphModule) -> GraphModule:
    """Freeze to whole levels and emit the integer graph; ``qmodel`` is left as it was.

    Returns:
        A plain GraphModule in evaluation mode with integer weights, that computes
        exactly what the fine-tuned model computes in evaluation.

    Raises:
        PassError: not a prepared model, or not calibrated.
    """
    model_facts(qmodel)
    require_quantizers(qmodel, "convert")
    frozen = copy.deepcopy(qmodel).eval()
    return run_passes(frozen, (FreezeQuantizers(), LowerToInteger()))


def save(imodel: GraphModule, path: str | os.PathLike[str]) -> int:
    """Write a converted model as one safetensors file with bit-packed weights.

    Args:
        imodel: what `convert` returned.
        path: file to write, atomically.

    Returns:
        Size of the file in bytes.

    Raises:
        PassError: not a converted model.
    """
    return checkpoint.write(imodel, path)


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    example_input: ExampleInput,
    *,
    table: OpTable = DEFAULT_TABLE,
) -> GraphModule:
    """Read a converted model back; nothing is unpickled.

    Args:
        path: a file that `save` wrote.
        model: an instance of the original class, with any weights; left untouched.
        example_input, table: as for `prepare`.

    Returns:
        The converted model, in evaluation mode.

    Raises:
        FileFormatError: the file is truncated, foreign, or of another model.
        FileNotFoundError: there is no file.
    """
    contents = checkpoint.read(path)
    facts = ModelFacts(
        contents.config, InputStructure.of(example_input), contents.folded
    )
    captured = _captured(model, example_input, facts, table).eval()
    try:
        skeleton = run_passes(captured, _insertion(example_input, facts, table))
    except (NothingToQuantizeError, NotQuantizedError, PatternError) as error:
        raise checkpoint.other_model(contents, str(error)) from error
    release_masks(skeleton, contents.masks)
    checkpoint.place_levels(skeleton, contents)
    return checkpoint.fill(convert(skeleton), contents)


def _checked_config(config: object) -> QuantConfig:
    if config is None:
        return QuantConfig()
    if not isinstance(config, QuantConfig):
        raise ConfigError(
            f"config must be a QuantConfig, got {config!r}; write "
            "gdnsq_fx.QuantConfig(weight_bits=2, act_bits=2)"
        )
    return config


def _captured(
    model: nn.Module,
    example_input: ExampleInput,
    facts: ModelFacts,
    table: OpTable,
    *,
    inplace: bool = False,
) -> GraphModule:
    """The graph of a copy of the model (or of itself), with its facts."""
    args, kwargs = facts.inputs.args_kwargs(example_input)
    check_device(model, args, kwargs)
    captured = capture(model, args, kwargs, table, inplace=inplace)
    captured.meta[KEY] = facts
    return captured


def _insertion(
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
