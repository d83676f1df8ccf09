"""Capacities belong to values, and the narrowest set of values is found."""

from __future__ import annotations

import itertools
import math
import random

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

import gdnsq_fx
from gdnsq_fx.analysis.cuts import MinimumCut, minimum_cut


def _graph(
    nodes: dict[str, float | None], edges: list[tuple[str, str]]
) -> nx.DiGraph[str]:
    """Values with their bits; None: floating point of 3200 bits. ``in`` to ``out``."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    for name, bits in {"in": None, **nodes, "out": None}.items():
        op = {"in": "placeholder", "out": "output"}.get(name, "call_function")
        graph.add_node(
            name,
            op=op,
            label=f"layer.{name}",
            bits=3200.0 if bits is None else float(bits),
            float_bits=3200.0,
            quantized=bits is not None,
        )
    graph.add_edges_from(edges)
    return graph


def _cut(graph: nx.DiGraph[str]) -> MinimumCut:
    found = minimum_cut(graph)
    assert found is not None
    return found


def _path(*names: str) -> list[tuple[str, str]]:
    return list(itertools.pairwise(names))


def test_chain_is_cut_at_its_narrowest_value() -> None:
    graph = _graph({"a": 300, "b": 100, "c": 200}, _path("in", "a", "b", "c", "out"))
    assert _cut(graph) == MinimumCut(("layer.b",), 100.0, 3200.0)
    assert _cut(graph).share == 100.0 / 3200.0


def test_residual_path_counts() -> None:
    """in -> a -> {b, skip} -> add -> c: b alone does not separate."""
    edges = [*_path("in", "a", "b", "add", "c", "out"), ("a", "add")]
    graph = _graph({"a": 300, "b": 50, "add": None, "c": 250}, edges)
    assert _cut(graph) == MinimumCut(("layer.c",), 250.0, 3200.0)
    graph = _graph({"a": 300, "b": 50, "add": None, "c": 400}, edges)
    assert _cut(graph).values == ("layer.a",)


def test_two_branches_are_cut_together() -> None:
    edges = [*_path("in", "a", "join", "c", "out"), *_path("in", "b", "join")]
    graph = _graph({"a": 60, "b": 70, "join": None, "c": 500}, edges)
    cut = _cut(graph)
    assert (set(cut.values), cut.bits) == ({"layer.a", "layer.b"}, 130.0)
    assert cut.float_bits == 6400.0


def test_value_read_twice_carries_its_bits_once() -> None:
    edges = [*_path("in", "a", "b", "join", "out"), *_path("a", "c", "join")]
    graph = _graph({"a": 100, "b": 60, "c": 60, "join": 500}, edges)
    assert _cut(graph).values == ("layer.a",)


def test_dense_block() -> None:
    """Each layer reads all before it; the cut is the set of all growth values."""
    names = ["g0", "g1", "g2", "g3"]
    edges = [("in", "g0")]
    edges += [(a, b) for i, b in enumerate(names) for a in names[:i]]
    edges += [(a, "cat") for a in names] + _path("cat", "t", "out")
    bits: dict[str, float | None] = {"g0": 40, "g1": 10, "g2": 10, "g3": 10}
    # Everything flows through g0, so g0 alone is the cut ...
    assert _cut(_graph({**bits, "cat": None, "t": 90}, edges)).values == ("layer.g0",)
    # ... unless the values behind it are narrower, transition included.
    assert _cut(_graph({**bits, "cat": None, "t": 30}, edges)).values == ("layer.t",)
    edges[0:1] = [("in", n) for n in names]
    cut = _cut(_graph({**bits, "cat": None, "t": 90}, edges))
    assert (set(cut.values), cut.bits) == ({f"layer.{n}" for n in names}, 70.0)


def test_values_after_the_last_quantizer_cannot_be_cut() -> None:
    """Logits are narrow in any precision."""
    graph = _graph({"a": 300}, _path("in", "a", "logits", "out"))
    nx.set_node_attributes(
        graph,
        {
            "logits": {
                "op": "call_function",
                "label": "logits",
                "bits": 10.0,
                "float_bits": 320.0,
                "quantized": False,
            }
        },
    )
    assert _cut(graph).values == ("layer.a",)


def test_floating_point_before_a_quantizer_can_be_cut() -> None:
    graph = _graph({"narrow": 500, "a": 9000}, _path("in", "narrow", "a", "out"))
    graph.nodes["narrow"].update(quantized=False, bits=320.0, float_bits=320.0)
    assert _cut(graph) == MinimumCut(("layer.narrow",), 320.0, 320.0)


def test_no_quantizer_or_no_path_is_no_cut() -> None:
    assert minimum_cut(_graph({"a": None}, _path("in", "a", "out"))) is None
    assert minimum_cut(nx.DiGraph()) is None
    # A branch that goes round every quantizer has no bound that quantization sets.
    edges = [*_path("in", "a", "out"), *_path("other", "b", "out")]
    graph = _graph({"a": 10, "other": None, "b": None}, edges)
    graph.nodes["other"]["op"] = "placeholder"
    assert minimum_cut(graph) is None


def test_edge_without_capacity_is_the_cut() -> None:
    graph = _graph({"a": 300, "b": 0}, _path("in", "a", "b", "out"))
    assert _cut(graph) == MinimumCut(("layer.b",), 0.0, 3200.0)


@pytest.mark.parametrize("seed", range(5))
def test_cut_separates_and_adds_up_on_random_graphs(seed: int) -> None:
    """Capacities are not whole numbers (N log2 3), so flows round."""
    rng = random.Random(seed)
    names = [f"v{i}" for i in range(20)]
    nodes: dict[str, float | None] = {
        n: rng.randint(1, 99) * math.log2(rng.randint(2, 99)) for n in names
    }
    edges = [("in", "v0"), ("v19", "out")]
    for i, name in enumerate(names[1:], start=1):
        edges += [(p, name) for p in rng.sample(names[:i], min(i, rng.randint(1, 3)))]
    graph = _graph(nodes, edges)
    cut = _cut(graph)
    chosen = [v.removeprefix("layer.") for v in cut.values]
    assert sum(graph.nodes[n]["bits"] for n in chosen) == pytest.approx(cut.bits)
    assert not nx.has_path(nx.restricted_view(graph, chosen, []), "in", "out")
    narrowest = min(float(b or 0.0) for n, b in nodes.items() if n in ("v0", "v19"))
    assert cut.bits <= narrowest + 1e-9


# --- on prepared models ---


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        x = torch.relu(x + self.conv2(x))
        return self.fc(x.flatten(1))


def _analyzed(
    model: nn.Module, x: Tensor, config: gdnsq_fx.QuantConfig
) -> gdnsq_fx.CapacityReport:
    qmodel = gdnsq_fx.prepare(model, x, config, [x])
    return gdnsq_fx.analyze(qmodel, [x], draws=1)


def _config(
    bits: int, overrides: dict[str, dict[str, int]] | None = None
) -> gdnsq_fx.QuantConfig:
    return gdnsq_fx.QuantConfig(bits, bits, first_last=None, overrides=overrides or {})


def test_graph_of_a_prepared_model() -> None:
    torch.manual_seed(0)
    graph = _analyzed(Residual(), torch.randn(6, 2, 4, 4), _config(2)).graph
    assert nx.is_directed_acyclic_graph(graph)
    labels = {d["label"]: d for _, d in graph.nodes(data=True)}
    assert labels["conv1.input"]["bits"] == 2 * 16 * 2
    assert labels["conv1.input"]["float_bits"] == 2 * 16 * 32
    assert labels["conv2.input"]["bits"] == 4 * 16 * 2
    assert labels["conv1.input"]["quantized"] and not labels["conv1"]["quantized"]
    # Weights do not flow from the inputs.
    assert not any("weight" in label for label in labels)
    for producer, _, data in graph.edges(data=True):
        assert data["capacity"] == graph.nodes[producer]["bits"]


def test_cut_of_a_prepared_model() -> None:
    """conv1.input: 32 elements of 2 bits, the narrowest of 32, 64 and 64 elements."""
    torch.manual_seed(0)
    cut = _analyzed(Residual(), torch.randn(6, 2, 4, 4), _config(2)).cut
    assert cut is not None
    assert cut == MinimumCut(("conv1.input",), 64.0, 1024.0)
    assert cut.share == 2 / 32


def test_residual_branch_does_not_make_a_cut_of_one_bit() -> None:
    """conv2.input at 1 bit carries 64 bits, but the skip carries the value whole."""
    torch.manual_seed(0)
    config = _config(4, {"conv2": {"act_bits": 1}})
    cut = _analyzed(Residual(), torch.randn(6, 2, 4, 4), config).cut
    assert cut is not None
    assert cut == MinimumCut(("conv1.input",), 128.0, 1024.0)


def test_wide_input_moves_the_cut_to_the_head() -> None:
    torch.manual_seed(0)
    config = _config(2, {"conv1": {"act_bits": 16}})
    cut = _analyzed(Residual(), torch.randn(6, 2, 4, 4), config).cut
    assert cut is not None
    assert cut == MinimumCut(("fc.input",), 128.0, 64.0 * 32)


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(2, 4)
        self.head = nn.Linear(8, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(a), self.right(b)], 1))


def test_two_inputs_are_cut_together() -> None:
    torch.manual_seed(0)
    example = (torch.randn(6, 4), torch.randn(6, 2))
    config = _config(2, {"head": {"act_bits": 8}})
    qmodel = gdnsq_fx.prepare(Concatenated(), example, config, [example])
    cut = gdnsq_fx.analyze(qmodel, [example], draws=1).cut
    assert cut is not None
    assert set(cut.values) == {"left.input", "right.input"}
    assert (cut.bits, cut.float_bits) == (12.0, 6 * 32.0)
