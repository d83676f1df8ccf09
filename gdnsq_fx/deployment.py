"""The facade of deployment: from fine-tuned graphs to integer models and files."""

from __future__ import annotations

import copy
import os

from torch import nn
from torch.fx import GraphModule

from gdnsq_fx.annotations import ModelFacts, model_facts
from gdnsq_fx.deploy import checkpoint
from gdnsq_fx.deploy.formats import format_of, write_as
from gdnsq_fx.deploy.program import Example
from gdnsq_fx.deploy.qdq import is_deployable
from gdnsq_fx.errors import NothingToQuantizeError, NotQuantizedError, PatternError
from gdnsq_fx.inputs import ExampleInput, InputStructure
from gdnsq_fx.opinfo import OpTable
from gdnsq_fx.optable import DEFAULT_TABLE
from gdnsq_fx.passes import (
    FoldIntoScales,
    FreezeQuantizers,
    LowerToInteger,
    LowerToQdq,
    LowerToQonnx,
    release_masks,
    run_passes,
)
from gdnsq_fx.preparation import captured_model, insertion_passes
from gdnsq_fx.sites import require_quantizers

_DEPLOYABLE = (FoldIntoScales(), LowerToQdq())


def convert(qmodel: GraphModule, *, deployable: bool = False) -> GraphModule:
    """Freeze to whole levels and emit the integer graph; ``qmodel`` is left as it was.

    Args:
        qmodel: a prepared model.
        deployable: emit the form that integer kernels run: BatchNorm is folded into
            scales, offsets and biases move to grids that kernels have, operations are
            those that exporters and compilers know (``passes/lower_to_qdq.py``).
            ``gdnsq_fx.deploy.qdq.deploy_facts`` says which levels moved, and how far.

    Returns:
        A plain GraphModule in evaluation mode with integer weights, that computes
        exactly what the fine-tuned model computes in evaluation (but see
        ``deployable``).

    Raises:
        PassError: not a prepared model, or not calibrated.
    """
    model_facts(qmodel)
    require_quantizers(qmodel, "convert")
    frozen = copy.deepcopy(qmodel).eval()
    imodel = run_passes(frozen, (FreezeQuantizers(), LowerToInteger()))
    return run_passes(imodel, _DEPLOYABLE) if deployable else imodel


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
    model = copy.deepcopy(imodel).eval()
    if kind.form == "qonnx":
        model = run_passes(model, (LowerToQonnx(),))
    elif not is_deployable(model):
        model = run_passes(model, _DEPLOYABLE)
    args, kwargs = InputStructure.of(example_input).args_kwargs(example_input)
    return write_as(kind, model, Example(args, kwargs, dynamic_batch), path)


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
    captured = captured_model(
        model, example_input, facts, table, opaque=contents.opaque
    ).eval()
    try:
        skeleton = run_passes(captured, insertion_passes(example_input, facts, table))
    except (NothingToQuantizeError, NotQuantizedError, PatternError) as error:
        raise checkpoint.other_model(contents, str(error)) from error
    release_masks(skeleton, contents.masks)
    checkpoint.place_levels(skeleton, contents)
    return checkpoint.fill(convert(skeleton), contents)
