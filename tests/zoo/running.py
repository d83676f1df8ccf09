"""Run a model of the zoo: same seed, fresh inputs, evaluation or a training pass."""

from __future__ import annotations

from typing import Any

import torch
from cases import Case, call, seed
from outputs import loss_of, tensors
from result import CheckFailed
from torch import nn


def forward(module: nn.Module, case: Case, size: int) -> Any:
    """The output for fresh inputs, since models may write into theirs."""
    inputs = case.inputs(size)
    seed(0)
    return call(module, inputs)


def evaluated(module: nn.Module, case: Case, size: int = 2) -> Any:
    """The output in evaluation."""
    module.eval()
    with torch.no_grad():
        return forward(module, case, size)


def trained(module: nn.Module, case: Case) -> Any:
    """The output in training; gradients of its loss are left on the module."""
    module.train()
    module.zero_grad(set_to_none=True)
    output = forward(module, case, 2)
    loss_of(output).backward()
    return output


def require_finite(output: Any, what: str) -> None:
    """Raise where an output holds no number, or one that is not finite."""
    found = tensors(output)
    if not any(t.numel() and t.is_floating_point() for t in found.values()):
        raise CheckFailed(f"no output to compare in {what}")
    for path, tensor in found.items():
        if not tensor.isfinite().all():
            raise CheckFailed(f"{path} is not finite in {what}")


def require_gradients(module: nn.Module) -> None:
    """Raise where the loss reached no parameter, or a gradient is not finite."""
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    if not any(bool(gradient.any()) for gradient in found.values()):
        raise CheckFailed("the loss reaches no parameter")
    for name, gradient in found.items():
        if not gradient.isfinite().all():
            raise CheckFailed(f"the gradient of {name} is not finite")
