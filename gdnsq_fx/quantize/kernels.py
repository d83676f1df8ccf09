"""Which code computes a quantizer: torch's own operations, or a compiled region.

Both compute the same; a compiled region reads and writes each tensor once, where eager
operations pass over memory several times. A model that is compiled as a whole
(`torch.compile(qmodel)`) has nothing to choose: quantizers are part of its graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gdnsq_fx.errors import ConfigError

Kernels = Literal["auto", "eager", "compile"]

logger = logging.getLogger(__name__)


def checked_kernels(kernels: str) -> None:
    """Raise unless this is one of the choices.

    Raises:
        ConfigError: lists them.
    """
    if kernels not in get_args(Kernels):
        raise ConfigError(
            f"kernels must be one of {', '.join(get_args(Kernels))}, got {kernels!r}"
        )


def is_compiled(kernels: Kernels, value: Tensor) -> bool:
    """Whether the quantizer of this value is to be compiled.

    ``auto`` compiles on CUDA devices alone: on a CPU the eager operations work in its
    caches. Where no compiler is found, the eager ones are taken, and the log says so.
    Whoever traces symbolically hands in proxies, and records the eager operations.
    """
    if not isinstance(value, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        return False
    device = value.device
    if kernels == "eager" or (kernels == "auto" and device.type != "cuda"):
        return False
    if torch.compiler.is_compiling():
        return False
    return _compiler_works(device.type)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a compiled region, one for all sizes."""
    return torch.compile(function, dynamic=True)


@cache
def _compiler_works(device: str) -> bool:
    """Whether `torch.compile` can compile for this kind of device, found by trying."""
    try:
        torch.compile(torch.neg, fullgraph=True)(torch.ones(2, device=device))
    # Whatever is missing (a C++ compiler, Triton, a supported Python) has an exception
    # of its own.
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        logger.warning(
            "quantizers on %s run eager kernels: torch.compile does not work here "
            "(%s: %s)",
            device,
            type(error).__name__,
            first_line,
        )
        return False
    return True
