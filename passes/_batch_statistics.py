"""BatchNorm that has learnt no statistics yet normalises by those of the batch."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]


@contextmanager
def batch_statistics_where_untrained(model: nn.Module) -> Generator[None]:
    """BatchNorms in training that never saw a batch use its statistics meanwhile.

    Their running mean 0 and variance 1 are placeholders: in evaluation such a network
    does not normalise at all, its values grow by orders of magnitude from layer to
    layer, and levels placed on them would round everything to zero once training
    normalises. A model that was put into evaluation is taken at its word, and a batch
    of one value a channel has no statistics.

    Args:
        model: not yet put into evaluation; the caller restores modes and buffers.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, _BatchNorm) and _awaits_statistics(module):
                handle = module.register_forward_pre_hook(_by_batch)
                stack.callback(handle.remove)
        yield


def _awaits_statistics(module: _BatchNorm) -> bool:
    """Whether it is in training with the statistics of a new layer, to the last bit."""
    mean, variance = module.running_mean, module.running_var
    if not module.training or mean is None or variance is None:
        return False
    return not bool(mean.any()) and bool((variance == 1).all())


def _by_batch(module: nn.Module, args: tuple[Any, ...]) -> None:
    values = args[0]
    assert isinstance(values, Tensor)
    module.training = values.numel() > values.shape[1]
