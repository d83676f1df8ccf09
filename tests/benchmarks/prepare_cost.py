"""What `prepare` costs: time against one forward, memory, growth with the model.

    python tests/benchmarks/prepare_cost.py

Three tables: ResNet-50 against `torch.fx.symbolic_trace` plus one forward, interleaved
in one run; a decoder of 1.2 billion parameters from a config, in place; decoders of
growing depth. Prints them and writes them beside this file, in ``results/``; the README
quotes them. Takes some five minutes on one core and 10 GB of memory; needs the extra
"test".
"""

from __future__ import annotations

import threading
import time
import warnings
from pathlib import Path
from statistics import median

import torch
from tabulate import tabulate
from torch import nn
from torch.fx import symbolic_trace
from torchvision.models import resnet50
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import gdnsq_fx
from gdnsq_fx.demo.seeding import one_thread, seeded

RESULTS = Path(__file__).parent / "results"
BATCHES = (1, 8, 16, 32)
REPEATS = 5
DEPTHS = (4, 8, 16, 32, 64)
GIB = 2.0**30


class PeakMemory:
    """Highest resident memory of this process in a ``with`` block, above its start."""

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = self._resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def extra(self) -> int:
        """Bytes."""
        return self.peak - self.start

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, self._resident())

    @staticmethod
    def _resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096


def resnet_table() -> str:
    """Medians of interleaved repetitions at several sizes of the example."""
    model = resnet50(weights=None).eval()
    rows: list[tuple[str, ...]] = []
    for batch in tqdm(BATCHES, unit="batch size"):
        images = torch.randn(batch, 3, 224, 224)
        plain: list[float] = []
        ours: list[float] = []
        for _ in range(REPEATS + 1):  # the first warms up
            plain.append(_seconds(_trace_and_run, model, images))
            ours.append(_seconds(gdnsq_fx.prepare, model, images))
        ratios = [o / p for o, p in zip(ours[1:], plain[1:], strict=True)]
        rows.append(
            (
                str(batch),
                f"{median(plain[1:]):.2f}",
                f"{median(ours[1:]):.2f}",
                f"{median(ratios):.2f}",
                f"{min(ratios):.2f} to {max(ratios):.2f}",
            )
        )
    headers = ("images", "trace + forward, s", "prepare, s", "ratio", "range")
    return _markdown(rows, headers)


def decoder_table() -> str:
    """One decoder of 1.2 billion parameters, in place."""
    model = _decoder(layers=16, width=2048, vocabulary=32000)
    parameters = sum(p.numel() for p in model.parameters())
    with PeakMemory() as memory:
        took = _seconds(_prepare_in_place, model)
    weights = 4 * parameters
    row = (
        f"{parameters / 1e9:.2f} billion",
        f"{took:.1f}",
        f"{weights / GIB:.2f}",
        f"{memory.extra / GIB:.3f}",
        f"{100 * memory.extra / weights:.1f} %",
    )
    headers = ("parameters", "prepare, s", "weights, GiB", "extra, GiB", "share")
    return _markdown([row], headers)


def depth_table() -> str:
    """Time for each node must not grow with the number of nodes."""
    rows: list[tuple[str, ...]] = []
    for layers in tqdm(DEPTHS, unit="depth"):
        model = _decoder(layers=layers, width=64, vocabulary=100)
        times = [_seconds(_prepare_in_place, model) for _ in range(3)]
        nodes = len(_prepare_in_place(model).graph.nodes)
        took = median(times)
        rows.append(
            (str(layers), str(nodes), f"{took:.2f}", f"{1e3 * took / nodes:.2f}")
        )
    return _markdown(rows, ("layers", "nodes", "prepare, s", "ms per node"))


def _trace_and_run(model: nn.Module, images: torch.Tensor) -> None:
    symbolic_trace(model)
    with torch.no_grad():
        model(images)


def _decoder(layers: int, width: int, vocabulary: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 128 or 2,
    )
    return LlamaForCausalLM(config).eval()


def _prepare_in_place(model: nn.Module) -> torch.fx.GraphModule:
    tokens = torch.arange(8)[None]
    config = gdnsq_fx.QuantConfig(weight_bits=4, act_bits=8)
    return gdnsq_fx.prepare(model, {"input_ids": tokens}, config, inplace=True)


def _seconds(call: object, *arguments: object) -> float:
    assert callable(call)
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def _markdown(rows: list[tuple[str, ...]], headers: tuple[str, ...]) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    """Measure, print and write."""
    warnings.simplefilter("ignore")  # calibration from the example alone, on purpose
    with seeded(0), one_thread():
        tables = {
            "ResNet-50, 224 x 224, medians of interleaved runs": resnet_table(),
            "Decoder, in place": decoder_table(),
            "Growth with depth": depth_table(),
        }
    text = "\n\n".join(f"{title}\n\n{table}" for title, table in tables.items())
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "prepare_cost.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
