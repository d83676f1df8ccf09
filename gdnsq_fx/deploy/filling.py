"""The tensors of a file in the graph of a class: it is made anew, then filled."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from gdnsq_fx.deploy.checkpoint import Contents
from gdnsq_fx.errors import FileFormatError
from gdnsq_fx.inputs import model_device
from gdnsq_fx.sites import WeightSite, sites
from gdnsq_fx.stored import ancestors


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
