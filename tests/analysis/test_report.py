"""The report as text, HTML, dict and graph."""

from __future__ import annotations

import copy
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

import gdnsq_fx
from gdnsq_fx.analysis.bars import bar
from gdnsq_fx.analysis.coverage import Skip
from gdnsq_fx.analysis.edge_report import EdgeReport
from gdnsq_fx.analysis.notation import quantity, shortened
from gdnsq_fx.analysis.report import CapacityReport, build_report
from gdnsq_fx.analysis.shown import more_facts
from gdnsq_fx.errors import MissingExtraError, PassError

# The issue's list, and what else a reader gets.
EDGE_KEYS = {
    "name", "op", "shape", "bits", "target_bits", "capacity", "entropy", "utilisation",
    "sqnr_db", "predicted_divergence", "measured_divergence", "bottleneck",
}  # fmt: skip
MORE_KEYS = {
    "clipped", "joint_divergence", "measured_joint_divergence", "divergence_at",
    "macs", "bops", "parameters",
}  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.block = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.embed = nn.Conv2d(4, 2, 1)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.block(x))
        return self.head(self.embed(x).flatten(1))


def _filled(shape: torch.Size, phase: float) -> Tensor:
    """The same numbers on every machine and in every version of torch."""
    ramp = torch.arange(shape.numel(), dtype=torch.float64)
    return torch.sin(ramp * 1.7 + phase).float().reshape(shape)


def _model() -> Net:
    model = Net().eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(_filled(parameter.shape, float(number)) * 0.5)
    return model


BATCHES = [_filled(torch.Size([8, 1, 4, 4]), 0.3 + n) for n in range(2)]


def _report(confirm: int = 0, **options: Any) -> CapacityReport:
    config = gdnsq_fx.QuantConfig(
        **{"weight_bits": 3, "act_bits": 3, "exclude": ("embed",), **options}
    )
    qmodel = gdnsq_fx.prepare(_model(), BATCHES[0], config, BATCHES)
    return gdnsq_fx.analyze(qmodel, BATCHES, confirm=confirm)


@pytest.fixture(scope="module")
def report() -> CapacityReport:
    return _report()


@pytest.fixture(scope="module")
def confirmed() -> CapacityReport:
    return _report(confirm=2)


# --- to_dict ---


def test_dict_has_what_the_issue_lists(report: CapacityReport) -> None:
    found = report.to_dict()
    assert set(found) == {
        "edges", "minimum_cut", "relative_cut", "slack", "profile", "advice", "totals",
        "coverage",
    }  # fmt: skip
    for edge in found["edges"]:
        assert set(edge) >= EDGE_KEYS | MORE_KEYS
    assert set(found["coverage"]) == {"macs", "weights", "skipped"}


def test_dict_survives_json(confirmed: CapacityReport) -> None:
    text = json.dumps(confirmed.to_dict(), allow_nan=False)
    assert json.loads(text)["edges"] == confirmed.to_dict()["edges"]


def test_measured_divergence_is_none_until_measured(
    report: CapacityReport, confirmed: CapacityReport
) -> None:
    assert {e["measured_divergence"] for e in report.to_dict()["edges"]} == {None}
    measured = [e.measured_divergence for e in confirmed.edges]
    assert None not in measured[:2]
    assert set(measured[2:]) == {None}


@pytest.mark.parametrize("model", ["constant", "zero"])
def test_degenerate_models_have_no_nan(model: str) -> None:
    """Constant channels and dead inputs: capacity 0, SQNR bounded, shares defined."""
    net = _model()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(0.0 if model == "zero" else 0.25)
    batches = [torch.zeros(4, 1, 4, 4)]
    qmodel = gdnsq_fx.prepare(net, batches[0], calibration=batches)
    report = gdnsq_fx.analyze(qmodel, batches, confirm=9)
    json.dumps(report.to_dict(), allow_nan=False)
    assert "nan" not in str(report).lower()
    assert not any(e.bottleneck for e in report.edges if not e.predicted_divergence)
    report.to_html()


# --- edges ---


def test_edges_are_sorted_worst_first(report: CapacityReport) -> None:
    found = [e.predicted_divergence for e in report.edges]
    assert found == sorted(found, reverse=True)
    assert {e.name for e in report.edges} == {
        f"{layer}.{argument}"
        for layer in ("stem", "block", "head")
        for argument in ("input", "weight")
    }


