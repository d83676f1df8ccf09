"""What a training step of a prepared model costs, against floating point and peers.

    python tests/benchmarks/qat_overhead.py [--quick] [--threads 2] [--no-compile]

A step is forward, loss, backward and Adam. Ours aligns gradients at the cap and
projects to the targets besides, as `finetune` does with its defaults; in a row of its
own it adds the penalty, as where bits come down. All variants of one network take
turns, step by step, in one run: what is printed are medians, and medians of the ratios
to the floating-point step of the same round (compiled against compiled). Saved
activations are the bytes of distinct storages that autograd keeps for backward, those
of parameters and buffers left out. Writes its tables beside this file, in ``results/``.
Needs the extra "test"; Brevitas and torchao are measured where they are installed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import qat_peers
import torch
import torch.nn.functional as F
from qat_networks import NETWORKS, Network, decoder, tokens
from tabulate import tabulate
from torch import Tensor, nn
from torch.fx import GraphModule
from torchvision.models import resnet50
from tqdm import tqdm

import gdnsq_fx
from gdnsq_fx.demo.seeding import seeded
from gdnsq_fx.training.constraint import Constraint

RESULTS = Path(__file__).parent / "results" / "qat_overhead.md"
MIB = 2.0**20
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
    """

    name: str
    model: Callable[[Tensor], Tensor]
    owner: nn.Module
    base: str
    constraint: Constraint | None = None
    growth: float = 0.0
    seconds: list[float] = field(default_factory=list)
    saved: int = 0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.owner.parameters(), lr=1e-5)

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
    absent: list[str] = []
    for name, build in qat_peers.PEERS.items():
        try:
            peer = build(model)
            made.append(Variant(name, peer, peer, float_base))
        except qat_peers.Absent as reason:
            absent.append(f"{name} on {network.name}: {reason}")
    if compiled:
        regional = prepared(model, x, "ours, quantizers compiled", float_base)
        gdnsq_fx.use_kernels(regional.owner, "compile")
        made.append(regional)
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


def prepared(
    model: nn.Module, x: Tensor, name: str, base: str, growth: float = 0.0
) -> Variant:
    """Our variant of a model."""
    config = gdnsq_fx.QuantConfig(qat_peers.BITS, qat_peers.BITS)
    qmodel = gdnsq_fx.prepare(model, x[:2], config, [x])
    return Variant(name, qmodel, qmodel, base, Constraint(qmodel), growth)


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


def rows_of(network: Network, made: list[Variant]) -> list[tuple[str, ...]]:
    """Rows of the table of one network."""
    by_name = {variant.name: variant for variant in made}
    rows: list[tuple[str, ...]] = []
    for variant in made:
        base = by_name[variant.base]
        ratios = [a / b for a, b in zip(variant.seconds, base.seconds, strict=True)]
        rows.append(
            (
                network.name,
                variant.name,
                f"{1e3 * median(variant.seconds):.0f}",
                f"{median(ratios):.2f}",
                f"{variant.saved / MIB:.1f}",
                f"{variant.saved / base.saved:.2f}",
            )
        )
    return rows


HEADERS = ("network", "training", "step, ms", "ratio", "saved, MiB", "ratio")


def main_table(networks: tuple[Network, ...], options: argparse.Namespace) -> str:
    """All variants of all networks, and what did not run."""
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    for network in tqdm(networks, unit="network"):
        x = network.batch(network.samples)
        made, absent = variants(network, x, compiled=options.compile)
        measure(made, x, targets_of(made[0], x), options.rounds, options.clock)
        rows += rows_of(network, made)
        notes += absent
        tqdm.write(_markdown(rows, HEADERS))  # lest minutes of work be lost
    absent_lines = "".join(f"\nabsent: {note}" for note in notes)
    return _markdown(rows, HEADERS) + "\n" + absent_lines


def growth_table(cases: list[tuple[str, Network]], options: argparse.Namespace) -> str:
    """Ours against floating point as batch or depth grows."""
    rows: list[tuple[str, ...]] = []
    for label, network in tqdm(cases, unit="size"):
        x = network.batch(network.samples)
        model = network.build()
        base = Variant("floating point", model, model, "floating point")
        made = [base, prepared(model, x, "ours", base.name)]
        for variant in made:
            variant.owner.train()
        measure(made, x, targets_of(base, x), options.rounds, options.clock)
        _, ours = rows_of(network, made)
        rows.append((label, f"{1e3 * median(base.seconds):.0f}", *ours[2:]))
    headers = ("size", "floating point, ms", "ours, ms", *HEADERS[3:])
    return _markdown(rows, headers)


def growth_cases(*, quick: bool) -> list[tuple[str, Network]]:
    """ResNet-18 at four batch sizes, decoders of four depths."""
    resnet = NETWORKS[0]
    cases: list[tuple[str, Network]] = []
    for samples in (4, 8, 16, 32):
        one = Network(resnet.name, resnet.build, resnet.batch, samples)
        cases.append((f"ResNet-18, batch {samples}", one))
    for layers in () if quick else (2, 4, 8, 16):
        name = f"decoder, {layers} layers"
        cases.append((name, Network(name, partial(decoder, layers), tokens, 4)))
    return cases


def targets_of(variant: Variant, x: Tensor) -> Tensor:
    """A random class for each row of logits."""
    with torch.no_grad():
        shape = variant.model(x).shape
    return torch.randint(shape[1], shape[:1])


def deployment_row() -> str:
    """Seconds for prepare, convert and save of ResNet-50."""
    model, x = resnet50().eval(), torch.randn(1, 3, 224, 224)
    start = time.perf_counter()
    qmodel = gdnsq_fx.prepare(model, x, gdnsq_fx.QuantConfig(4, 4), [x])
    with tempfile.TemporaryDirectory() as folder:
        gdnsq_fx.save(gdnsq_fx.convert(qmodel), Path(folder) / "model.safetensors")
    took = time.perf_counter() - start
    return f"ResNet-50, 224 x 224: prepare, convert and save together {took:.1f} s"


def _markdown(rows: list[tuple[str, ...]], headers: tuple[str, ...]) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="ResNet-18 alone")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument(
        "--cpu-time",
        dest="clock",
        action="store_const",
        const=time.process_time,
        default=time.perf_counter,
        help="time of this process, where others share the machine",
    )
    return parser.parse_args()


def main() -> None:
    """Measure, print and write."""
    options = _options()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    networks = NETWORKS[:1] if options.quick else NETWORKS
    with seeded(0):
        parts = [
            f"{options.threads} thread(s), {options.rounds} rounds",
            main_table(networks, options),
            growth_table(growth_cases(quick=options.quick), options),
            deployment_row(),
        ]
    text = "\n\n".join(parts) + "\n"
    print(text)
    if not options.quick:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
