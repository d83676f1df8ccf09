"""What other tools rank edges by: local error, range, and the trace of the Hessian."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from gdnsq_fx.quantize.quantizer import Quantizer, quantization_disabled
from gdnsq_fx.quantize.weight_quantizer import WeightQuantizer
from gdnsq_fx.sites import weight_sites

HESSIAN_BATCHES = 2
HESSIAN_DRAWS = 2


@dataclass
class LocalError:
    """Sums over all values of one edge, of ``samples`` (or readings of a weight)."""

    signal: float = 0.0
    noise: float = 0.0
    product: float = 0.0
    quantized: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    samples: int = 0

    def add(self, value: Tensor, quantized: Tensor, samples: int) -> None:
        """Add one value and what the quantizer makes of it."""
        x, y = value.double(), quantized.double()
        self.signal += float(x.square().sum())
        self.noise += float((y - x).square().sum())
        self.product += float((x * y).sum())
        self.quantized += float(y.square().sum())
        self.low = min(self.low, float(x.min()))
        self.high = max(self.high, float(x.max()))
        self.samples += samples

    @property
    def inverse_sqnr(self) -> float:
        """Noise over signal."""
        return self.noise / max(self.signal, 1e-300)

    @property
    def squared_error(self) -> float:
        """Squared norm of the error of one sample, or of the weight."""
        return self.noise / self.samples

    @property
    def cosine_distance(self) -> float:
        """1 - cos of the angle between the exact and the quantized value."""
        return 1.0 - self.product / math.sqrt(self.signal * self.quantized + 1e-300)

    @property
    def range(self) -> float:
        """Largest minus least value."""
        return self.high - self.low


@torch.no_grad()
def local_errors(
    qmodel: GraphModule, batches: Sequence[Tensor]
) -> dict[str, LocalError]:
    """The error of every edge where it arises, the others in floating point."""
    found: dict[str, LocalError] = {}

    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, Quantizer)
        one = found.setdefault(module.edge, LocalError())
        samples = 1 if isinstance(module, WeightQuantizer) else len(output)
        one.add(output, module.quantize(output), samples)

    with quantization_disabled(qmodel), _hooked(qmodel, note):
        for batch in batches:
            qmodel(batch)
    return found


def mean_hessian_traces(
    qmodel: GraphModule, batches: Sequence[Tensor], targets: Sequence[Tensor]
) -> dict[str, float]:
    """Mean of the diagonal of the loss's Hessian on each edge (HAWQ-V2, 1911.03852).

    Hutchinson's estimate of one diagonal block at a time, at identity precision:
    mean over signs v of v' H v, over the number of elements. The loss is the cross
    entropy summed over positions, per sample; an activation's Hessian is that of its
    own sample.
    """
    traces: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)
    weights = {site.edge for site in weight_sites(qmodel)}
    pairs = list(zip(batches, targets, strict=True))[:HESSIAN_BATCHES]
    for batch, target in pairs:
        met: dict[str, list[Tensor]] = {}
        loss = _loss(qmodel, batch, target, met)
        for edge, tensors in tqdm(met.items(), desc="Hessian", unit="edge"):
            first = torch.autograd.grad(loss, tensors, create_graph=True)
            shared = 1 if edge in weights else len(batch)
            elements = sum(t.numel() for t in tensors) / shared
            for _ in range(HESSIAN_DRAWS):
                signs = [
                    torch.randint(0, 2, t.shape, generator=generator) * 2.0 - 1.0
                    for t in tensors
                ]
                second = torch.autograd.grad(
                    first, tensors, signs, retain_graph=True, allow_unused=True
                )
                total = sum(
                    float((v * h).sum())
                    for v, h in zip(signs, second, strict=True)
                    if h is not None
                )
                mean = total / elements / HESSIAN_DRAWS / len(pairs)
                traces[edge] = traces.get(edge, 0.0) + mean
    return traces


def _loss(
    qmodel: GraphModule, batch: Tensor, target: Tensor, met: dict[str, list[Tensor]]
) -> Tensor:
    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        assert isinstance(module, Quantizer)
        value = output.clone() if output.requires_grad else output.requires_grad_()
        met.setdefault(module.edge, []).append(value)
        return value

    # Only the plain implementation of attention can be differentiated twice.
    with (
        torch.enable_grad(),
        quantization_disabled(qmodel),
        _hooked(qmodel, keep),
        sdpa_kernel(SDPBackend.MATH),
    ):
        logits = qmodel(batch.clone() if batch.is_floating_point() else batch)
        classes = logits.shape[-1]
        total = F.cross_entropy(
            logits.reshape(-1, classes), target.reshape(-1), reduction="sum"
        )
        return total / len(batch)


@contextmanager
def _hooked(qmodel: GraphModule, hook: Any) -> Generator[None]:
    quantizers = [m for m in qmodel.modules() if isinstance(m, Quantizer)]
    handles = [q.register_forward_hook(hook) for q in quantizers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
