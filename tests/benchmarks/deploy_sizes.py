"""How large files of ResNet-18 are, and how small they could be."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.fx import GraphModule
from torchvision.models import resnet18

import gdnsq_fx
from gdnsq_fx.deploy.packing import packed_size
from gdnsq_fx.sites import bit_width, weight_sites

# Bits of weights -> times smaller than the float32 state dict that a file is to be.
SIZE_TARGETS = {4: 7.6, 3: 9.8, 2: 13.8, 1: 23.0}


def size_row(bits: int, folder: Path) -> tuple[str, ...]:
    """ResNet-18 with weights of some bits, first and last layer at 8."""
    model, images = resnet18().eval(), torch.randn(2, 3, 64, 64)
    config = gdnsq_fx.QuantConfig(weight_bits=bits, act_bits=8)
    qmodel = gdnsq_fx.prepare(model, images, config, [images])
    written = gdnsq_fx.export(gdnsq_fx.convert(qmodel), folder / "w.onnx", images)
    ideal = _ideal_bytes(qmodel)
    state = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return (
        f"W{bits}",
        f"{written / 1e6:.2f}",
        f"{state / written:.2f}x",
        f">= {SIZE_TARGETS[bits]}x",
        f"{state / ideal:.2f}x",
        f"{100 * (written / ideal - 1):.1f} %",
    )


def _ideal_bytes(qmodel: GraphModule) -> int:
    """Codes in their bits; scales, biases and the rest as they are."""
    bits = {
        site.path: bit_width(int(site.quantizer.levels(site.weight()).max()))
        for site in weight_sites(qmodel)
    }
    total = 0
    state = gdnsq_fx.convert(qmodel, deployable=True).state_dict()
    for name, value in state.items():
        path, _, last = name.rpartition(".")
        if last == "codes":
            total += packed_size(value.numel(), bits[path])
        elif last != "zero_points":  # all 0
            total += value.numel() * value.element_size()
    return total
