"""A converted model in one safetensors file, and back.

The file holds the state of the integer graph, its codes bit-packed, and how the model
was quantized. It is read into an instance of the original class.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from gdnsq_fx.annotations import model_facts
from gdnsq_fx.capture.captured import capture_facts
from gdnsq_fx.deploy.files import read_file, write_file
from gdnsq_fx.deploy.integer import dequantize, quantize
from gdnsq_fx.deploy.qdq import is_deployable
from gdnsq_fx.errors import FileFormatError, PassError
from gdnsq_fx.inputs import model_device
from gdnsq_fx.nested import graphs_of, joined, path_of
from gdnsq_fx.sites import WeightSite, bit_width, sites
from gdnsq_fx.spec import QuantConfig
from gdnsq_fx.stored import ancestors


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
    """

    path: str
    config: QuantConfig
    folded: bool
    masks: tuple[str, ...]
    between: tuple[str, ...] | None
    max_codes: dict[str, int]
    tensors: dict[str, Tensor]
    opaque: dict[str, str]


def write(imodel: nn.Module, path: str | os.PathLike[str]) -> int:
    """Write the file; returns its size in bytes.

    Raises:
        PassError: not a converted model, or one in deployable form.
    """
    if is_deployable(imodel):
        raise PassError(
            "a model in deployable form has lost the grids it was trained on; save "
            "gdnsq_fx.convert(qmodel) instead, without deployable=True"
        )
    if not isinstance(imodel, GraphModule) or not _integer_nodes(imodel):
        raise PassError(
            "only a converted model can be saved; call gdnsq_fx.convert(qmodel) first"
        )
    codes = _weight_codes(imodel)
    facts = model_facts(imodel)
    description = {
        "config": facts.config.to_dict(),
        "folded": facts.folded,
        "masks": list(facts.masks),
        "between": facts.between if facts.between is None else list(facts.between),
        "max_codes": _max_codes(imodel),
        "opaque": dict(capture_facts(imodel).opaque),
    }
    return write_file(path, imodel.state_dict(), codes, description)


def read(path: str | os.PathLike[str]) -> Contents:
    """Read a file.

    Raises:
        FileFormatError: it is truncated, foreign, or its description is not ours.
    """
    found = read_file(path)
    try:
        config: Any = found.description["config"]
        max_codes: Any = found.description["max_codes"]
        # Files written before modules were opaque for their data have none.
        opaque: Any = found.description.get("opaque", {})
        between: Any = found.description.get("between")
        return Contents(
            path=str(Path(path)),
            config=QuantConfig.from_dict(config),
            folded=found.description["folded"] is True,
            masks=_names(found.description.get("masks", [])),
            between=None if between is None else _names(between),
            max_codes={str(k): int(v) for k, v in max_codes.items()},
            tensors=dict(found.tensors),
            opaque={str(k): str(v) for k, v in opaque.items()},
        )
    except (KeyError, AttributeError, TypeError, ValueError, OverflowError) as error:
        raise FileFormatError(
            f"{path} does not describe a converted model ({error}); write it again "
            "with gdnsq_fx.save"
        ) from error


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError("names are no list")
    return tuple(map(str, cast(list[Any], value)))


@torch.no_grad()
def place_levels(prepared: GraphModule, contents: Contents) -> None:
    """Give every activation quantizer the number of levels that the file names.

    Raises:
        FileFormatError: the model has other edges than the file.
    """
    for parameter in prepared.parameters():
        parameter.fill_(1.0)  # whatever the given model holds, the file replaces it
    for site in sites(prepared):
        if isinstance(site, WeightSite):
            _make_plain(site)
            site.quantizer.open_to(site.weight(), site.quantizer.spec.bits)
            continue
        if site.path not in contents.max_codes:
            raise other_model(contents, f"it has no levels for {site.edge}")
        levels = contents.max_codes[site.path] + 1
        if not 1 <= levels <= 1 << 16:
            raise other_model(contents, f"{levels} levels on {site.edge}")
        site.quantizer.lower.fill_(0.0)
        site.quantizer.log2_step.fill_(0.0)
        site.quantizer.log2_range.copy_(torch.log2(torch.tensor(float(levels))))


def _make_plain(site: WeightSite) -> None:
    """Let a tensor stand for a computed weight: of ones it might become 0 / 0."""
    owner = site.owner
    source = site.node.args[0]
    if not isinstance(source, Node) or source.op == "get_attr":
        return
    name = f"stored_{site.node.name}"
    owner.register_buffer(name, torch.ones_like(site.weight()), persistent=False)
    with owner.graph.inserting_before(site.node):
        site.node.replace_input_with(source, owner.graph.get_attr(name))
    for node in sorted(ancestors([source]), reverse=True):
        if not node.users:
            owner.graph.erase_node(node)


def fill(imodel: GraphModule, contents: Contents) -> GraphModule:
    """Put the file's tensors into the integer graph of the same model.

    Raises:
        FileFormatError: names or shapes differ.
    """
    device = model_device(imodel) or torch.device("cpu")
    state: dict[str, Tensor] = imodel.state_dict()
    for name, wanted in state.items():
        given = contents.tensors.get(name, wanted)
        integer = {torch.uint8, torch.int32}
        allowed = integer if name.endswith(".codes") else {wanted.dtype}
        if given.dtype not in allowed:
            raise other_model(contents, f"{name} is {given.dtype}, not {wanted.dtype}")
    try:
        imodel.load_state_dict(contents.tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise other_model(contents, str(error).splitlines()[-1].strip()) from error
    return imodel.requires_grad_(False).to(device)


def other_model(contents: Contents, cause: str) -> FileFormatError:
    """The error for a file that belongs to another model."""
    return FileFormatError(
        f"{contents.path} does not fit this model: {cause}. Load it into the class, "
        "with the example input, that it was prepared from"
    )


def _integer_nodes(imodel: GraphModule) -> bool:
    return bool(_calls_of(imodel, dequantize))


def _calls_of(imodel: GraphModule, function: Any) -> list[tuple[str, Node]]:
    """Nodes that call a function, with the path of the graph they stand in."""
    return [
        (path_of(one), node)
        for one in graphs_of(imodel)
        for node in one.graph.find_nodes(op="call_function", target=function)
    ]


def _weight_codes(imodel: GraphModule) -> dict[str, int]:
    """Name of each tensor of weight codes -> bits that hold them."""
    found: dict[str, int] = {}
    for path, node in _calls_of(imodel, dequantize):
        source = node.args[0]
        if isinstance(source, Node) and source.op == "get_attr":
            name = joined(path, str(source.target))
            codes = imodel.state_dict()[name]
            found[name] = bit_width(int(codes.max()) + 1)
    return found


def _max_codes(imodel: GraphModule) -> dict[str, int]:
    found: dict[str, int] = {}
    for path, node in _calls_of(imodel, quantize):
        step: Any = node.args[1]
        name = joined(path, str(step.target).removesuffix(".step"))
        found[name] = int(cast(int, node.args[3]))
    return found
