"""The facade of deployment: from fine-tuned graphs to integer models and files.

What reads such files back is in `loading.py`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm

from gdnsq_fx.annotations import model_facts
from gdnsq_fx.deploy import checkpoint, installed
from gdnsq_fx.deploy.certificate import Certificate
from gdnsq_fx.deploy.edges import coded_edges
from gdnsq_fx.deploy.formats import format_of, write_as
from gdnsq_fx.deploy.inductor import CompiledModel, compile_int8
from gdnsq_fx.deploy.program import Example
from gdnsq_fx.deploy.qdq import is_deployable
from gdnsq_fx.deploy.verification import Verification
from gdnsq_fx.inputs import ExampleInput, InputStructure
from gdnsq_fx.passes import (
    Calibrate,
    FoldIntoScales,
    FreezeQuantizers,
    LowerToInteger,
    LowerToQdq,
    LowerToQonnx,
    QuantizeBetweenLayers,
    placeholder_values,
    run_passes,
)
from gdnsq_fx.sites import require_quantizers

_DEPLOYABLE = (FoldIntoScales(), LowerToQdq())


def convert(
    qmodel: GraphModule,
    *,
    deployable: bool = False,
    calibration: Iterable[Any] | None = None,
) -> GraphModule:
    """Freeze to whole levels and emit the integer graph; ``qmodel`` is left as it was.

    Args:
        qmodel: a prepared model.
        deployable: emit the form that integer kernels run: BatchNorm is folded into
            scales, offsets and biases move to grids that kernels have, operations are
            those that exporters and compilers know (``passes/lower_to_qdq.py``).
            ``gdnsq_fx.deploy.qdq.deploy_facts`` says which levels moved, and how far.
        calibration: batches that place 8-bit levels on what layers hand to each other
            in floating point so far (residual sums, concatenations, averages, smooth
            functions), so that all layers become integer kernels; None: add none
            (``passes/quantize_between_layers.py``, which also runs on prepared models).

    Returns:
        A plain GraphModule in evaluation mode with integer weights, that computes
        exactly what the fine-tuned model computes in evaluation (but see
        ``deployable`` and ``calibration``).

    Raises:
        PassError: not a prepared model, or not calibrated.
        CalibrationError, BatchStructureError: of the batches, as they say.
    """
    inputs = model_facts(qmodel).inputs
    require_quantizers(qmodel, "convert")
    frozen = copy.deepcopy(qmodel).eval()
    if calibration is not None:
        place = Calibrate(calibration, inputs, added=True)
        frozen = run_passes(frozen, (QuantizeBetweenLayers(), place))
    imodel = run_passes(frozen, (FreezeQuantizers(), LowerToInteger()))
    return run_passes(imodel, _DEPLOYABLE) if deployable else imodel


def save(imodel: GraphModule, path: str | os.PathLike[str]) -> int:
    """Write a converted model as one safetensors file with bit-packed weights.

    Args:
        imodel: what `convert` returned, in either form.
        path: file to write, atomically. It holds the graph too, unless a
            `ClassNeededWarning` says what in it no file can hold.

    Returns:
        Size of the file in bytes.

    Raises:
        PassError: not a converted model, or one in deployable form whose graph no file
            can hold.
    """
    return checkpoint.write(imodel, path)


def export(
    imodel: GraphModule,
    path: str | os.PathLike[str],
    example_input: ExampleInput,
    *,
    format: str | None = None,
    dynamic_batch: bool = True,
) -> int:
    """Write a converted model for another runtime, whole or not at all.

    Args:
        imodel: what `convert` or `load` returned, in either form (``"qonnx"``: not the
            deployable one); left as it was.
        path: file to write; above 2 GB, weights of ONNX go to ``path.data``.
        example_input: as for `prepare`.
        format: ``"onnx"`` (.onnx; quantize / dequantize nodes, opset 21), ``"torch"``
            (.pt2, for ``torch.export.load``), ``"openvino"`` (.xml and .bin) or
            ``"qonnx"`` (.onnx; quantizers as trained, for FPGA flows); None: by suffix.
        dynamic_batch: the file takes batches of any size; False: of the example's.

    Returns:
        Size of all files in bytes.

    Raises:
        ConfigError: an unknown format or suffix.
        PassError: not a converted model.
        ExportError: an exporter refuses it, or the model keeps the batch fixed.
        MissingExtraError: install gdnsq-fx[onnx] or gdnsq-fx[openvino].
    """
    kind = format_of(path, format)
    if kind.form == "qonnx":
        model = run_passes(copy.deepcopy(imodel).eval(), (LowerToQonnx(),))
    else:
        model = _deployable(imodel)
    args, kwargs = InputStructure.of(example_input).args_kwargs(example_input)
    return write_as(kind, model, Example(args, kwargs, dynamic_batch), path)


def verify(
    imodel: GraphModule,
    path: str | os.PathLike[str] | None = None,
    batches: Iterable[Any] = (),
    *,
    runtimes: Sequence[str] | None = None,
    progress: bool = True,
) -> Certificate:
    """Show that what runs computes what the model says, code by code.

    Every runtime is compared with the reference executor, whose layers are exact
    integer arithmetic (``deploy/reference.py``), on the CPU: its outputs as users run
    it, and the integer codes of every quantized activation. A code off by one step
    where the value before lies within float rounding of a half step is counted as
    rounding; what follows from it is followed; anything else fails.

    Args:
        imodel: what `convert` or `load` returned, in either form; left as it was.
        path: a file that `export` wrote of it; None: runtimes that need no file.
        batches: inputs, or inputs and targets, as for `finetune`. One at a time is
            held in memory.
        runtimes: of "torch", "inductor", "onnxruntime" and "openvino"; None: all that
            are installed, the others are listed as absent.
        progress: show a bar.

    Returns:
        A `Certificate`: print it, ask whether it is ``ok``, write it as JSON.

    Raises:
        PassError: not a converted model.
        BatchStructureError: no batches, or of another structure than the example.
        ConfigError: an unknown runtime, or a file that no runtime reads.
        FileNotFoundError, FileFormatError: no file, or not one of this model.
        MissingExtraError: a runtime that was named is not installed.
        CompilerError: inductor fails.
    """
    model = _deployable(imodel).cpu()
    edges = coded_edges(model)
    file = None if path is None else Path(path)
    opened, absent = installed.open_runtimes(model, edges, file, runtimes)
    trained = None if is_deployable(imodel) else copy.deepcopy(imodel).eval().cpu()
    verification = Verification(model, edges, opened, trained)
    verification.add(_values(model, batches, progress))
    return replace(
        verification.certificate(),
        absent=absent,
        file={} if file is None else installed.file_facts(file),
        weights=None if file is None else installed.file_weights(model, file),
        versions=installed.package_versions(),
        platform=installed.platform_facts(),
    )


def compile(imodel: GraphModule, example_input: ExampleInput) -> CompiledModel:
    """Compile a converted model to the int8 kernels of inductor, on the CPU.

    Args:
        imodel: what `convert` or `load` returned, in either form; left as it was.
        example_input: as for `prepare`, of the size that the model will be given:
            each other size is compiled when it first comes.

    Returns:
        A module that is called as the model is, without gradients; ``kernels`` counts
        the layers that became int8 kernels.

    Raises:
        PassError: not a converted model.
        MissingExtraError: install gdnsq-fx[inductor].
        CompilerError: inductor fails, as without a C++ compiler.
    """
    args, kwargs = InputStructure.of(example_input).args_kwargs(example_input)
    return compile_int8(_deployable(imodel), args, kwargs)


def _deployable(imodel: GraphModule) -> GraphModule:
    """A copy in deployable form and in evaluation."""
    model = copy.deepcopy(imodel).eval()
    return model if is_deployable(model) else run_passes(model, _DEPLOYABLE)


def _values(
    model: GraphModule, batches: Iterable[Any], progress: bool
) -> Iterator[list[Any]]:
    """Of each batch, one value for each placeholder, on the CPU."""
    inputs = model_facts(model).inputs
    for item in tqdm(batches, desc="verify", unit="batch", disable=not progress):
        batch = inputs.split(item)
        args, kwargs = tree_map(_on_cpu, (batch.args, batch.kwargs))
        yield placeholder_values(model, args, kwargs)


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
