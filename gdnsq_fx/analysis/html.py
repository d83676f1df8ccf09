"""The capacity report as one self-contained HTML page without scripts."""

from __future__ import annotations

from html import escape

from gdnsq_fx.analysis.edge_report import EdgeReport, Findings
from gdnsq_fx.analysis.text import cells_of, quantity

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem;
       padding: 0 1rem; color: #1c1e21; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e2e4e8; text-align: right; }
th:nth-child(-n+3), td:nth-child(-n+3) { text-align: left; }
tr.bottleneck td { background: #fff1e6; }
.bar { background: #d9480f; height: .7rem; display: inline-block; }
td:last-child { text-align: left; width: 12rem; }
code { background: #f1f3f5; padding: 0 .25rem; }
"""

_COLUMNS = (
    "edge", "op", "shape", "bits", "capacity, bit", "entropy, bit", "used", "SQNR, dB",
    "predicted divergence, nat", "measured", "joint", "MACs", "BOPs", "",
)  # fmt: skip


def html_page(report: Findings) -> str:
    """The page as a string."""
    worst = max((e.predicted_divergence for e in report.edges), default=0.0)
    head = "".join(f"<th>{escape(column)}</th>" for column in _COLUMNS)
    rows = "\n".join(_row(edge, worst) for edge in report.edges)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Capacity report</title>
<style>{_STYLE}</style></head><body>
<h1>Capacity report</h1>
{_summary(report)}
<table><thead><tr>{head}</tr></thead><tbody>
{rows}
</tbody></table>
{_skipped(report)}
</body></html>
"""


def _row(edge: EdgeReport, worst: float) -> str:
    cells = cells_of(edge, measured=True, joint=True)[:-1]  # a bar stands for the mark
    cells += [quantity(edge.macs), quantity(edge.bops)]
    share = edge.predicted_divergence / worst if worst else 0.0
    bar = f'<span class="bar" style="width:{100 * share:.1f}%"></span>'
    mark = ' class="bottleneck"' if edge.bottleneck else ""
    data = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f"<tr{mark}>{data}<td>{bar}</td></tr>"


def _summary(report: Findings) -> str:
    totals, coverage, cut = report.totals, report.coverage, report.cut
    facts = [
        f"Size {quantity(totals.size_bytes, 'B')} against "
        f"{quantity(totals.float_size_bytes, 'B')} in floating point; "
        f"{quantity(totals.bops, 'BOP')} per sample against "
        f"{quantity(totals.float_bops, 'BOP')}.",
        f"{100 * coverage.macs:.1f}% of MACs and {100 * coverage.weights:.1f}% of "
        "weights are quantized.",
    ]
    if cut is not None:
        facts.append(
            f"Minimum cut: {quantity(cut.bits, 'bit')} per sample, "
            f"{100 * cut.share:.1f}% of floating point, at {', '.join(cut.values)}."
        )
    return "".join(f"<p>{escape(fact)}</p>" for fact in facts)


def _skipped(report: Findings) -> str:
    if not report.coverage.skipped:
        return ""
    items = "".join(
        f"<li><code>{escape(s.name)}</code> {escape(s.reason)} {escape(s.source)}</li>"
        for s in report.coverage.skipped
    )
    return f"<h2>Left in floating point</h2><ul>{items}</ul>"