def test_facts_of_the_edges(report: CapacityReport) -> None:
    edges = {e.name: e for e in report.edges}
    block = edges["block.input"]
    assert (block.op, block.shape, block.bits, block.target_bits) == (
        "conv2d", (1, 4, 4, 4), 3, 3,
    )  # fmt: skip
    assert block.capacity == 64 * 3
    weight = edges["block.weight"]
    assert (weight.op, weight.shape, weight.bits) == ("conv2d", (4, 2, 3, 3), 3)
    assert weight.capacity <= 72 * 3
    assert (edges["head.input"].op, edges["head.input"].shape) == ("linear", (1, 32))
    # First and last layer keep at least 8 bits.
    assert edges["stem.weight"].target_bits == 8
    for edge in report.edges:
        assert 0.0 <= edge.entropy <= edge.capacity + 1e-6
        assert edge.utilisation == pytest.approx(edge.entropy / edge.capacity)
        assert 0.0 <= edge.clipped <= 1.0


def test_bottlenecks_are_the_fewest_that_make_up_half(report: CapacityReport) -> None:
    marks = [e.bottleneck for e in report.edges]
    count = sum(marks)
    assert marks == [True] * count + [False] * (len(marks) - count)
    worst = [e.predicted_divergence for e in report.edges]
    assert sum(worst[:count]) >= sum(worst) / 2 > sum(worst[: count - 1])


def test_bits_now_and_bits_to_meet() -> None:
    qmodel = gdnsq_fx.prepare(_model(), BATCHES[0], calibration=BATCHES)
    qmodel.quantizers["block_input"].open_to(6.0)
    report = gdnsq_fx.analyze(qmodel, BATCHES)
    edge = next(e for e in report.edges if e.name == "block.input")
    assert (edge.bits, edge.target_bits) == (6, 2)
    assert "6 > 2" in str(report)


def test_report_needs_the_analysis() -> None:
    qmodel = gdnsq_fx.prepare(_model(), BATCHES[0], calibration=BATCHES)
    with pytest.raises(PassError, match="AnalyzeCapacity"):
        build_report(qmodel)


def test_report_is_of_the_moment_it_was_taken() -> None:
    qmodel = gdnsq_fx.prepare(_model(), BATCHES[0], calibration=BATCHES)
    report = gdnsq_fx.analyze(qmodel, BATCHES)
    before = copy.deepcopy(report.to_dict())
    with torch.no_grad():
        for parameter in qmodel.parameters():
            parameter.add_(0.1)
    gdnsq_fx.analyze(qmodel, BATCHES)
    assert report.to_dict() == before


# --- text ---


def _normalized(text: str) -> str:
    """Line numbers of this file are no part of the report."""
    return re.sub(r"\.py:\d+", ".py:N", text) + "\n"


def test_text_is_the_golden_one(
    confirmed: CapacityReport, golden: Callable[[str, str], None]
) -> None:
    golden("report.txt", _normalized(str(confirmed)))


def test_text_names_cut_totals_coverage_and_skips(report: CapacityReport) -> None:
    text = str(report)
    for part in ("minimum cut", "size", "coverage", "skipped", "embed", "excluded"):
        assert part in text
    assert report.cut is not None and report.cut.values[0] in text


def test_marks_stand_on_bottlenecks_only(report: CapacityReport) -> None:
    lines = str(report).splitlines()
    for edge in report.edges:
        (line,) = [text for text in lines if text.startswith(f"{edge.name} ")]
        assert ("<<" in line) is edge.bottleneck


def _widened(report: CapacityReport) -> CapacityReport:
    """Names as long as those of real models, numbers as wide as they come."""
    long = "encoder.layers.encoder_layer_11.self_attention.out_proj"
    edges = tuple(
        replace(
            edge,
            name=f"{long}{n}.weight",
            op="conv_transpose3d",
            shape=(1024, 1024, 3, 3, 3),
            bits=16,
            target_bits=12,
            capacity=123.4e9,
            entropy=123.4e9,
            utilisation=1.0,
            sqnr_db=-123.4,
            predicted_divergence=1.23e-10,
            measured_divergence=1.23e-10,
        )
        for n, edge in enumerate(report.edges)
    )
    reason = (
        "has hooks, which a function call would drop; remove them before prepare, or "
        "exclude the layer by name"
    )
    skipped = tuple(
        Skip(f"{long}{n}", reason, "a_rather_long_file_name_of_a_model.py:1234")
        for n in range(3)
    )
    assert report.cut is not None
    return replace(
        report,
        edges=edges,
        cut=replace(report.cut, values=tuple(f"{long}{n}.input" * 2 for n in range(9))),
        coverage=replace(report.coverage, skipped=skipped),
    )


def test_text_fits_100_columns(
    report: CapacityReport, confirmed: CapacityReport
) -> None:
    for one in (report, confirmed, _widened(confirmed)):
        too_wide = [line for line in str(one).splitlines() if len(line) > 100]
        assert not too_wide, "\n".join(too_wide)
        assert all(line == line.rstrip() for line in str(one).splitlines())


