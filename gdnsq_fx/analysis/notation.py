"""How figures and names are written, in text and on the page."""

from __future__ import annotations

from gdnsq_fx.analysis.edge_report import EdgeReport


def quantity(value: float, unit: str = "") -> str:
    """Three significant digits with a decimal prefix: ``12.3 k``."""
    value = float(f"{value:.3g}")  # first round: 999,999 is 1 M
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def shortened(name: str, width: int) -> str:
    """A name cut in its middle: both ends tell edges of one network apart."""
    if len(name) <= width:
        return name
    tail = (width - 2) // 2
    return f"{name[: width - 2 - tail]}..{name[-tail:]}"


def bits_of(edge: EdgeReport) -> str:
    """``2``, or ``8 > 2`` where the target is not met yet."""
    met = edge.bits <= edge.target_bits
    return str(edge.bits) if met else f"{edge.bits} > {edge.target_bits}"


def divergence(value: float | None, decimals: int = 2) -> str:
    """The number with so many decimals, or nothing where there is none."""
    return "" if value is None else f"{value:.{decimals}e}"
