"""Which parameter learns at which rate."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import GraphModule

from gdnsq_fx.quantize.activation_quantizer import ActivationQuantizer
from gdnsq_fx.quantize.quantizer import Quantizer
from gdnsq_fx.training.dtensors import is_sharded
from gdnsq_fx.training.schedule import Schedule

MAX_RATE = 1e-2


def parameter_groups(
    qmodel: GraphModule, schedule: Schedule, lr: float
) -> list[dict[str, Any]]:
    """Weights at ``lr``; each quantizer at the rate that its descent needs.

    In short runs that rate is limited, or steps and ranges stray by powers of two: the
    projection brings bits down in any case. ``lower`` is in units of its activation,
    not a logarithm: its rate is a share of the range.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    ours: set[int] = set()
    for module in qmodel.modules():
        if not isinstance(module, Quantizer):
            continue
        ours |= {id(p) for p in module.parameters()}
        rate = min(schedule.quantizer_rate(module.spec.bits), MAX_RATE)
        for name, parameter in module.named_parameters():
            own = rate
            if name == "lower" and isinstance(module, ActivationQuantizer):
                own *= float(module.range.detach())
            groups.setdefault(own, []).append(parameter)
    weights = [p for p in qmodel.parameters() if p.requires_grad and id(p) not in ours]
    # An optimizer takes a whole group at once, and cannot mix the two kinds.
    plain = [p for p in weights if not is_sharded(p)]
    parts = [p for p in weights if is_sharded(p)]
    return [
        *(_group(params, lr) for params in (plain, parts) if params),
        *(_group(params, rate) for rate, params in groups.items()),
    ]


def _group(parameters: list[nn.Parameter], lr: float) -> dict[str, Any]:
    """On a CPU `torch.optim.Adam` would run a dozen operations for each parameter, and
    quantizers have many small ones."""
    fused = all(_can_be_fused(parameter) for parameter in parameters)
    return {"params": parameters, "lr": lr, "fused": True if fused else None}


def _can_be_fused(parameter: nn.Parameter) -> bool:
    """Whether the fused kernel of CPUs, which knows no strides, may update it."""
    plain = parameter.device.type == "cpu" and not is_sharded(parameter)
    return plain and parameter.is_floating_point() and parameter.is_contiguous()
