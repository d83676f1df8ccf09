"""A model of the zoo as an ONNX file: exported, and run beside the reference."""

from __future__ import annotations

import contextlib
import io
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cases import Case
from checks import Check, Finding, Subject
from result import Blocked, CheckFailed, NotApplicable, brief
from torch import nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.deploy.onnx import OPSET
from gdnsq_fx.errors import ExportError
from gdnsq_fx.inputs import InputStructure

_RUNTIMES = ("torch", "onnxruntime")


@dataclass
class ExportSubject(Subject):
    """What the checks share: the converted model, and the folder of its file."""

    imodel: GraphModule | None = None
    folder: tempfile.TemporaryDirectory[str] = field(
        default_factory=tempfile.TemporaryDirectory
    )

    @property
    def path(self) -> Path:
        """Of the file."""
        return Path(self.folder.name) / "model.onnx"


def convert(subject: ExportSubject) -> Finding:
    """The model becomes one of integers."""
    case = subject.case
    subject.require("eval")
    subject.model = _model(case)
    config = gdnsq_fx.QuantConfig(weight_bits=4, act_bits=4)
    qmodel = gdnsq_fx.prepare(
        subject.model, case.inputs(2), config, [case.inputs(2)]
    ).eval()
    subject.imodel = gdnsq_fx.convert(qmodel, deployable=True)
    return None, ""


def export(subject: ExportSubject) -> Finding:
    """It is written; not applicable where the exporter refuses floating point too."""
    if subject.imodel is None:
        raise Blocked("not converted")
    inputs = subject.case.inputs(2)
    try:
        size = gdnsq_fx.export(
            subject.imodel, subject.path, inputs, dynamic_batch=False
        )
    except ExportError as error:
        refusal = _refusal(subject)
        if refusal is not None:
            raise NotApplicable(f"in floating point: {refusal}") from error
        raise CheckFailed(brief(error)) from error
    return float(size), ""


def agree(subject: ExportSubject) -> Finding:
    """The file computes in onnxruntime what exact integer arithmetic does."""
    if subject.imodel is None or not subject.path.exists():
        raise Blocked("not exported")
    batches = [subject.case.inputs(2)]
    found = gdnsq_fx.verify(
        subject.imodel, subject.path, batches, runtimes=_RUNTIMES, progress=False
    )
    lines = str(found).splitlines()
    parts = [line for line in lines if line.startswith("PARTS: ")]
    if not found.ok:
        raise CheckFailed("; ".join(parts))
    layers = len(found.integer), len(found.floating)
    rounding = max((one.rounding for one in found.runtimes), default=0)
    worst = max((one.relative_difference for one in found.runtimes), default=0.0)
    return worst, f"{layers[0]} integer, {layers[1]} float, {rounding} roundings"


def _model(case: Case) -> nn.Module:
    """Without caches, objects that no program of `torch.export` returns."""
    model = case.model().eval()
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False
    return model


def _refusal(subject: ExportSubject) -> str | None:
    """Why the model itself cannot be exported, None where it can."""
    inputs = subject.case.inputs(2)
    args, kwargs = InputStructure.of(inputs).args_kwargs(inputs)
    try:
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(
                _model(subject.case),
                args,
                kwargs=kwargs,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:  # whatever the exporter happens to raise
        return brief(_root(error))
    return None


def _root(error: BaseException) -> BaseException:
    """What an error comes from; the exporter's own say at which step it ended."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


EXPORT_CHECKS: dict[str, Check] = {
    "convert": convert,
    "export": export,
    "agree": agree,
}
