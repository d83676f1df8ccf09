"""What of a network is drawn, and where."""

from __future__ import annotations

import itertools
import random

import networkx as nx
import pytest
import torch
import torchvision

import gdnsq_fx
from gdnsq_fx.analysis.hover import label_of
from gdnsq_fx.analysis.layout import MAX_COLUMNS, layered_layout
from gdnsq_fx.analysis.sketch import END, JOIN, OPERATION, VALUE, sketch_of


@pytest.fixture(scope="module")
def resnet() -> nx.DiGraph[str]:
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18().eval(), torch.randn(2, 3, 32, 32)
    qmodel = gdnsq_fx.prepare(model, x, gdnsq_fx.QuantConfig(4, 4), [x])
    return gdnsq_fx.analyze(qmodel, [x], draws=1).graph


def _random(seed: int) -> nx.DiGraph[str]:
    rng = random.Random(seed)
    graph: nx.DiGraph[str] = nx.DiGraph()
    names = [f"v{n}" for n in range(80)]
    for n, name in enumerate(names):
        graph.add_node(name)
        reads = rng.sample(names[max(n - 9, 0) : n], min(n, rng.randint(1, 3)))
        graph.add_edges_from((read, name) for read in reads)
    return graph


def test_sketch_of_a_resnet(resnet: nx.DiGraph[str]) -> None:
    sketch = sketch_of(resnet)
    kinds = [d["kind"] for _, d in sketch.nodes(data=True)]
    # 20 convolutions and the head; two convolutions of a block share one input at
    # the three places where the shortcut has a convolution of its own; 8 sums.
    assert {k: kinds.count(k) for k in set(kinds)} == {
        OPERATION: 21, VALUE: 18, JOIN: 8, END: 2,
    }  # fmt: skip
    conv = sketch.nodes["conv1"]
    assert conv["folded"] == ["conv1", "bn1", "relu", "maxpool"]
    assert conv["weights"] == ["conv1.weight"]
    assert nx.is_directed_acyclic_graph(sketch)
    # Nothing is lost, and what leads to what stays.
    folded = [label for _, d in sketch.nodes(data=True) for label in d["folded"]]
    assert sorted(folded) == sorted(d["label"] for _, d in resnet.nodes(data=True))
    closed = nx.transitive_closure(resnet)
    for tail, head in sketch.edges:
        assert closed.has_edge(tail, head)


@pytest.mark.parametrize("seed", range(5))
def test_nodes_stand_apart_and_lines_join_them(seed: int) -> None:
    graph = _random(seed)
    layout = layered_layout(graph)
    assert layout.columns <= MAX_COLUMNS
    for (x, y), (other_x, other_y) in itertools.combinations(layout.points.values(), 2):
        assert x != other_x or abs(y - other_y) >= 0.99
    assert all(0 <= y < layout.height for _, y in layout.points.values())
    for (tail, head), pieces in layout.lines.items():
        assert pieces[0][0] == layout.points[tail]
        assert pieces[-1][-1] == layout.points[head]
        for piece in pieces:  # from left to right, a layer at a time
            steps = [b[0] - a[0] for a, b in itertools.pairwise(piece)]
            assert set(steps) <= {0.5, 1.0}
        for before, after in itertools.pairwise(pieces):  # on in the next row
            assert (before[-1][0], after[0][0]) == (layout.columns - 0.5, -0.5)
            assert before[-1][1] < after[0][1]


def test_one_value_is_one_line_until_its_readers_part() -> None:
    graph = nx.DiGraph([("a", "b"), ("b", "c"), ("c", "d"), ("a", "d"), ("a", "c")])
    lines = layered_layout(graph).lines
    assert lines["a", "c"][0][:2] == lines["a", "d"][0][:2]


@pytest.mark.parametrize("size", [0, 1, 3])
def test_tiny_graphs(size: int) -> None:
    names = [f"v{n}" for n in range(size)]
    graph = nx.DiGraph(list(itertools.pairwise(names)))
    graph.add_nodes_from(names)
    layout = layered_layout(graph)
    assert [layout.points[n] for n in names] == [(float(n), 0.0) for n in range(size)]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("conv1", "conv1"),
        ("layer1.0.conv1", "layer1.0<br>conv1"),
        ("layer1.0.downsample.0", "layer1.0<br>downsample.0"),
        ("a<b.c", "a&lt;b<br>c"),
    ],
)
def test_labels(name: str, wanted: str) -> None:
    assert label_of({"label": name}) == wanted
