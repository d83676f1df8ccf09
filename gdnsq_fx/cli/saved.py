"""A model that was saved, and samples for it, as the options name them."""

from __future__ import annotations

from argparse import Namespace

from torch import Tensor
from torch.fx import GraphModule

from gdnsq_fx import loading
from gdnsq_fx.cli.data import random_samples, read_samples
from gdnsq_fx.cli.models import build_model

# A batch of one would be recorded as a size that never changes.
_LEAST_BATCH = 2


def read_saved(given: Namespace, count: int) -> tuple[GraphModule, Tensor]:
    """The converted model, and samples ``[count, ...]``, fewer where there are no more.

    Raises:
        GdnsqError, OSError: as they say.
    """
    model = build_model(*given.model).eval()
    count = max(count, _LEAST_BATCH)
    if given.data is None:
        samples = random_samples(given.input, count)
    else:
        samples = read_samples(given.data, given.input, count, given.seed)
    if len(samples) < _LEAST_BATCH:
        samples = samples.repeat(_LEAST_BATCH, *[1] * (samples.ndim - 1))
    return loading.load(given.checkpoint, model, samples[:_LEAST_BATCH]), samples
