"""int8 kernels of inductor: used, right, and without traces."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.fx import GraphModule

import gdnsq_fx
from gdnsq_fx.deploy import inductor
from gdnsq_fx.errors import CompilerError, GdnsqError, MissingExtraError, PassError

_X = torch.randn(8, 8, 6, 6, generator=torch.Generator().manual_seed(1))


class _Net(nn.Module):
    """A residual that starts at the input, which a compiled graph may write into."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.conv(x) + x).relu()
        return self.fc(x.mean((2, 3)))


def _converted() -> GraphModule:
    torch.manual_seed(0)
    config = gdnsq_fx.QuantConfig(weight_bits=4, act_bits=4, first_last=None)
    return gdnsq_fx.convert(gdnsq_fx.prepare(_Net().eval(), _X, config, [_X]))


def _require() -> None:
    try:
        inductor.require_inductor()
    except GdnsqError as error:
        pytest.skip(str(error))


def test_int8_kernels_are_used_and_right() -> None:
    _require()
    imodel, given = _converted(), _X.clone()
    assert torch._inductor.config.freezing is False
    compiled = gdnsq_fx.compile(imodel, given)
    got = compiled(given)
    assert torch.equal(given, _X) and not got.requires_grad
    assert torch._inductor.config.freezing is False
    if torch.backends.mkldnn.is_available():
        assert sum(compiled.kernels.values()) == 2
    found = gdnsq_fx.verify(imodel, None, [_X], runtimes=["inductor"], progress=False)
    assert found.ok, str(found)
    (one,) = found.runtimes
    assert [edge.name for edge in one.edges] == ["conv.input", "fc.input"]
    spread = float(got.max() - got.min())
    assert one.max_difference <= 0.05 * spread


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    imodel = _converted()
    monkeypatch.setitem(sys.modules, "torchao", None)
    for name in [n for n in sys.modules if n.startswith("torchao.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtraError, match=r"gdnsq-fx\[inductor\]"):
        gdnsq_fx.compile(imodel, _X)


def test_without_a_compiler_the_cause_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    from torch._inductor import cpp_builder

    def none(*_: Any, **__: Any) -> str:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(CompilerError, match=r"no C\+\+ compiler.*install g\+\+"):
        gdnsq_fx.compile(_converted(), _X)


def test_refuses_what_is_not_converted() -> None:
    qmodel = gdnsq_fx.prepare(_Net().eval(), _X, calibration=[_X])
    with pytest.raises(PassError):
        gdnsq_fx.compile(qmodel, _X)
