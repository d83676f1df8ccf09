"""An operation of one's own: one row of the op table, and every pass knows it.

    python examples/own_operation.py

`operation` keeps the function one call in the graph. The row says which argument is
what, where the weight has its output channels, and how many multiply-accumulates the
call takes. A layer written as one module with a fused forward instead of a function
says in ``open`` which call it stands for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import gdnsq_fx


@gdnsq_fx.operation
def correlate(signal: Tensor, template: Tensor) -> Tensor:
    """Score ``signal`` [batch, time] against each template [count, time]."""
    return torch.tanh(signal @ template.t())


CORRELATE = gdnsq_fx.OpInfo(
    "correlate",
    parameters=("signal", "template"),
    roles={"signal": "activation", "template": "weight"},
    functions=(correlate,),
    macs=lambda shapes, output: math.prod(output) * shapes["signal"][-1],
    layout=gdnsq_fx.ChannelLayout(axis=0),
    linear=False,  # the tanh inside
)
TABLE = gdnsq_fx.DEFAULT_TABLE.with_rows(CORRELATE)


class Detector(nn.Module):
    """Sixteen templates, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.template = nn.Parameter(torch.randn(16, 32) / 8)
        self.head = nn.Linear(16, 4)

    def forward(self, signal: Tensor) -> Tensor:
        return self.head(correlate(signal, self.template))


def main() -> None:
    """Quantize the detector, show the report, and convert."""
    torch.manual_seed(0)
    model, signals = Detector(), torch.randn(64, 32)
    config = gdnsq_fx.QuantConfig(weight_bits=4, act_bits=4, strict=True)
    qmodel = gdnsq_fx.prepare(model, signals, config, [signals], table=TABLE)
    print(gdnsq_fx.analyze(qmodel, [signals]))
    imodel = gdnsq_fx.convert(qmodel)
    gdnsq_fx.save(imodel, "detector.safetensors")
    again = gdnsq_fx.load("detector.safetensors", Detector(), signals, table=TABLE)
    print(
        "loaded model computes the same:", torch.equal(again(signals), imodel(signals))
    )


if __name__ == "__main__":
    main()