def test_long_reports_are_cut_short_and_say_so(report: CapacityReport) -> None:
    text = report.to_text(limit=2)
    assert "4 more edges" in text
    assert report.edges[1].name in text and report.edges[2].name not in text
    assert "more edges" not in report.to_text(limit=None)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (0, "0"),
        (12, "12"),
        (999, "999"),
        (1234, "1.23 k"),
        (999_499, "999 k"),
        (999_999, "1 M"),
        (999.9, "1 k"),
        (1.5e6, "1.5 M"),
        (2e12, "2 T"),
    ],
)
def test_quantities_have_three_digits(value: float, wanted: str) -> None:
    assert quantity(value) == wanted
    assert quantity(value, "B").endswith("B")


def test_names_are_shortened_in_the_middle() -> None:
    assert shortened("layer1.conv", 20) == "layer1.conv"
    name = shortened("encoder.layers.encoder_layer_11.mlp.linear_1.weight", 20)
    assert len(name) <= 20
    assert name.startswith("encod") and name.endswith(".weight") and ".." in name


# --- bars and colour ---


def test_bars_are_as_long_as_the_divergences(report: CapacityReport) -> None:
    lines = str(report).splitlines()[2 : 2 + len(report.edges)]
    lengths = [sum(line.count(c) for c in "█▏▎▍▌▋▊▉") for line in lines]
    assert lengths == sorted(lengths, reverse=True)
    assert 4 <= lengths[0] <= 16 and lengths[-1] == 1
    share = report.edges[1].predicted_divergence / report.edges[0].predicted_divergence
    assert lengths[1] == math.ceil(share * lengths[0])


@pytest.mark.parametrize(
    ("share", "wanted"),
    [(0.0, ""), (1e-9, "▏"), (0.5, "██"), (0.53125, "██▏"), (1.0, "████")],
)
def test_bar(share: float, wanted: str) -> None:
    assert bar(share, 4) == wanted


