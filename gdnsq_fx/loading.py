"""The facade of files: a converted model from a file, with its class or without."""

from __future__ import annotations

import os

from torch import nn
from torch.fx import GraphModule

from gdnsq_fx.annotations import ModelFacts
from gdnsq_fx.deploy import checkpoint, filling
from gdnsq_fx.deployment import convert
from gdnsq_fx.errors import (
    ConfigError,
    NothingToQuantizeError,
    NotQuantizedError,
    PatternError,
)
from gdnsq_fx.inputs import ExampleInput, InputStructure
from gdnsq_fx.opinfo import OpTable
from gdnsq_fx.optable import DEFAULT_TABLE
from gdnsq_fx.passes import QuantizeBetweenLayers, release_masks, run_passes
from gdnsq_fx.preparation import captured_model, insertion_passes


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    example_input: ExampleInput | None = None,
    *,
    table: OpTable = DEFAULT_TABLE,
) -> GraphModule:
    """Read a converted model back; nothing is unpickled or imported by name.

    Args:
        path: a file that `save` wrote.
        model: an instance of the original class, with any weights; left untouched.
            None: the graph is taken from the file (deployable form: always), where
            `save` did not warn that it holds none. It computes what evaluation does.
        example_input: as for `prepare`; None where ``model`` is.
        table: as for `prepare`; of use with ``model``.

    Returns:
        The converted model, in evaluation mode.

    Raises:
        FileFormatError: the file is truncated, foreign, of another model, or holds no
            graph.
        FileNotFoundError: there is no file.
        ConfigError: one of ``model`` and ``example_input`` is missing.
    """
    if (model is None) is not (example_input is None):
        raise ConfigError(
            "load takes a model of the original class together with an example input, "
            "or neither; call gdnsq_fx.load(path, model, example_input) or "
            "gdnsq_fx.load(path)"
        )
    contents = checkpoint.read(path)
    if model is None or example_input is None:
        return checkpoint.rebuilt_graph(contents)
    if checkpoint.holds_deployable(contents):
        raise filling.other_model(
            contents, "it is in deployable form, which no class gives; call load(path)"
        )
    return _filled(contents, model, example_input, table)


def _filled(
    contents: checkpoint.Contents,
    model: nn.Module,
    example_input: ExampleInput,
    table: OpTable,
) -> GraphModule:
    """The converted model of a class, with the tensors of a file."""
    facts = ModelFacts(
        contents.config, InputStructure.of(example_input), contents.folded
    )
    captured = captured_model(
        model, example_input, facts, table, opaque=contents.opaque
    ).eval()
    try:
        skeleton = run_passes(captured, insertion_passes(example_input, facts, table))
    except (NothingToQuantizeError, NotQuantizedError, PatternError) as error:
        raise filling.other_model(contents, str(error)) from error
    release_masks(skeleton, contents.masks)
    if contents.between is not None:
        between = QuantizeBetweenLayers(contents.between)
        skeleton = run_passes(skeleton, (between,))
        release_masks(skeleton, contents.masks)
    filling.place_levels(skeleton, contents)
    return filling.fill(convert(skeleton), contents)
