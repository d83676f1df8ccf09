"""Levels are computed again in backward: same gradients, less kept, clear errors."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import GraphModule
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import gdnsq_fx
from gdnsq_fx.channels import ChannelLayout
from gdnsq_fx.quantize.activation_quantizer import ActivationQuantizer
from gdnsq_fx.quantize.functions import quantize_activation, quantize_weight
from gdnsq_fx.quantize.kernels import Kernels
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer
from gdnsq_fx.spec import Estimator, QuantSpec

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)


def _images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class _Net(nn.Module):
    """A convolution, a residual sum, a linear layer on tokens, a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(8, 8, 1)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.gelu(self.conv(x) + self.shortcut(x))
        tokens = x.flatten(2).transpose(1, 2)
        return self.linear(tokens @ (tokens.transpose(1, 2) @ tokens)).mean(1)


def _prepared(estimator: Estimator = "lsq") -> GraphModule:
    torch.manual_seed(0)
    config = gdnsq_fx.QuantConfig(4, 4, estimator=estimator)
    return gdnsq_fx.prepare(_Net(), _images(), config, [_images()]).train()


def _gradients(
    qmodel: GraphModule, context: AbstractContextManager[None]
) -> list[Tensor]:
    torch.manual_seed(1)
    with context:
        output = qmodel(_images())
    loss = F.cross_entropy(output, torch.arange(4))
    return list(torch.autograd.grad(loss, list(qmodel.parameters())))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_are_the_same_to_the_bit(estimator: Estimator) -> None:
    qmodel = _prepared(estimator)
    wanted = _gradients(qmodel, nullcontext())
    found = _gradients(qmodel, gdnsq_fx.recomputed_levels())
    assert all(map(torch.equal, found, wanted))


def _kept(forward: AbstractContextManager[None], model: nn.Module) -> int:
    """Bytes of distinct storages that backward keeps, those of parameters left out."""
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), forward:
        output = model(_images())
    del output
    stored = [*model.parameters(), *model.buffers()]
    for tensor in stored:
        found.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def test_no_more_is_kept_than_in_floating_point() -> None:
    qmodel = _prepared()
    torch.manual_seed(0)
    floating = _kept(nullcontext(), _Net().train())
    plain = _kept(nullcontext(), qmodel)
    lean = _kept(gdnsq_fx.recomputed_levels(), qmodel)
    assert plain > 1.4 * floating
    # Scalars and channels of the quantizers are all that comes on top.
    assert lean < 1.05 * floating


def test_backward_again_and_again() -> None:
    qmodel = _prepared()
    with gdnsq_fx.recomputed_levels():
        loss = qmodel(_images()).square().sum()
    parameters = list(qmodel.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, first, second))


def test_second_derivatives_are_an_error_here_too() -> None:
    x = torch.tensor([0.3, 0.7], requires_grad=True)
    scalars = [torch.tensor(v) for v in (0.5, 2.0, 0.0)]
    with gdnsq_fx.recomputed_levels():
        loss = quantize_activation(x, *scalars, "lsq").square().sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_an_input_modified_in_place_is_an_error() -> None:
    x = torch.rand(8, requires_grad=True)
    scalars = [torch.tensor(v) for v in (0.1, 1.0, 0.0)]
    with gdnsq_fx.recomputed_levels():
        doubled = x * 2
        loss = quantize_activation(doubled, *scalars, "lsq").square().sum()
    doubled.add_(1.0)
    with pytest.raises(RuntimeError, match="modified in place"):
        loss.backward()


def test_levels_modified_in_place_are_kept_as_they_are_then() -> None:
    """Something that writes into the levels is backed by what it wrote."""

    def gradient(context: AbstractContextManager[None]) -> Tensor:
        x = torch.linspace(0.0, 1.0, 9, requires_grad=True)
        scalars = [torch.tensor(v) for v in (0.1, 1.0, 0.0)]
        with context:
            levels = quantize_activation(x, *scalars, "lsq").mul_(3.0)
            loss = levels.square().sum()
        return torch.autograd.grad(loss, x)[0]

    assert torch.equal(gradient(gdnsq_fx.recomputed_levels()), gradient(nullcontext()))


def test_views_of_a_quantized_weight() -> None:
    def gradients(context: AbstractContextManager[None]) -> tuple[Tensor, ...]:
        weight = torch.linspace(-1.0, 1.0, 24).reshape(6, 4).requires_grad_()
        step = torch.full((6, 1), 0.1, requires_grad=True)
        x = torch.linspace(0.0, 1.0, 8).reshape(2, 4).requires_grad_()
        with context:
            low = weight.detach().amin(1, keepdim=True)
            levels = quantize_weight(weight, step, low, (1,), "lsq")
            first, second = levels.chunk(2)
            loss = (x @ first.t()).square().sum() + (x @ second.t()).sum()
        return torch.autograd.grad(loss, (weight, step, x))

    lean = gradients(gdnsq_fx.recomputed_levels())
    assert all(map(torch.equal, lean, gradients(nullcontext())))