def test_colour_is_for_terminals_alone(
    report: CapacityReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b" not in str(report) and "\x1b" not in report.to_text()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    coloured = str(report)
    assert coloured.count("\x1b[31m") == sum(e.bottleneck for e in report.edges)
    assert re.sub(r"\x1b\[\d+m", "", coloured) == report.to_text()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in str(report)
    monkeypatch.setattr(sys, "stdout", None)  # as in a program without a console
    monkeypatch.delenv("NO_COLOR")
    assert "\x1b" not in str(report)


def test_bars_print_where_there_are_no_block_characters(
    report: CapacityReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    print(report, flush=True)
    assert b"#" * 4 in written.getvalue()


# --- JSON, pandas, matplotlib, differences ---


def test_json_file(confirmed: CapacityReport, tmp_path: Path) -> None:
    text = confirmed.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == text
    assert json.loads(text) == json.loads(json.dumps(confirmed.to_dict()))


def test_pandas_has_a_row_for_each_edge(confirmed: CapacityReport) -> None:
    frame = confirmed.to_pandas()
    assert list(frame.index) == [e.name for e in confirmed.edges]
    edge = confirmed.edges[0]
    assert frame.loc[edge.name, "capacity"] == edge.capacity
    assert frame.loc["head.input", "slack"] == confirmed.slack["head.input"]
    assert frame.loc["head.weight"].isna()["slack"]


def test_plot_has_a_bar_for_each_edge_and_the_profile(
    confirmed: CapacityReport, tmp_path: Path
) -> None:
    figure = confirmed.plot()
    bars, profile = figure.axes
    widths = [patch.get_width() for patch in bars.patches]
    assert widths == [e.predicted_divergence for e in confirmed.edges]
    (line,) = profile.lines
    assert list(line.get_ydata()) == [p.bits for p in confirmed.profile]
    assert len(confirmed.plot(limit=2).axes[0].patches) == 2
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_difference_of_two_reports(report: CapacityReport) -> None:
    edges = {e.name: e for e in report.edges}
    later = [
        replace(edges["head.input"], bits=2, capacity=64.0, predicted_divergence=1.0),
        *(e for n, e in edges.items() if n not in ("head.input", "stem.weight")),
        replace(edges["stem.weight"], name="new.weight"),
    ]
    diff = report.diff(replace(report, edges=tuple(later)))
    first = diff.changes[0]
    assert (first.name, first.bits, first.capacity[1]) == ("head.input", (8, 2), 64.0)
    assert first.change == 1.0 - edges["head.input"].predicted_divergence
    assert all(c.change == 0.0 for c in diff.changes[1:])
    assert (diff.only_before, diff.only_after) == (("stem.weight",), ("new.weight",))
    json.dumps(diff.to_dict(), allow_nan=False)
    assert diff.to_dict()["changes"][0]["bits"] == [8, 2]
    text = str(diff)
    assert "8 -> 2" in text and "only before:  stem.weight" in text
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "4 more edges" in diff.to_text(limit=1)
    wide = _widened(report)
    assert max(len(line) for line in str(wide.diff(wide)).splitlines()) <= 100


@pytest.mark.parametrize(
    ("library", "show"),
    [
        ("plotly", lambda r: r.to_html()),
        ("igraph", lambda r: r.to_html()),
        ("matplotlib", lambda r: r.plot()),
        ("pandas", lambda r: r.to_pandas()),
    ],
)
def test_missing_libraries_name_the_extra(
    library: str,
    show: Callable[[CapacityReport], object],
    report: CapacityReport,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=r"gdnsq-fx\[report\]"):
        show(report)


def test_library_imports_no_optional_one() -> None:
    code = (
        "import sys, gdnsq_fx; print([m for m in ('plotly', 'igraph', 'matplotlib', "
        "'pandas') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- HTML and graph; tests/analysis/test_html_page.py opens it ---


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_self_contained(confirmed: CapacityReport) -> None:
    page = confirmed.to_html()
    parsed = _Page()
    parsed.feed(page)
    assert not parsed.open
    assert not {"link", "img", "iframe"} & set(parsed.tags)
    assert not {"src", "href"} & {name for name, _ in parsed.attributes}
    for edge in confirmed.edges:
        assert edge.name in page
    assert page.count('class="bottleneck"') == sum(
        e.bottleneck for e in confirmed.edges
    )


def test_html_rows_have_a_cell_for_each_header(confirmed: CapacityReport) -> None:
    parsed = _Page()
    parsed.feed(confirmed.to_html())
    headers = parsed.tags.count("th")
    assert parsed.tags.count("td") == headers * len(confirmed.edges)


def test_html_escapes_names(report: CapacityReport) -> None:
    """Everywhere: in the table, in the cards, and in what the drawings are made of."""
    evil = "<script>alert(1)</script>"
    graph = report.graph.copy()
    nx.set_node_attributes(graph, dict.fromkeys(graph, evil), "label")
    assert report.cut is not None
    page = replace(
        report,
        edges=(replace(report.edges[0], name=evil),),
        cut=replace(report.cut, values=(evil,)),
        coverage=replace(report.coverage, skipped=(Skip("<b>", "<em>", "<u>"),)),
        graph=graph,
    ).to_html()
    assert "<script>alert" not in page and "<em>" not in page
    assert "&lt;script&gt;alert" in page


@dataclass(frozen=True)
class _Richer(EdgeReport):
    """An edge with facts that the page has no column of its own for."""

    macs_of_reader: int = 1234


def test_html_shows_whatever_else_was_measured(report: CapacityReport) -> None:
    edges = [
        _Richer(**{f.name: getattr(e, f.name) for f in fields(e)}) for e in report.edges
    ]
    edges[0] = replace(edges[0], joint_divergence=0.125)
    assert more_facts(edges[0]) == {
        **more_facts(report.edges[0]), "macs_of_reader": 1234, "joint_divergence": 0.125
    }  # fmt: skip
    page = replace(report, edges=tuple(edges)).to_html()
    assert "joint divergence 0.125" in page and "macs of reader 1.23e+03" in page
    parsed = _Page()
    parsed.feed(page)
    assert parsed.tags.count("td") == parsed.tags.count("th") * len(edges)


def test_html_file(report: CapacityReport, tmp_path: Path) -> None:
    page = report.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page


def test_graph_is_a_networkx_graph(report: CapacityReport) -> None:
    assert isinstance(report.graph, nx.DiGraph)
    labels = [d["label"] for _, d in report.graph.nodes(data=True)]
    assert "block.input" in labels
    json.dumps(nx.node_link_data(report.graph, edges="edges"), allow_nan=False)


def test_joint_divergence_is_shown_where_names_leave_room(
    report: CapacityReport,
) -> None:
    lines = str(report).splitlines()
    assert lines[0].split()[-2:] == ["alone", "joint"]
    for edge, line in zip(report.edges, lines[2:], strict=False):
        assert edge.name in line and f"{edge.joint_divergence:.1e}" in line
    assert any(line.startswith("joint: ") for line in lines)
    edges = tuple(replace(edge, joint_divergence=None) for edge in report.edges)
    assert "joint" not in str(replace(report, edges=edges))
    assert "joint" not in str(_widened(report))
