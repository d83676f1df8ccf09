"""The passes one by one, chained with torch's own PassManager and ShapeProp.

    python examples/own_passes.py

The graph is printed with its quantizer nodes.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.fx.passes.infra.pass_manager import PassManager
from torch.fx.passes.shape_prop import ShapeProp

import gdnsq_fx
from gdnsq_fx.passes import (
    AnnotateOperations,
    ExposeWeights,
    InsertQuantizers,
    PropagateShapes,
)


def main() -> None:
    """Insert quantizers into a traced model and print the graph."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    example = torch.randn(1, 3, 16, 16)
    config = gdnsq_fx.QuantConfig(weight_bits=4, act_bits=4, exclude=("0",))

    manager = PassManager(
        [
            AnnotateOperations(),
            ExposeWeights(),
            PropagateShapes((example,)),
            InsertQuantizers(config),
        ]
    )
    graph_module = manager(torch.fx.symbolic_trace(model)).graph_module
    with gdnsq_fx.quantization_disabled(graph_module):
        ShapeProp(graph_module).propagate(example)
    graph_module.graph.print_tabular()


if __name__ == "__main__":
    main()