def test_inside_checkpointing() -> None:
    qmodel = _prepared().eval()  # forward runs twice, which statistics would show
    wanted = _gradients(qmodel, nullcontext())
    torch.manual_seed(1)

    def forward(x: Tensor) -> Tensor:
        with gdnsq_fx.recomputed_levels():
            return qmodel(x)

    output = checkpoint(forward, _images(), use_reentrant=False)
    loss = F.cross_entropy(output, torch.arange(4))
    found = torch.autograd.grad(loss, list(qmodel.parameters()))
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_checkpointing_inside(kernels: Kernels) -> None:
    """The pass that computes again must save what the first one did."""
    quantizer = ActivationQuantizer("x", QuantSpec(2, "lsq"), nonnegative=False)
    quantizer.cover(-2.0, 2.0, 2.0)
    quantizer.kernels = kernels

    def gradients(forward: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        x = _images().requires_grad_()
        with gdnsq_fx.recomputed_levels():
            output = forward(lambda x: quantizer(x).exp(), x).sum()
        return torch.autograd.grad(output, (x, quantizer.log2_step))

    found = gradients(partial(checkpoint, use_reentrant=False))
    assert all(map(torch.equal, found, gradients(lambda function, x: function(x))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_hooks_may_give_back_another_precision(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 4096)
    activation = ActivationQuantizer("x", QuantSpec(3, "lsq"), nonnegative=False)
    activation.cover(-2.0, 2.0, 3.0)
    kept = WeightQuantizer("w", QuantSpec(3, "lsq"), ChannelLayout(0), weight)
    kept.open_to(weight, 3.0)
    for quantizer in (activation, kept):
        found = []
        for hooks in (
            nullcontext(),
            saved_tensors_hooks(lambda t: t.to(dtype), lambda t: t),
        ):
            leaf = weight.clone().requires_grad_()
            with hooks, gdnsq_fx.recomputed_levels():
                made = quantizer(leaf).sum()
            found.append(torch.autograd.grad(made, (leaf, quantizer.log2_step)))
        (plain, _), (given_back, by_step) = found
        assert (plain != given_back).float().mean() < 1e-3  # beside an end of the clamp
        assert by_step.isfinite().all()


def test_without_gradients_nothing_is_recorded() -> None:
    qmodel = _prepared().eval()
    with torch.no_grad():
        wanted = qmodel(_images())
        with gdnsq_fx.recomputed_levels():
            assert torch.equal(qmodel(_images()), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    def gradients(context: AbstractContextManager[None]) -> tuple[Tensor, ...]:
        x = torch.linspace(-1.0, 3.0, 30).to(dtype).requires_grad_()
        step = torch.tensor(2.0 / 255.0, requires_grad=True)
        with context:
            scalars = (step, torch.tensor(2.0), torch.tensor(-0.3))
            loss = quantize_activation(x, *scalars, "lsq").square().sum()
        return torch.autograd.grad(loss, (x, step))

    lean = gradients(gdnsq_fx.recomputed_levels())
    assert all(map(torch.equal, lean, gradients(nullcontext())))


@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_a_loss_that_lives_on_keeps_no_inputs(kernels: Kernels) -> None:
    """As in a loop that names its loss: it lives through the next forward pass."""
    quantizer = ActivationQuantizer("x", QuantSpec(3, "lsq"), nonnegative=False)
    quantizer.cover(-2.0, 2.0, 3.0)
    quantizer.kernels = kernels
    weight = torch.randn(64, 64, requires_grad=True)
    with gdnsq_fx.recomputed_levels():
        x = weight * 2.0
        loss = quantizer(x).matmul(torch.randn(64, 64)).square().sum()
    storage = StorageWeakRef(x.untyped_storage())
    del x
    assert not storage.expired()
    loss.backward()
    assert storage.expired()


def test_nothing_stays_behind_after_backward() -> None:
    """A node that holds its own output is a cycle that no garbage collector sees."""
    qmodel, x = _prepared(), _images()

    def step() -> None:
        with gdnsq_fx.recomputed_levels():
            output = qmodel(x)
        output.square().sum().backward()

    def alive() -> int:
        gc.collect()
        return sum(type(found) is Tensor for found in gc.get_objects())

    step()
    before = alive()
    for _ in range(5):
        step()
    assert alive() <= before
