"""The HTML report in a real browser: no network, a click sorts, hovering tells."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gdnsq_fx

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_DRIVERS = ("chromedriver", "chromium.chromedriver")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1360,1500",
)  # fmt: skip
_HISTORY = 24  # steps


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.block = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.block(x))
        return self.head(x.flatten(1))


@pytest.fixture(scope="module")
def report() -> tuple[gdnsq_fx.CapacityReport, gdnsq_fx.CapacityTracker]:
    torch.manual_seed(0)
    batches = [torch.randn(8, 1, 4, 4) for _ in range(2)]
    qmodel = gdnsq_fx.prepare(_Net(), batches[0], calibration=batches)
    found = gdnsq_fx.analyze(qmodel, batches, confirm=2)
    tracker = gdnsq_fx.CapacityTracker()
    gdnsq_fx.finetune(
        qmodel, batches, steps=_HISTORY, progress=False, tracker=tracker,
        validate=lambda _: 1.0, validate_every=8,
    )  # fmt: skip
    return found, tracker


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium with a profile of its own."""
    webdriver = pytest.importorskip("selenium.webdriver")
    binary = next(filter(None, map(shutil.which, _BROWSERS)), None)
    driver = next(filter(None, map(shutil.which, _DRIVERS)), None)
    if binary is None or driver is None:
        pytest.skip("no chromium and chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        log = webdriver.ChromeService(driver, log_output=os.devnull)
        started = webdriver.Chrome(options=options, service=log)
        try:
            yield started
        finally:
            started.quit()


@pytest.fixture(scope="module")
def page(
    browser: Any,
    report: tuple[gdnsq_fx.CapacityReport, gdnsq_fx.CapacityTracker],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """The browser with the page open."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    found, tracker = report
    found.to_html(path, history=tracker)
    browser.get("about:blank")
    browser.get_log("performance")  # what the browser's own first page asked for
    browser.get(path.as_uri())
    return browser


def _requests(browser: Any) -> list[str]:
    """What the page asked for since it was last asked."""
    messages = [
        json.loads(line["message"])["message"]
        for line in browser.get_log("performance")
    ]
    sent = [m for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [m["params"]["request"]["url"] for m in sent]


def _column(page: Any, number: int) -> list[str]:
    script = (
        "return Array.from(document.querySelectorAll('#edges tbody tr'),"
        " row => row.cells[arguments[0]].textContent)"
    )
    return page.execute_script(script, number)


def _headers(page: Any) -> list[str]:
    script = "return [...document.querySelectorAll('#edges th')].map(h=>h.textContent)"
    return page.execute_script(script)


def _click(page: Any, header: str) -> str:
    """Click a header of the table; returns the order that it now names."""
    place = _headers(page).index(header)
    cell = page.find_elements("css selector", "#edges th")[place]
    button = cell.find_element("css selector", "button")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    return cell.get_attribute("aria-sort")


def test_no_request_leaves_the_page(page: Any) -> None:
    script = """
        var done = arguments[0];
        var figure = document.getElementById("figure-0");
        Plotly.relayout(figure, {"xaxis.range": [0, 3]}).then(() =>
            setTimeout(() => done(performance.getEntriesByType("resource")
                .map(e => e.name)), 500));
    """
    assert page.execute_async_script(script) == []
    asked = [url for url in _requests(page) if not url.startswith(("data:", "blob:"))]
    assert asked and all(url.startswith("file://") for url in asked)
    assert len(set(asked)) == 1
    severe = [line for line in page.get_log("browser") if line["level"] == "SEVERE"]
    assert severe == []


def test_a_click_on_a_header_sorts(page: Any, report: Any) -> None:
    edges = report[0].edges
    assert _column(page, 0) == [e.name for e in edges]
    assert _click(page, "edge") == "ascending"
    assert _column(page, 0) == sorted(e.name for e in edges)
    assert _click(page, "edge") == "descending"
    assert _column(page, 0) == sorted((e.name for e in edges), reverse=True)
    assert _click(page, "capacity, bit") == "descending"
    wanted = sorted(edges, key=lambda e: e.capacity, reverse=True)
    capacities = {e.name: e.capacity for e in edges}
    assert [capacities[n] for n in _column(page, 0)] == [e.capacity for e in wanted]
    assert _click(page, "capacity, bit") == "ascending"
    assert capacities[_column(page, 0)[0]] == wanted[-1].capacity
    sorted_by = page.find_elements("css selector", "#edges th[aria-sort]")
    assert [head.text for head in sorted_by] == ["capacity, bit"]


def test_empty_cells_come_last_either_way(page: Any) -> None:
    for _ in range(2):
        _click(page, "measured, nat")
        cells = _column(page, _headers(page).index("measured, nat"))
        assert [bool(cell) for cell in cells] == [True] * 2 + [False] * (len(cells) - 2)


def test_hovering_shows_the_facts_of_an_edge(page: Any, report: Any) -> None:
    """The pointer rests on the drawn circle of ``block.input``."""
    script = """
        var figure = document.getElementById("figure-0");
        figure.scrollIntoView({block: "center"});
        var trace = figure._fullData.findIndex(t => t.name === "value");
        var point = figure.data[trace].hovertext.findIndex(
            t => t.startsWith("<b>block.input</b>"));
        Plotly.Fx.hover(figure, [{curveNumber: trace, pointNumber: point}]);
        return [figure.data[trace].hovertext[point],
                figure.querySelector(".hoverlayer").textContent];
    """
    text, drawn = page.execute_script(script)
    edge = next(e for e in report[0].edges if e.name == "block.input")
    assert f"predicted divergence {edge.predicted_divergence:.2e} nat" in text
    assert f"SQNR {edge.sqnr_db:.1f} dB" in text and "slack" in text
    assert f"{edge.predicted_divergence:.2e}" in drawn


def test_the_cut_is_drawn_round_its_values(page: Any, report: Any) -> None:
    script = """
        var data = document.getElementById("figure-0").data;
        var at = t => t.x.map((x, n) => [x, t.y[n]]);
        var ring = data.find(t => t.name === "minimum cut");
        var values = data.find(t => t.name === "value");
        return [at(ring).filter((p, n) => ring.marker.size[n] > 0),
                at(values), values.hovertext];
    """
    rings, points, texts = page.execute_script(script)
    ringed = [
        text.partition("</b>")[0].removeprefix("<b>")
        for point, text in zip(points, texts, strict=True)
        if point in rings
    ]
    assert sorted(ringed) == sorted(report[0].cut.values)


def test_profile_and_dynamics_are_drawn(page: Any, report: Any) -> None:
    found, tracker = report
    script = "return document.getElementById(arguments[0]).data[arguments[1]]"
    profile = page.execute_script(script, "figure-1", 1)
    assert profile["name"] == "quantized" and len(profile["x"]) == len(found.profile)
    loss = page.execute_script(script, "figure-2", 0)
    assert loss["name"] == "loss" and len(loss["x"]) == len(tracker.records)
    heat = page.execute_script(script, "figure-2", 2)
    assert heat["type"] == "heatmap" and heat["y"] == list(tracker.first_met)


def test_page_is_as_wide_as_the_window(page: Any, tmp_path: Path) -> None:
    width = "return [document.documentElement.scrollWidth, window.innerWidth]"
    needed, window = page.execute_script(width)
    assert needed <= window
    page.save_screenshot(str(tmp_path / "page.png"))
    assert (tmp_path / "page.png").stat().st_size > 20_000
