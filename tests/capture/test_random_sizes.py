"""Random arithmetic on sizes: right at other sizes too, or what was fixed is noted.

More of them: ``GDNSQ_FX_EXAMPLES=1000 pytest tests/capture/test_random_sizes.py``.
"""

from __future__ import annotations

import math
import os

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gdnsq_fx.capture.capture import capture

EXAMPLES = int(os.environ.get("GDNSQ_FX_EXAMPLES", "60"))
_SHAPES = ((2, 6, 4), (5, 6, 4), (2, 9, 4), (3, 5, 4), (7, 13, 4), (4, 12, 4))
_SIZES = ("x.shape[0]", "x.shape[1]", "x.size(2)", "len(x)")
_NUMBERS = ("2", "3", "0.5", "1.5")
_FORMS = (
    "({} + {})",
    "({} - {})",
    "({} * {})",
    "({} / (1 + abs({})))",
    "({} // 3)",
    "({} % 5)",
    "int({})",
    "float({})",
    "round({})",
    "math.ceil({})",
    "math.sqrt(abs({}))",
    "(1.0 / (1 + abs({})))",
)


def _grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.sampled_from(_FORMS).flatmap(
        lambda form: st.builds(form.format, *[inner] * form.count("{}"))
    )


_expressions = st.recursive(st.sampled_from(_SIZES + _NUMBERS), _grown, max_leaves=5)


class _Scaled(nn.Module):
    """Multiplies by the value of an expression."""

    def __init__(self, expression: str) -> None:
        super().__init__()
        self.factor = eval(f"lambda x: {expression}", {"math": math})

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor(x)


def _right(captured: nn.Module, model: nn.Module, shape: tuple[int, ...]) -> bool:
    x = torch.rand(shape)
    return torch.allclose(captured(x), model(x), equal_nan=True)


# The same expressions every time, unless more are asked for: which formula a few
# sizes speak for is a guess, if one that is checked.
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="GDNSQ_FX_EXAMPLES" not in os.environ,
)
@given(expression=_expressions)
@example(expression="(0.5 * x.shape[0])")
@example(expression="((1.5 * x.shape[1]) // 3)")
@example(expression="round((4.5 - (4 + x.shape[1])))")
def test_random_arithmetic_on_sizes(expression: str) -> None:
    model = _Scaled(expression)
    captured = capture(model, (torch.rand(_SHAPES[0]),), {})
    assert _right(captured, model, _SHAPES[0])
    if not captured.facts.specialized:
        assert all(_right(captured, model, shape) for shape in _SHAPES)
