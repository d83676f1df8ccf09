"""Gradient estimators of rounding: ``ste``, ``lsq``, ``ewgs``, ``aewgs``.

With the rounding error in steps ``n = k - (x - b) / s`` and the gradient ``g`` arriving
at ``y = s*k + b``, an estimator is two choices: the derivative of the noise term
``s*n`` with respect to ``s``, and the factor on the gradient that passes to ``x``.

| estimator | dy/ds | dy/dx |
| --- | --- | --- |
| ``ste`` | r / sqrt(3), r = +-1/2 drawn per element | 1 |
| ``lsq`` | n | 1 |
| ``ewgs`` | as ``ste`` | 1 - 1e-3 * sign(g) * n |
| ``aewgs`` | as ``ste`` | 1 - min(delta * sign(g) * n, 0.99), delta from the batch |

Sources: GDNSQ (arXiv 2508.14004) for the dithering of ``ste`` and for ``aewgs``; LSQ
(Esser et al., arXiv 1902.08153); EWGS (Lee et al., arXiv 2104.00903), whose
``x_n - x_q`` is ``-n`` here.

The published reference code differs in places: its ``ste`` noise carries a further
factor ``s``, its ``ewgs`` backward does not run, and its activations always use
``ste``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gdnsq_fx.spec import Estimator

EWGS_DELTA = 1e-3
AEWGS_CEILING = 0.99
MIN_VARIANCE = 1e-3


def step_derivative(error: Tensor, estimator: Estimator) -> Tensor:
    """Derivative of the noise ``s*n`` with respect to the step ``s``.

    Args:
        error: rounding error n in steps, any shape.
        estimator: ``lsq`` takes n itself; the others replace it by an independent sign
            of the same variance 1/12.

    Returns:
        A tensor of the shape of ``error``.
    """
    if estimator == "lsq":
        return error
    signs = torch.empty_like(error).bernoulli_(0.5).sub_(0.5)
    return signs.div_(math.sqrt(3.0))


def input_factor(
    gradient: Tensor, error: Tensor, estimator: Estimator, dims: Sequence[int]
) -> Tensor | None:
    """Element-wise factor on the gradient that passes to the input.

    Args:
        gradient: gradient g arriving at the quantized value.
        error: rounding error n in steps, of the same shape.
        estimator: which estimator.
        dims: dimensions that share one scale, over which ``aewgs`` takes its mean.

    Returns:
        The factor, or None where it is 1 (``ste``, ``lsq``).
    """
    if estimator in ("ste", "lsq"):
        return None
    signed = torch.sign(gradient) * error
    if estimator == "ewgs":
        return 1.0 - EWGS_DELTA * signed
    delta = _adaptive_delta(signed, error, tuple(dims))
    return 1.0 - (delta * signed).clamp(max=AEWGS_CEILING)


def _adaptive_delta(signed: Tensor, error: Tensor, dims: tuple[int, ...]) -> Tensor:
    """delta = mean(sign(g)*n) / max(var(n), 1e-3) per scale group, over all ranks."""
    moments = torch.stack(
        [
            signed.mean(dims, keepdim=True),
            error.mean(dims, keepdim=True),
            error.square().mean(dims, keepdim=True),
        ]
    )
    moments = _mean_over_ranks(moments)
    mean, mean_error, mean_square = moments.unbind(0)
    variance = mean_square - mean_error.square()
    return mean / variance.clamp(min=MIN_VARIANCE)


def _mean_over_ranks(value: Tensor) -> Tensor:
    """Average over data-parallel ranks, so that every rank applies the same factor."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    distributed.all_reduce(value)
    return value / distributed.get_world_size()
