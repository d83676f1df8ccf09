"""Jeffreys divergence between outputs, and its second-order prediction.

With p the softmax output and J the Jacobian of the logits with respect to an edge whose
error is e, to second order KL = 1/2 |S' J e|^2 with ``S = diag(sqrt p) - p sqrt(p)'``
(``S S' = diag(p) - p p'``), and the Jeffreys divergence KL(p||q) + KL(q||p) is twice
that. For random signs v, ``E_v[(v' S' J e)^2] = |S' J e|^2``: one backward pass from
``S v`` serves every edge at once (``directions.py`` chooses the signs).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gdnsq_fx.errors import ConfigError

Curvature = Literal["softmax", "identity"]
LEAST_LOG_P = -1e4
LEAST_DOT = 1 << 14  # a call for each sample pays where a product would leave the cache


def primary_output(output: Any) -> Tensor:
    """The tensor of a model's output that is compared: ``logits`` or the first one.

    Args:
        output: a tensor, tuple, dict or dataclass-like output.

    Raises:
        ConfigError: there is no floating-point tensor in it.
    """
    named = output.get("logits") if isinstance(output, dict) else None
    if named is None:
        named = getattr(output, "logits", None)
    for leaf in [named, *tree_leaves(output)]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise ConfigError(
        f"the model's output ({type(output).__name__}) holds no floating-point tensor "
        "to compare; pass a loss of your own"
    )


def class_dim(logits: Tensor) -> int:
    """Dimension of the classes: 1 for dense maps ``[B, C, H, W]``, else the last.

    Raises:
        ConfigError: there are fewer than two classes, so every divergence would be 0.
    """
    dim = 1 if logits.ndim >= 4 else logits.ndim - 1
    if logits.ndim < 2 or logits.shape[dim] < 2:
        raise ConfigError(
            f"an output of shape {tuple(logits.shape)} has no classes to compare; for "
            'regression pass curvature="identity" to analyze and '
            "distillation_loss=gdnsq_fx.squared_distillation_loss to finetune"
        )
    return dim


def jeffreys(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(p||q) + KL(q||p) of each sample, in nats (GDNSQ, "metric smoothing").

    Args:
        logits, reference: ``[B, C]``, ``[B, ..., C]`` or dense ``[B, C, H, W]``;
            divergences of several positions of one sample add up.

    Returns:
        ``[B]`` divergences, at least 0.
    """
    dim = class_dim(logits)
    # Masked classes have logits of -inf on both sides: 0 * (inf - inf) is no number.
    log_p = torch.log_softmax(logits.float(), dim).clamp(min=LEAST_LOG_P)
    log_q = torch.log_softmax(reference.float(), dim).clamp(min=LEAST_LOG_P)
    each = (log_p.exp() - log_q.exp()) * (log_p - log_q)
    return each.reshape(each.shape[0], -1).sum(1)


def curvature_root(logits: Tensor, signs: Tensor, curvature: Curvature) -> Tensor:
    """S v: the signs seen through the square root of the output's curvature.

    Args:
        logits: output of the floating-point model.
        signs: v, +-1, of the same shape.
        curvature: ``softmax`` for logits; ``identity`` for a mean squared error.
    """
    if curvature == "identity":
        return signs
    dim = class_dim(logits)
    p = torch.softmax(logits.float(), dim)
    root = p.sqrt()
    spread = root * signs - p * (root * signs).sum(dim, keepdim=True)
    return spread.to(logits.dtype)


def divergence_slope(logits: Tensor, reference: Tensor, curvature: Curvature) -> Tensor:
    """Gradient of the divergence from the reference with respect to the logits.

    For softmax ``(q - p) + F(q) (z_q - z_p)`` with ``F(q) = diag(q) - q q'``; for a
    squared error ``2 (z_q - z_p)``. Same shape as the logits.
    """
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        if curvature == "softmax":
            total = jeffreys(leaf, reference.detach()).sum()
        else:
            total = (leaf - reference.detach()).square().sum()
        return torch.autograd.grad(total, leaf)[0]


def vanishing_divergence(slope: float, curvature: float) -> float:
    """What vanishes of a divergence when the change d that one edge makes is undone.

    With g the slope of the divergence D at the quantized output z, and ``d' F d`` half
    of its curvature along d, ``D(z) - D(z - t d)`` is ``t g'd - t^2 d' F d`` to second
    order. At t = 1 that is ``g'd - d' F d``, exact where the divergence is quadratic.
    Large changes lie beyond the top of the parabola, where the second order says
    nothing any more; from there on the top itself is taken, ``(g'd)^2 / (4 d' F d)``.

    Args:
        slope: g'd, nats per sample.
        curvature: ``d' F d``, at least 0.
    """
    if slope > 0.0 and curvature > slope / 2.0:
        return slope * slope / (4.0 * curvature)
    return slope - curvature


def sample_products(
    gradient: Tensor, errors: Sequence[Tensor], batch: int
) -> list[Tensor]:
    """Inner products of a gradient and errors for each sample, not squared yet.

    Args:
        gradient, errors: same shape, ``[B, ...]`` or ``[B*T, ...]``.
        batch: B.

    Returns:
        For each error ``[B]``, or ``[1]`` where samples do not lead: signs of different
        samples are independent, so the square of the sum has the same mean, with more
        variance.
    """
    # [T, B, C] with T a multiple of B leads with time, not with samples.
    second = gradient.shape[1] if gradient.ndim > 1 else 0
    rows = gradient.shape[0] if gradient.ndim else 0
    leads = rows == batch or (rows > 0 and rows % batch == 0 and second != batch)
    samples = batch if leads else 1
    first = gradient.float().reshape(samples, -1)
    others = [error.float().reshape(samples, -1) for error in errors]
    if not first.is_cpu or first.shape[1] < LEAST_DOT:
        return [(first * other).sum(1) for other in others]
    # Sample after sample, which stays in the cache for all its errors.
    rows_of = zip(first, *others, strict=True)
    each = [torch.dot(row, one) for row, *ones in rows_of for one in ones]
    return list(torch.stack(each).view(samples, -1).unbind(1))
