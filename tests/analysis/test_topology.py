"""Minimum cut, relative cut, slack and profile against brute force."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterable, Iterator

import networkx as nx
import pytest
import torch
import torchvision

import gdnsq_fx
from gdnsq_fx.analysis.cuts import MinimumCut, minimum_cut
from gdnsq_fx.analysis.profile import capacity_profile
from gdnsq_fx.analysis.relative_cut import relative_cut
from gdnsq_fx.analysis.slack import slack_of

SEEDS = range(200)
SIZES = (1, 2, 5, 20, 60)


def _random_graph(seed: int, size: int | None = None) -> nx.DiGraph[str]:
    """Floating-point values that join others, and quantized copies of single ones.

    As in captured networks, values stand in topological order, only quantizers narrow
    what they read, and now and then a value is read by nothing.
    """
    rng = random.Random(seed)
    graph: nx.DiGraph[str] = nx.DiGraph()

    def add(name: str, op: str, elements: int, levels: int | None) -> None:
        width = 32.0 if levels is None else math.log2(levels)
        graph.add_node(
            name,
            op=op,
            label=f"layer.{name}",
            operation="",
            weights=[],
            bits=elements * width,
            float_bits=elements * 32.0,
            quantized=levels is not None,
        )

    inputs = [f"in{n}" for n in range(rng.choice([1, 1, 2]))]
    for name in inputs:
        add(name, "placeholder", rng.choice(SIZES), None)
    count = size or rng.randint(3, 9)
    for n in range(count):
        name, before = f"v{n}", list(graph)
        copies = n == count - 1 or rng.random() < 0.5
        reads = rng.sample(
            before, 1 if copies else min(len(before), rng.choice([1, 1, 1, 2, 3]))
        )
        if len(reads) == 1 and rng.random() < 0.8:
            reads = before[-1:]
        elements = graph.nodes[reads[0]]["float_bits"] / 32.0
        add(
            name,
            "call_function",
            int(elements) if copies else rng.choice(SIZES),
            rng.choice([2, 3, 4, 16, 100]) if copies else None,
        )
        graph.add_edges_from((read, name) for read in reads)
    ends = [f"v{count - 1}"]
    if seed % 2:  # a second way, chain of a few values, often apart from the first
        ends.append(rng.choice(inputs))
        for n in range(rng.randint(1, 3)):
            levels = rng.choice([None, 2, 3, 16])
            floats = graph.nodes[ends[-1]]["float_bits"]
            add(f"w{n}", "call_function", int(floats / 32.0), levels)
            graph.add_edge(ends.pop(), f"w{n}")
            ends.append(f"w{n}")
    add("out", "output", 0, None)
    graph.add_edges_from((end, "out") for end in ends)
    return graph


def _bits(graph: nx.DiGraph[str], names: Iterable[str], key: str = "bits") -> float:
    return sum(graph.nodes[n][key] for n in names)


def _cuttable(graph: nx.DiGraph[str]) -> list[str]:
    """Quantized values and what leads to one."""
    quantized = [n for n, d in graph.nodes(data=True) if d["quantized"]]
    return [
        n
        for n in graph
        if n in quantized or any(q in nx.descendants(graph, n) for q in quantized)
    ]


def _reached(graph: nx.DiGraph[str], cut: set[str]) -> set[str]:
    """Values reached from the inputs through values outside the cut, cut included."""
    todo = [n for n, d in graph.nodes(data=True) if d["op"] == "placeholder"]
    found: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += [] if name in cut else list(graph[name])
    return found


def _cuts(graph: nx.DiGraph[str]) -> Iterator[set[str]]:
    """Every set of values that separates the inputs from the output."""
    names = _cuttable(graph)
    for size in range(len(names) + 1):
        for chosen in itertools.combinations(names, size):
            if "out" not in _reached(graph, set(chosen)):
                yield set(chosen)


def _is_clean(graph: nx.DiGraph[str], cut: set[str]) -> bool:
    """Near needs nothing from far, and every value is read on one side only."""
    useful = nx.ancestors(graph, "out") | {"out"}
    if not cut <= useful:
        return False
    near = _reached(graph.subgraph(useful), cut)
    passed = near - cut
    return cut <= near and all(
        # a reader is near exactly where what it reads has passed
        (reader in near) == (name in passed)
        for name, reader in graph.subgraph(useful).edges
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_minimum_cut_equals_brute_force(seed: int) -> None:
    graph = _random_graph(seed)
    wanted = min((_bits(graph, c) for c in _cuts(graph)), default=None)
    found = minimum_cut(graph)
    assert (found is None) == (wanted is None)
    if found is not None and wanted is not None:
        assert found.bits == pytest.approx(wanted)
        names = {v.removeprefix("layer.") for v in found.values}
        assert "out" not in _reached(graph, names)
        assert found.float_bits == _bits(graph, names, "float_bits")


@pytest.mark.parametrize("seed", SEEDS)
def test_relative_cut_equals_brute_force(seed: int) -> None:
    graph = _random_graph(seed)
    clean = [c for c in _cuts(graph) if _is_clean(graph, c)]
    ranked = [(_bits(graph, c) / _bits(graph, c, "float_bits"), c) for c in clean]
    found = relative_cut(graph)
    assert (found is None) == (not ranked)
    if found is None:
        return
    least = min(share for share, _ in ranked)
    assert found.share == pytest.approx(least, rel=2e-6)
    # Of the cuts that are level, the one with the fewest bits.
    level = [_bits(graph, c) for share, c in ranked if share <= least * (1 + 1e-9)]
    assert found.bits <= min(level) * (1 + 1e-9)
    names = {v.removeprefix("layer.") for v in found.values}
    assert names in clean


@pytest.mark.parametrize("seed", SEEDS)
def test_slack_equals_brute_force(seed: int) -> None:
    """What a value can lose until the bits of the narrowest cut fall."""
    graph = _random_graph(seed)
    cuts = list(_cuts(graph))
    found = slack_of(graph)
    if not cuts:
        assert not found
        return
    least = min(_bits(graph, c) for c in cuts)
    for name, data in graph.nodes(data=True):
        if not data["quantized"]:
            assert data["label"] not in found
            continue
        with_it = min(_bits(graph, c | {name}) for c in cuts)
        wanted = min(data["bits"], with_it - least)
        assert found[data["label"]] == pytest.approx(wanted, abs=1e-6)


def test_random_graphs_cover_the_cases() -> None:
    """Slack by another way, relative cuts that differ, graphs without a clean cut."""
    several = sum(
        len(cut.values) > 1
        for cut in (relative_cut(_random_graph(s)) for s in SEEDS)
        if cut is not None
    )
    differ = sum(
        relative_cut(_random_graph(s)) != minimum_cut(_random_graph(s)) for s in SEEDS
    )
    slacks = [s for n in SEEDS for s in slack_of(_random_graph(n)).values()]
    assert several >= 10
    assert differ >= 30
    assert sum(s == 0 for s in slacks) >= 50 and sum(s > 0 for s in slacks) >= 50


def test_reducing_a_value_by_its_slack_keeps_the_minimum_cut() -> None:
    for seed in range(6):
        graph = _random_graph(seed, size=40)
        least, slacks = minimum_cut(graph), slack_of(graph)
        if least is None:
            continue
        for name, data in list(graph.nodes(data=True)):
            slack = slacks.get(data["label"])
            if slack is None:
                continue
            narrower = graph.copy()
            narrower.nodes[name]["bits"] -= slack
            kept = minimum_cut(narrower)
            assert kept is not None and kept.bits == pytest.approx(least.bits)


def test_profile_counts_an_original_and_its_copy_once() -> None:
    """in -> q(in) -> conv -> add <- in: the skip carries all that the copy does."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    for name, op, bits, quantized in (
        ("in", "placeholder", 320.0, False),
        ("q", "call_module", 40.0, True),
        ("conv", "call_function", 320.0, False),
        ("add", "call_function", 320.0, False),
        ("q2", "call_module", 20.0, True),
        ("fc", "call_function", 64.0, False),
        ("out", "output", 0.0, False),
    ):
        floats = 320.0 if name not in ("fc", "out") else bits
        graph.add_node(
            name, op=op, label=name, bits=bits, float_bits=floats, quantized=quantized
        )
    nx.add_path(graph, ["in", "q", "conv", "add", "q2", "fc", "out"])
    graph.add_edge("in", "add")
    found = {p.label: p for p in capacity_profile(graph)}
    assert list(found) == ["in", "q", "conv", "add", "q2", "fc"]
    assert (found["q"].bits, found["q"].float_bits, found["q"].values) == (320, 320, 2)
    assert (found["conv"].bits, found["conv"].values) == (640, 2)
    assert (found["q2"].bits, found["q2"].share) == (20, 20 / 320)
    assert all(p.share == 1.0 for p in found.values() if p.label != "q2")


