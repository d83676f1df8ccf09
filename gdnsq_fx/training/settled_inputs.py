"""Levels of what enters the model: at eight bits calibration has settled them.

Images do not change while a network learns, and there is little to gain from a better
step of 256 levels. Yet its gradient takes the gradient of the first layer by its input,
which training in floating point never computes: 4 to 8 % of a whole step.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn
from torch.fx import GraphModule, Node

from gdnsq_fx.sites import ActivationSite, activation_sites

FROM_BITS = 8


@contextmanager
def settled_inputs(graph_module: GraphModule) -> Generator[None]:
    """Inside the block such levels ask for no gradients.

    Args:
        graph_module: a prepared model whose targets do not change. Inside opaque
            modules all levels learn.
    """
    held = list(_settled(graph_module))
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


def _settled(graph_module: GraphModule) -> Generator[nn.Parameter]:
    for site in activation_sites(graph_module):
        if site.owner is graph_module and _is_settled(site):
            yield from (p for p in site.quantizer.parameters() if p.requires_grad)


def _is_settled(site: ActivationSite) -> bool:
    sources = [node.args[0] for node in site.nodes]
    entering = all(isinstance(s, Node) and s.op == "placeholder" for s in sources)
    return entering and site.quantizer.spec.bits >= FROM_BITS
