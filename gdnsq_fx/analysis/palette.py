"""Colours and type that all drawings share: dark on light."""

from __future__ import annotations

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
BACKGROUND = "#ffffff"
INK = "#212529"
FAINT = "#dee2e6"
LINE = "#ced4da"
QUANTIZED_LINE = "#5c7cfa"
CUT = ("minimum cut", "#1864ab")
RELATIVE_CUT = ("cut of least share", "#099268")
# From next to nothing to all of it; read on white, told apart without hue.
HEAT = (
    (0.0, "#fff9db"),
    (0.25, "#ffe8a3"),
    (0.5, "#ffc078"),
    (0.75, "#f76707"),
    (1.0, "#a61e1e"),
)
SERIES = (
    "#1864ab", "#e8590c", "#2b8a3e", "#9c36b5", "#c92a2a", "#0b7285", "#e67700",
    "#5f3dc4",
)  # fmt: skip
