"""Which modules stay whole in the graph."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

_OPENED = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_WHOLE = (_BatchNorm, ParametrizationList, torch.jit.ScriptModule)


def stays_whole(module: nn.Module) -> bool:
    """Whether a module stays one ``call_module`` node whatever it computes.

    Layers of ``torch.nn`` do, except for those that are made of others (attention,
    transformer layers), fuse several products (LSTM, GRU, RNN) or have a weight that a
    hook computes (pruning, the old weight norm). BatchNorm and
    wrappers derived from it read ``self.training`` when they run, so that ``train()``
    and ``eval()`` go on working; a `ParametrizationList` makes one weight; the code of
    a `ScriptModule` cannot be looked into.
    """
    if isinstance(module, _WHOLE):
        return True
    if isinstance(module, _OPENED):
        return False
    if _computes_weight(module):
        return False
    own = type(module).__module__.startswith("torch.nn.")
    children = {name for name, _ in module.named_children()}
    if "parametrizations" in children and parametrize._cache_enabled:
        return False  # others may read the very tensor that this layer computes
    return own and children <= {"parametrizations"}


def _computes_weight(module: nn.Module) -> bool:
    """Whether a hook makes the weight before each call, as pruning does."""
    return isinstance(vars(module).get("weight"), Tensor)


def is_bare(module: nn.Module) -> bool:
    """Whether a module has neither children nor parameters, as dropout has.

    Such a module stays whole, because it often reads ``self.training`` when it runs,
    unless a matrix product or a convolution is found inside.
    """
    return (
        next(module.children(), None) is None
        and next(module.parameters(recurse=False), None) is None
    )


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether something watches the gradients of a module, which opening would drop."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


_LIKE_INPUT = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.ReLU, nn.Dropout)


def is_like_input(module: nn.Module) -> bool:
    """Whether a module's output has the form of its input, and nothing is written into.

    Its fake output need not be computed, which saves a third of the recording of a
    convolutional network.
    """
    inplace = getattr(module, "inplace", False)
    hooked = module._forward_hooks or module._forward_pre_hooks
    return type(module) in _LIKE_INPUT and not inplace and not hooked
