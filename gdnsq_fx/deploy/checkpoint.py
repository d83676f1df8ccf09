"""A converted model in one safetensors file, and back.

The file holds the state of the integer graph, its codes bit-packed, how the model was
quantized, and the graph itself where a file can hold it (`graph_description.py`). A
graph that it cannot hold is made from an instance of the original class.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.fx import GraphModule

from gdnsq_fx.annotations import KEY, ModelFacts, model_facts
from gdnsq_fx.capture.captured import capture_facts
from gdnsq_fx.deploy.files import read_file, write_file
from gdnsq_fx.deploy.graph_building import built
from gdnsq_fx.deploy.graph_description import constants, described
from gdnsq_fx.deploy.graph_facts import read_deployment, read_inputs
from gdnsq_fx.deploy.graph_values import UnknownValueError
from gdnsq_fx.deploy.packed_codes import joined_codes, split_codes
from gdnsq_fx.deploy.qdq import KEY as DEPLOYABLE
from gdnsq_fx.deploy.qdq import is_deployable
from gdnsq_fx.deploy.stored_codes import (
    has_integer_nodes,
    int8_codes,
    max_codes,
    weight_codes,
)
from gdnsq_fx.errors import (
    ClassNeededWarning,
    ConfigError,
    FileFormatError,
    PassError,
)
from gdnsq_fx.spec import QuantConfig


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        path: the file, for messages.
        config: how the model was quantized.
        folded: BatchNorm was folded before quantizers were inserted.
        masks: edges that lost their quantizers in calibration.
        between: as in `ModelFacts`.
        max_codes: largest code of each activation edge, by its ``quantizers.`` path.
        tensors: state of the integer graph.
        opaque: path of each module that stayed one -> why; with other weights, other
            modules might show that they cannot be looked into.
        graph: the graph as JSON, None where the file holds none.
        constants: tensors that the graph reads and its state leaves out.
        lacking: why there is no graph.
    """

    path: str
    config: QuantConfig
    folded: bool
    masks: tuple[str, ...]
    between: tuple[str, ...] | None
    max_codes: dict[str, int]
    tensors: dict[str, Tensor]
    opaque: dict[str, str]
    graph: dict[str, Any] | None
    constants: dict[str, Tensor]
    lacking: str


def write(imodel: nn.Module, path: str | os.PathLike[str]) -> int:
    """Write the file; returns its size in bytes.

    Raises:
        PassError: not a converted model, or one in deployable form whose graph no file
            can hold.
    """
    ours = isinstance(imodel, GraphModule) and (
        is_deployable(imodel) or has_integer_nodes(imodel)
    )
    if not ours or not isinstance(imodel, GraphModule):
        raise PassError(
            "only a converted model can be saved; call gdnsq_fx.convert(qmodel) first"
        )
    facts = model_facts(imodel)
    tensors: dict[str, Tensor] = dict(imodel.state_dict())
    held = constants(imodel)
    graph, lacking = _graph_of(imodel, facts, {**tensors, **held})
    if graph is not None:
        tensors |= held
    tensors, bits, affine = split_codes(tensors, int8_codes(imodel))
    description = {
        "config": facts.config.to_dict(),
        "folded": facts.folded,
        "masks": list(facts.masks),
        "between": facts.between if facts.between is None else list(facts.between),
        "max_codes": max_codes(imodel),
        "opaque": dict(capture_facts(imodel).opaque),
        "affine": affine,
        "graph": graph,
        "lacking": lacking,
    }
    return write_file(path, tensors, {**weight_codes(imodel), **bits}, description)


def _graph_of(
    imodel: GraphModule, facts: ModelFacts, tensors: dict[str, Tensor]
) -> tuple[dict[str, Any] | None, str]:
    """The graph as JSON, or None and why not; says so where the class is needed."""
    try:
        graph = described(imodel, facts.inputs)
        built(graph, tensors, "Trial")  # what cannot be read is not to be written
        return graph, ""
    except UnknownValueError as error:
        lacking = str(error)
    if is_deployable(imodel):
        raise PassError(
            f"no file can hold this graph ({lacking}), and a model in deployable form "
            "cannot be made again from its class; save gdnsq_fx.convert(qmodel) "
            "instead, without deployable=True"
        )
    warnings.warn(
        f"the file will not hold the graph ({lacking}): read it with "
        "gdnsq_fx.load(path, model, example_input), model of the original class",
        ClassNeededWarning,
        stacklevel=4,
    )
    return None, lacking


def read(path: str | os.PathLike[str]) -> Contents:
    """Read a file.

    Raises:
        FileFormatError: it is truncated, foreign, or its description is not ours.
    """
    found = read_file(path)
    given = found.description
    try:
        config: Any = given["config"]
        levels: Any = given["max_codes"]
        # Files written before modules were opaque for their data have none.
        opaque: Any = given.get("opaque", {})
        between: Any = given.get("between")
        graph: Any = given.get("graph")
        tensors = joined_codes(found.tensors, given.get("affine", {}))
        apart = set(_names(graph["constants"])) if graph is not None else set[str]()
        return Contents(
            path=str(Path(path)),
            config=QuantConfig.from_dict(config),
            folded=given["folded"] is True,
            masks=_names(given.get("masks", [])),
            between=None if between is None else _names(between),
            max_codes={str(k): int(v) for k, v in levels.items()},
            tensors={k: v for k, v in tensors.items() if k not in apart},
            opaque={str(k): str(v) for k, v in opaque.items()},
            graph=graph,
            constants={k: tensors[k] for k in apart},
            lacking=str(given.get("lacking", "it is of an older version")),
        )
    except (
        *(KeyError, AttributeError, TypeError, ValueError, OverflowError),
        *(IndexError, RuntimeError, ConfigError),
    ) as error:
        raise FileFormatError(
            f"{path} does not describe a converted model ({error}); write it again "
            "with gdnsq_fx.save"
        ) from error


def holds_deployable(contents: Contents) -> bool:
    """Whether a file holds a model in deployable form."""
    return bool(contents.graph) and contents.graph.get("deployable") is not None


def rebuilt_graph(contents: Contents) -> GraphModule:
    """The model from the file alone.

    Raises:
        FileFormatError: the file holds no graph, or not one of ours.
    """
    if contents.graph is None:
        raise FileFormatError(
            f"{contents.path} does not hold its graph ({contents.lacking}); call "
            "gdnsq_fx.load(path, model, example_input) with an instance of the "
            "original class"
        )
    try:
        deployment = read_deployment(contents.graph.get("deployable"))
        inputs = read_inputs(contents.graph.get("inputs"))
        name = "IntegerModel" if deployment is None else "DeployableModel"
        made = built(contents.graph, {**contents.tensors, **contents.constants}, name)
    except (UnknownValueError, AttributeError) as error:
        raise FileFormatError(
            f"{contents.path} holds a graph that this gdnsq_fx does not know ({error});"
            " write it again with gdnsq_fx.save, or read it where it was written"
        ) from error
    made.meta[KEY] = ModelFacts(
        contents.config, inputs, contents.folded, contents.masks, contents.between
    )
    if deployment is not None:
        made.meta[DEPLOYABLE] = deployment
    return made


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError("names that are no list")
    return tuple(map(str, cast(list[Any], value)))
