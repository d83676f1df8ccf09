"""The facade: each function reads as a list of named steps."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.fx import GraphModule

from gdnsq_fx.analysis.allocation import Allocation, best_allocation
from gdnsq_fx.analysis.cost_model import CostModel
from gdnsq_fx.analysis.divergence import Curvature
from gdnsq_fx.analysis.report import CapacityReport, build_report, divergences_at
from gdnsq_fx.annotations import KEY, ModelFacts, model_facts
from gdnsq_fx.budget import Budget
from gdnsq_fx.errors import ConfigError, PassError
from gdnsq_fx.inputs import ExampleInput, InputStructure
from gdnsq_fx.opinfo import OpTable
from gdnsq_fx.optable import DEFAULT_TABLE
from gdnsq_fx.passes import AnalyzeCapacity, AssignBits, Calibrate, run_passes
from gdnsq_fx.preparation import (
    captured_model,
    checked_config,
    insertion_passes,
    warn_of_meta,
)
from gdnsq_fx.spec import QuantConfig
from gdnsq_fx.state import is_on_meta


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
        model's, plus ``quantizers.*``. Of a model on the meta device, which has no
        values, the quantizers are not calibrated yet: after ``to_empty`` and
        ``load_state_dict(..., strict=False)`` run ``gdnsq_fx.passes.Calibrate``.

    Raises:
        CaptureError, ConfigError, PatternError, NothingToQuantizeError,
        NotQuantizedError, CalibrationError, BatchStructureError, DeviceMismatchError:
            as they say.
        PassError: the model is prepared already, or BatchNorm is to be folded while
            the model is in training.
    """
    config = checked_config(config)
    if isinstance(model, GraphModule) and KEY in getattr(model, "meta", {}):
        raise PassError(
            "the model was prepared or converted before; prepare the original model"
        )
    inputs = InputStructure.of(example_input)
    facts = ModelFacts(config, inputs, fold_batch_norm)
    if is_on_meta(model):
        captured = captured_model(model, example_input, facts, table, inplace=inplace)
        warn_of_meta(calibration)
        return run_passes(captured, insertion_passes(example_input, facts, table))
    if calibration is None:
        calibration = [example_input]
        warnings.warn(
            "no calibration batches: levels are placed from the example input alone; "
            "pass calibration=batches of real data",
            stacklevel=2,
        )
    captured = captured_model(model, example_input, facts, table, inplace=inplace)
    insertion = insertion_passes(example_input, facts, table)
    calibrate = Calibrate(calibration, inputs, example_input)
    return run_passes(captured, (*insertion, calibrate))


def analyze(
    qmodel: GraphModule,
    batches: Iterable[Any],
    *,
    draws: int = 4,
    confirm: int = 0,
    curvature: Curvature = "softmax",
    joint: bool = True,
    widths: Sequence[int] = (),
    advice: bool = True,
) -> CapacityReport:
    """Measure where quantization costs information; the model is left as it was.

    Args:
        qmodel: a prepared model.
        batches: real data, alone or followed by targets.
        draws: backward passes for each batch, a power of two; more, less variance.
        confirm: measure this many of the worst edges as well, one at a time.
        curvature: ``softmax`` where outputs are logits, ``identity`` for regression.
        joint: predict what each edge costs in the quantized model as well.
        widths: predict each edge at these bit-widths too (``divergence_at``).
        advice: predict each edge at one bit more (``report.advice``).

    Raises:
        CalibrationError: no batch. PassError: not a prepared model.
    """
    inputs = model_facts(qmodel).inputs
    analysis = AnalyzeCapacity(
        batches, inputs, draws, confirm, curvature, joint, widths, advice
    )
    run_passes(qmodel, (analysis,))
    return build_report(qmodel)


def allocate(
    qmodel: GraphModule,
    batches: Iterable[Any],
    budget: Budget,
    *,
    widths: Sequence[int] = tuple(range(1, 9)),
    draws: int = 4,
    curvature: Curvature = "softmax",
) -> Allocation:
    """Choose a bit-width for every edge: least predicted divergence within a budget.

    The choice is optimal for the predictions (an integer programme, see
    ``analysis/allocation.py``); ``qmodel`` is left as it was. `assign_bits` applies it.

    Args:
        qmodel: a prepared model.
        batches: real data, alone or followed by targets.
        budget: what the assignment may cost.
        widths: bit-widths to choose from, 1..16.
        draws, curvature: as for `analyze`.

    Raises:
        BudgetError: no assignment of these widths meets it.
        CalibrationError: no batch. PassError: not a prepared model.
        ConfigError: no widths, or one outside its domain.
    """
    if not widths:
        raise ConfigError("allocate needs at least one bit-width to choose from")
    analyze(
        qmodel, batches, draws=draws, curvature=curvature, joint=False, widths=widths
    )
    return best_allocation(divergences_at(qmodel), CostModel.of(qmodel), budget)


def assign_bits(
    qmodel: GraphModule,
    bits: Allocation | Mapping[str, int],
    calibration: Iterable[Any],
) -> GraphModule:
    """Give edges targets of their own and place the levels for them, in place.

    Args:
        qmodel: a prepared model.
        bits: what `allocate` returned, or edge -> bits; edges left out keep theirs.
        calibration: batches that place the levels.

    Returns:
        ``qmodel``.

    Raises:
        PassError: there is no such edge. ConfigError: bits outside 1..16.
        CalibrationError: no batch.
    """
    chosen = bits.bits if isinstance(bits, Allocation) else bits
    inputs = model_facts(qmodel).inputs
    return run_passes(qmodel, (AssignBits(chosen), Calibrate(calibration, inputs)))
