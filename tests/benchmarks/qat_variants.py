"""Ways to train a network, for `qat_overhead.py`, and steps of them in turns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import qat_peers
import torch
import torch.nn.functional as F
from qat_networks import Network
from torch import Tensor, nn
from torch.fx import GraphModule
from tqdm import tqdm

import gdnsq_fx
from gdnsq_fx.quantize.kernels import Kernels
from gdnsq_fx.training.constraint import Constraint
from gdnsq_fx.training.settled_inputs import settled_inputs

WARM_UP = 2


@dataclass
class Variant:
    """One way to train a network.

    Attributes:
        name: as printed.
        model: what is called, compiled perhaps.
        owner: the module whose parameters are trained.
        base: name of the variant that it is compared with.
        constraint: of a prepared model.
        growth: of its penalty; 0: none.
        seconds: of every step.
        saved: bytes that autograd keeps.
        training: what holds as long as it is trained, as in `finetune`.
    """

    name: str
    model: Callable[[Tensor], Tensor]
    owner: nn.Module
    base: str
    constraint: Constraint | None = None
    growth: float = 0.0
    seconds: list[float] = field(default_factory=list)
    saved: int = 0
    training: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        parameters = self.owner.parameters()
        self.optimizer = torch.optim.Adam(parameters, lr=1e-5, fused=True)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Forward and loss."""
        if self.constraint is None:
            return F.cross_entropy(self.model(x), targets)
        with gdnsq_fx.recomputed_levels():
            output = self.model(x)
        return F.cross_entropy(output, targets)

    def step(self, x: Tensor, targets: Tensor) -> None:
        """One step of training."""
        self.optimizer.zero_grad()
        loss = self.loss(x, targets)
        loss.backward()
        if self.constraint is not None:
            self.constraint.observe_loss(loss)
            if self.growth:
                self.constraint.penalty(self.growth).backward()
            self.constraint.align_gradients(float)
        self.optimizer.step()
        if self.constraint is not None:
            self.constraint.project(float)


def variants(
    network: Network, x: Tensor, *, compiled: bool
) -> tuple[list[Variant], list[str]]:
    """All variants that run here, and a line for each that does not."""
    model = network.build()
    float_base = "floating point"
    made = [Variant(float_base, model, model, float_base)]
    made.append(prepared(model, x, "ours", float_base))
    made.append(prepared(model, x, "ours, with penalty", float_base, growth=0.5))
    made.append(prepared(model, x, "ours, no C compiler", float_base, kernels="eager"))
    absent: list[str] = []
    for name, build in qat_peers.PEERS.items():
        try:
            peer = build(model)
            made.append(Variant(name, peer, peer, float_base))
        except qat_peers.Absent as reason:
            absent.append(f"{name} on {network.name}: {reason}")
    if compiled:
        base = "floating point, compiled"
        copied = network.build()
        made.append(Variant(base, torch.compile(copied), copied, base))
        ours = prepared(network.build(), x, "ours, compiled", base)
        assert isinstance(ours.owner, GraphModule)
        ours.model = torch.compile(ours.owner, fullgraph=True)
        made.append(ours)
    for variant in made:
        variant.owner.train()
    return made, absent


def against_floating_point(network: Network, x: Tensor) -> list[Variant]:
    """Floating point and ours alone."""
    model = network.build()
    base = Variant("floating point", model, model, "floating point")
    made = [base, prepared(model, x, "ours", base.name)]
    for variant in made:
        variant.owner.train()
    return made


def prepared(
    model: nn.Module,
    x: Tensor,
    name: str,
    base: str,
    growth: float = 0.0,
    kernels: Kernels = "auto",
) -> Variant:
    """Our variant of a model."""
    config = gdnsq_fx.QuantConfig(qat_peers.BITS, qat_peers.BITS)
    qmodel = gdnsq_fx.prepare(model, x[:2], config, [x])
    gdnsq_fx.use_kernels(qmodel, kernels)
    made = Variant(name, qmodel, qmodel, base, Constraint(qmodel), growth)
    made.training.enter_context(settled_inputs(qmodel))
    return made


def measure(
    made: list[Variant],
    x: Tensor,
    targets: Tensor,
    rounds: int,
    clock: Callable[[], float],
) -> None:
    """Interleaved steps; the first warm up and are dropped."""
    for number in tqdm(range(rounds + WARM_UP), unit="round", leave=False):
        for variant in made:
            start = clock()
            variant.step(x, targets)
            if number >= WARM_UP:
                variant.seconds.append(clock() - start)
    for variant in made:
        variant.saved = saved_bytes(variant, x, targets)


def saved_bytes(variant: Variant, x: Tensor, targets: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward."""
    stored = [*variant.owner.parameters(), *variant.owner.buffers()]
    excluded = {t.untyped_storage().data_ptr() for t in stored}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Held, so that no address is given out twice.
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = variant.loss(x, targets)
    del loss
    sizes = {p: t.untyped_storage().nbytes() for p, t in kept.items()}
    return sum(size for place, size in sizes.items() if place not in excluded)