@pytest.mark.parametrize("seed", range(50))
def test_profile_equals_brute_force(seed: int) -> None:
    graph = _random_graph(seed)
    names = list(graph)
    positions = iter(capacity_profile(graph))
    for place, name in enumerate(names):
        alive = [
            n for n in names[: place + 1] if set(graph[n]) & set(names[place + 1 :])
        ]
        if name == "out" or not alive:
            continue
        position = next(positions)
        assert (position.label, position.values) == (f"layer.{name}", len(alive))
        origins: dict[str, list[str]] = {}
        for n in alive:
            copied = graph.nodes[n]["quantized"]
            origins.setdefault(next(graph.predecessors(n)) if copied else n, []).append(
                n
            )
        wanted = sum(
            max(graph.nodes[n]["bits"] for n in group) for group in origins.values()
        )
        assert position.bits == pytest.approx(wanted)
    assert next(positions, None) is None


def test_relative_cut_of_a_resnet_lies_between_its_stages() -> None:
    """Inside a stage the skip is in floating point; the logits' input has 8 bits."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    config = gdnsq_fx.QuantConfig(4, 4)
    model = torchvision.models.resnet18().eval()
    qmodel = gdnsq_fx.prepare(model, x, config, [x])
    report = gdnsq_fx.analyze(qmodel, [x], draws=1)
    assert report.relative_cut is not None and report.cut is not None
    assert report.relative_cut.share == 4 / 32
    # layer4.0 and its shortcut read one value of 256 x 4 x 4 elements.
    assert report.relative_cut == MinimumCut(
        ("layer4.0.conv1.input",), 256 * 16 * 4.0, 256 * 16 * 32.0
    )
    assert report.cut.values == ("fc.input",)
    assert report.slack["fc.input"] == 0.0
    shares = [p.share for p in report.profile]
    assert min(shares) == 4 / 32 and max(shares) == 1.0


def test_hundreds_of_edges_take_seconds() -> None:
    graph = _random_graph(3, size=1500)
    assert sum(d["quantized"] for _, d in graph.nodes(data=True)) > 500
    started = time.monotonic()
    assert minimum_cut(graph) is not None
    relative_cut(graph)
    assert len(slack_of(graph)) > 500
    capacity_profile(graph)
    assert time.monotonic() - started < 60.0
