"""Fine-tune on several processes: data parallel, or with the model cut in parts.

    pip install "gdnsq-fx[distributed]"
    torchrun --standalone --nproc_per_node 2 examples/distributed.py
    torchrun --standalone --nproc_per_node 2 examples/distributed.py --shard

Also under ``accelerate launch``, and as one process without either. A small network
with random weights and random data, on GPUs where there is one for each process.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gdnsq_fx

STEPS, GLOBAL_BATCH = 100, 64


def main() -> None:
    """Bring a small network to two bits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shard", action="store_true", help="FSDP2 instead of DDP")
    parser.add_argument("--cpu", action="store_true", help="even where there are GPUs")
    given = parser.parse_args()

    # The loader below gives global batches; each process gets its part of every one.
    cut = DataLoaderConfiguration(split_batches=True)
    accelerator = Accelerator(cpu=given.cpu, dataloader_config=cut)
    torch.manual_seed(0)  # the same data and order on every process
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 10),
    )
    model = model.to(accelerator.device).eval()
    images = torch.randn(512, 1, 8, 8)
    loader = DataLoader(
        TensorDataset(images),
        batch_size=GLOBAL_BATCH,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(0),
    )

    config = gdnsq_fx.QuantConfig(weight_bits=2, act_bits=2, first_last=None)
    examples = images[:GLOBAL_BATCH].to(accelerator.device)
    qmodel = gdnsq_fx.prepare(model, examples, config, calibration=[examples])
    result = gdnsq_fx.finetune(
        qmodel,
        accelerator.prepare(loader),
        steps=STEPS,
        accelerator=accelerator,
        shard=given.shard and accelerator.num_processes > 1,
        progress=False,
    )
    if accelerator.is_main_process:  # every process holds the whole model again
        above = {e: b for e, b in result.bits.items() if b > result.target_bits[e]}
        print("processes:", accelerator.num_processes)
        print("loss:", f"{result.history[-1].loss:.4f}")
        print("bits:", result.bits)
        print("above target:", above)
    accelerator.end_training()


if __name__ == "__main__":
    main()
