"""A copy of a prepared model that shares its tensors, for what changes modules.

Engines put hooks on modules, replace BatchNorm layers, and replace parameters by parts
of them. All of that happens to the copy, so that the model is left as it was given.
"""

from __future__ import annotations

import copy

import torch
from torch.fx import GraphModule

from gdnsq_fx.errors import ConfigError, DeviceMismatchError
from gdnsq_fx.inputs import model_device
from gdnsq_fx.sites import assign_targets, sites
from gdnsq_fx.training.dtensors import is_sharded, whole
from gdnsq_fx.training.process_group import ProcessGroup


def agree_on(qmodel: GraphModule, group: ProcessGroup) -> None:
    """Give every process the tensors of the main one.

    Raises:
        ConfigError: processes have prepared different models.
        DeviceMismatchError: the model is not where the processes compute.
    """
    if group.count == 1:
        return
    _check_same(qmodel, group)
    _check_device(qmodel, group)
    buffers = dict(qmodel.named_buffers())
    group.share({**dict(qmodel.named_parameters()), **buffers})


def working_copy(qmodel: GraphModule) -> GraphModule:
    """New modules around the same parameters and buffers."""
    tensors = [*qmodel.parameters(), *qmodel.buffers()]
    copied = copy.deepcopy(qmodel, {id(tensor): tensor for tensor in tensors})
    for mine, given in zip(copied.modules(), qmodel.modules(), strict=True):
        mine.training = given.training
    return copied


@torch.no_grad()
def give_back(copied: GraphModule, qmodel: GraphModule) -> None:
    """Targets, and those weights that the copy came to hold in parts."""
    assign_targets(qmodel, {s.edge: s.quantizer.spec.bits for s in sites(copied)})
    for site in sites(qmodel):
        site.quantizer.enabled = True
    given = dict(qmodel.named_parameters(remove_duplicate=False))
    for name, parameter in copied.named_parameters(remove_duplicate=False):
        if is_sharded(parameter):
            given[name].copy_(whole(parameter.detach()))


def _check_device(qmodel: GraphModule, group: ProcessGroup) -> None:
    device = model_device(qmodel)
    if device is not None and device.type != group.device.type:
        raise DeviceMismatchError(
            f"the model is on {device}, but this process computes on {group.device}; "
            f"call model.to(accelerator.device) before gdnsq_fx.prepare"
        )


def _check_same(qmodel: GraphModule, group: ProcessGroup) -> None:
    specs = [(site.edge, repr(site.quantizer.spec)) for site in sites(qmodel)]
    shapes = [(name, str(t.shape)) for name, t in qmodel.state_dict().items()]
    here = sorted(map(repr, (*specs, *shapes)))
    differing = set(here) ^ set(group.from_main(here))
    if group.any(bool(differing)):
        raise ConfigError(
            "the processes have prepared different models, which differ here in "
            f"{sorted(differing)[:3]}; give prepare the same model, configuration and "
            "bits on every process"
        )
