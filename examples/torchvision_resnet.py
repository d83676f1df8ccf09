"""Quantize a torchvision model to W4A4 on random images: the five-line use.

    python examples/torchvision_resnet.py

Replace the random tensors by your data, and ``weights=None`` by trained weights.
"""

from __future__ import annotations

import torch
import torchvision

import gdnsq_fx


def main() -> None:
    """Prepare, analyze, fine-tune a few steps, convert and save."""
    model = torchvision.models.resnet18(weights=None, num_classes=10)
    batches = [torch.randn(8, 3, 64, 64) for _ in range(4)]

    config = gdnsq_fx.QuantConfig(weight_bits=4, act_bits=4)
    qmodel = gdnsq_fx.prepare(model, batches[0], config, calibration=batches)
    print(gdnsq_fx.analyze(qmodel, batches))
    print(gdnsq_fx.finetune(qmodel, batches, steps=100, teacher=model))
    imodel = gdnsq_fx.convert(qmodel)
    size = gdnsq_fx.save(imodel, "resnet18-w4a4.safetensors")

    print(f"resnet18-w4a4.safetensors: {size:,} bytes")


if __name__ == "__main__":
    main()
