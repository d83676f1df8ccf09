"""BatchNorm in evaluation: torch's outputs to the bit, and torch's gradients."""

from __future__ import annotations

import pytest
import torch
from gdnsq_fx.passes._evaluated_norm import affine_norm, is_affine_norm
from torch import nn

CASES = [
    (nn.BatchNorm1d(3), (5, 3)),
    (nn.BatchNorm1d(3), (5, 3, 4)),
    (nn.BatchNorm2d(3, eps=0.1), (5, 3, 4, 2)),
    (nn.BatchNorm2d(3, affine=False), (5, 3, 4, 2)),
    (nn.BatchNorm3d(3), (2, 3, 4, 2, 2)),
]


@pytest.mark.parametrize(("norm", "shape"), CASES)
def test_it_is_the_norm_and_has_its_gradient(
    norm: nn.Module, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    norm.eval()
    assert is_affine_norm(norm)
    x = torch.randn(shape, generator=generator).requires_grad_()
    direction = torch.randn(shape, generator=generator)
    wanted, found = norm(x), affine_norm(norm, x)
    assert torch.equal(found, wanted)
    gradients = [torch.autograd.grad(y, x, direction)[0] for y in (wanted, found)]
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6)


def test_what_is_more_than_an_affine_map_is_left_alone() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).relu()

    hooked = nn.BatchNorm2d(3).eval()
    hooked.register_forward_hook(lambda *_: None)
    others = (nn.BatchNorm2d(3), Own(3).eval(), hooked, nn.ReLU())
    stateless = nn.BatchNorm2d(3, track_running_stats=False).eval()
    assert not any(map(is_affine_norm, (*others, stateless)))
