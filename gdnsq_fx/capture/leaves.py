"""Which modules stay whole in the graph."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]


def stays_whole(module: nn.Module, by_default: bool) -> bool:
    """Whether a module stays one ``call_module`` node.

    BatchNorm (and wrappers derived from it) and whatever has neither children nor
    parameters (dropout, stochastic depth) read ``self.training`` when they run. Kept
    whole they still do, so that ``train()`` and ``eval()`` go on working.

    Args:
        module: the module met while tracing.
        by_default: what `torch.fx.Tracer` would do (True for layers of ``torch.nn``).
    """
    if isinstance(module, _BatchNorm):
        return True
    bare = next(module.children(), None) is None
    bare = bare and next(module.parameters(recurse=False), None) is None
    return bare or by_default
