"""What is checked for one model of the zoo: each check a function, each a `Result`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import Case, Mode
from outputs import GRADIENT_FLOOR, Comparison, compare, gradients, leaves
from result import Blocked, CheckFailed, NotApplicable, Result, Status, brief
from running import (
    evaluated,
    forward,
    require_finite,
    require_gradients,
    trained,
)
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.analysis.coverage import coverage_of
from gdnsq_fx.inputs import InputStructure
from gdnsq_fx.sites import sites

Finding = tuple[float | None, str]
Check = Callable[[Any], Finding]
TOLERANCE = 1e-4  # identity precision against eager, share of a tensor's range
CONVERTED_TOLERANCE = 1e-5  # converted against prepared


@dataclass
class Subject:
    """The model that is checked; checks share it, since building costs most."""

    case: Case
    model: nn.Module = field(default_factory=nn.Module)
    qmodel: GraphModule | None = None

    @property
    def prepared(self) -> GraphModule:
        """The prepared model."""
        if self.qmodel is None:
            raise Blocked("not captured")
        return self.qmodel

    def require(self, mode: Mode) -> None:
        """Raise where eager itself refuses a mode."""
        if mode in self.case.refuses:
            raise NotApplicable(self.case.refuses[mode])


def run_case(
    case: Case,
    checks: Mapping[str, Check] | None = None,
    subject_class: type[Subject] = Subject,
) -> Iterator[Result]:
    """Run all checks of a case, or others; yield each result as it comes."""
    subject = subject_class(case)
    for name, check in (CHECKS if checks is None else checks).items():
        yield _run(name, check, subject)


def eager(subject: Subject) -> Finding:
    """The model itself does what its case says, and its loss reaches parameters."""
    case = subject.case
    model = case.model()
    kinds: set[str] = set()
    for mode, action in _EAGER.items():
        reason = case.refuses.get(mode)
        try:
            output = action(model, case)
        except Exception as error:
            if reason is None:
                raise CheckFailed(f"fails in {mode}: {brief(error)}") from error
            continue
        if reason is not None:
            raise CheckFailed(f"said to fail in {mode} ({reason}), yet it runs")
        require_finite(output, mode)
        kinds |= {leaf.__name__ for _, leaf in leaves(output) if isinstance(leaf, type)}
    return None, f"gives {', '.join(sorted(kinds)) or 'a tensor'}"


def capture(subject: Subject) -> Finding:
    """`gdnsq_fx.prepare` works."""
    case = subject.case
    subject.model = case.model()
    config = gdnsq_fx.QuantConfig(weight_bits=4, act_bits=4)
    calibration = [case.inputs(2)]
    subject.qmodel = gdnsq_fx.prepare(
        subject.model, case.inputs(2), config, calibration
    )
    return None, f"{len(sites(subject.qmodel))} quantizers"


def evaluation(subject: Subject) -> Finding:
    """In evaluation at identity precision: outputs and buffers of eager."""
    subject.require("eval")
    return _same_in_evaluation(subject, 2)


def batch(subject: Subject) -> Finding:
    """The same for a batch of another size than the example."""
    subject.require("batch")
    structure = InputStructure.of(subject.case.inputs(2))
    if structure.root.mismatch(subject.case.inputs(3), "batch") is not None:
        raise NotApplicable("the batch size is part of the input's structure")
    return _same_in_evaluation(subject, 3)


def convert(subject: Subject) -> Finding:
    """Converted equals prepared."""
    subject.require("eval")
    wanted = evaluated(subject.prepared, subject.case)
    got = evaluated(gdnsq_fx.convert(subject.prepared), subject.case)
    return _judged({"outputs": compare(wanted, got)}, CONVERTED_TOLERANCE)


def macs(subject: Subject) -> Finding:
    """Share of multiply-accumulates that are quantized, and what hinders the rest."""
    coverage = coverage_of(subject.prepared)
    reasons = Counter(skip.reason for skip in coverage.skipped)
    return coverage.macs, "; ".join(f"{n} x {r}" for r, n in reasons.most_common())


def training(subject: Subject) -> Finding:
    """In training at identity precision: outputs, gradients and buffers of eager."""
    subject.require("train")
    qmodel = subject.prepared
    names = [name for name, _ in subject.model.named_parameters()]
    wanted = trained(subject.model, subject.case)
    with gdnsq_fx.quantization_disabled(qmodel):
        got = trained(qmodel, subject.case)
    slopes = gradients(subject.model, names), gradients(qmodel, names)
    comparisons = {
        "outputs": compare(wanted, got),
        "gradients": compare(*slopes, GRADIENT_FLOOR),
        "buffers": _buffers(subject),
    }
    return _judged(comparisons, TOLERANCE)


def step(subject: Subject) -> Finding:
    """One quantized training step; every quantizer that the loss reaches can learn."""
    subject.require("train")
    qmodel = subject.prepared
    reached: set[str] = set()
    handles = [_watched(site.quantizer, site.edge, reached) for site in sites(qmodel)]
    try:
        require_finite(trained(qmodel, subject.case), "quantized training")
    finally:
        for handle in handles:
            handle.remove()
    require_gradients(qmodel)
    for site in sites(qmodel):
        for name, parameter in site.quantizer.named_parameters():
            if site.edge in reached and parameter.grad is None:
                raise CheckFailed(f"{site.edge}: {name} has no gradient")
    nn.utils.clip_grad_norm_(qmodel.parameters(), 1.0)
    torch.optim.SGD(qmodel.parameters(), lr=1e-3).step()
    with torch.no_grad():
        require_finite(forward(qmodel, subject.case, 2), "training after a step")
    return None, f"the loss reaches {len(reached)} of {len(handles)} quantizers"


# The checks that change the model come last.
CHECKS: dict[str, Check] = {
    "eager": eager,
    "capture": capture,
    "eval": evaluation,
    "batch": batch,
    "convert": convert,
    "macs": macs,
    "train": training,
    "step": step,
}


def _run(name: str, check: Check, subject: Subject) -> Result:
    started = time.perf_counter()
    value: float | None = None
    status: Status = "ok"
    try:
        value, detail = check(subject)
    except NotApplicable as reason:
        status, detail = "not applicable", str(reason)
    except Blocked as reason:
        status, detail = "blocked", str(reason)
    except CheckFailed as cause:
        status, detail = "failed", str(cause)
    except Exception as error:  # whatever it is, it is what the checks look for
        status, detail = "failed", brief(error)
    return Result(name, status, value, detail, time.perf_counter() - started)


def _eager_training(model: nn.Module, case: Case) -> Any:
    output = trained(model, case)
    require_gradients(model)
    return output


_EAGER: dict[Mode, Callable[[nn.Module, Case], Any]] = {
    "eval": evaluated,
    "batch": lambda model, case: evaluated(model, case, 3),
    "train": _eager_training,
}


def _same_in_evaluation(subject: Subject, size: int) -> Finding:
    qmodel = subject.prepared
    wanted = evaluated(subject.model, subject.case, size)
    with gdnsq_fx.quantization_disabled(qmodel):
        got = evaluated(qmodel, subject.case, size)
    found = {"outputs": compare(wanted, got), "buffers": _buffers(subject)}
    return _judged(found, TOLERANCE)


def _buffers(subject: Subject) -> Comparison:
    wanted = dict(subject.model.named_buffers())
    present = dict(subject.prepared.named_buffers())
    return compare(wanted, {k: v for k, v in present.items() if k in wanted})


def _judged(comparisons: dict[str, Comparison], tolerance: float) -> Finding:
    """The worst difference, unless one is too large."""
    causes = {what: found.cause(tolerance) for what, found in comparisons.items()}
    if any(causes.values()):
        raise CheckFailed("; ".join(f"{k}: {v}" for k, v in causes.items() if v))
    return max(found.worst for found in comparisons.values()), ""


def _watched(quantizer: nn.Module, edge: str, reached: set[str]) -> Any:
    """Note the edges whose value receives a gradient."""

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: reached.add(edge))

    return quantizer.register_forward_hook(watch)
