"""Running statistics of BatchNorm, measured again at the final weights."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from gdnsq_fx.inputs import Batch
from gdnsq_fx.state import cloned, preserved_modes


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module, batches: Iterable[Batch], held: Iterable[nn.Module] = ()
) -> None:
    """Replace running means and variances by their plain averages over batches.

    In training they trail behind weights and levels that still moved, and each batch
    counts for less the older it is. All other layers are in evaluation meanwhile.

    Args:
        model: left in the modes that it had.
        batches: of training data; without any, all statistics stay as they are.
        held: layers whose statistics stay as they are.
    """
    kept = set(held)
    layers = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and module not in kept
    ]
    stream = iter(batches)
    first = next(stream, None)
    if not layers or first is None:
        return
    momenta = [layer.momentum for layer in layers]
    with preserved_modes(model):
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # torch's sign for a plain average
            layer.train()
        try:
            for batch in chain([first], stream):
                args, kwargs = cloned((batch.args, batch.kwargs))
                model(*args, **kwargs)
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
