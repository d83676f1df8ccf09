"""Training forward and backward through ``torch.compile``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gdnsq_fx.errors import ConfigError

Compile = bool | Mapping[str, Any]
"""Whether, or with which options of ``torch.compile``."""


def compiled(module: nn.Module, options: Compile) -> nn.Module:
    """What to call instead of a module; parameters stay those of the module.

    The graph is read, projected and validated as it is: only training is compiled.

    Raises:
        ConfigError: options that are neither a bool nor a mapping.
    """
    if options is False:
        return module
    if options is True:
        options = {}
    if not isinstance(options, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            "compile must be True, False or options of torch.compile, got "
            f"{options!r}; write compile={{'mode': 'reduce-overhead'}}"
        )
    wrapped: Any = torch.compile(module, **options)
    return wrapped
