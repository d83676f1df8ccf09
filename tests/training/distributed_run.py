"""Fine-tune a tiny network on however many processes there are, several ways.

    torchrun --standalone --nproc_per_node 2 distributed_run.py FOLDER CASE...

Writes FOLDER/CASE.json from the first process: history, bits, weights, and whether all
processes ended with the same weights. A case of one process is the reference for the
same case of several: the global batch is cut among them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.data import DataLoader, TensorDataset

import gdnsq_fx
from gdnsq_fx.annotations import model_facts
from gdnsq_fx.errors import TrainingDivergedError
from gdnsq_fx.training.batches import BatchStream
from gdnsq_fx.training.budgeted_bits import divergences_tensor
from gdnsq_fx.training.distributed import engine_for
from gdnsq_fx.training.first_prediction import FirstPrediction
from gdnsq_fx.training.planned_bits import PlannedBits

STEPS, BATCH = 20, 16


class Net(nn.Module):
    """BatchNorm, LayerNorm, a scalar parameter, sizes that two does not divide."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 5, 3, padding=1)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.layer_norm = nn.LayerNorm(80)
        self.head = nn.Linear(80, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.second(x))
        return self.head(self.layer_norm(x.flatten(1)) * self.scale)


def samples() -> Tensor:
    """As many as five global batches."""
    own = torch.Generator().manual_seed(0)
    return torch.randn(5 * BATCH, 1, 4, 4, generator=own)


def share_of(accelerator: Accelerator) -> list[Tensor]:
    """What this process takes of each global batch."""
    part = slice(accelerator.process_index, None, accelerator.num_processes)
    return [batch[part] for batch in samples().split(BATCH)]


def prepared(seed: int = 0, classes: int = 3, **options: Any) -> GraphModule:
    """The same on every process, unless the seed differs."""
    torch.manual_seed(seed)
    model, examples = Net(classes), torch.randn(4, BATCH, 1, 4, 4)
    config = gdnsq_fx.QuantConfig(4, 4, first_last=None, **options)
    return gdnsq_fx.prepare(model, examples[0], config, list(examples)).train()


def tuned(
    accelerator: Accelerator,
    qmodel: GraphModule | None = None,
    batches: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """One run, described."""
    qmodel = prepared() if qmodel is None else qmodel
    batches = share_of(accelerator) if batches is None else batches
    result = gdnsq_fx.finetune(
        qmodel,
        batches,
        accelerator=accelerator,
        progress=False,
        **{"steps": STEPS, **options},
    )
    weights = torch.cat([t.float().reshape(-1) for t in qmodel.state_dict().values()])
    with torch.no_grad():
        output = gdnsq_fx.convert(qmodel)(samples()[:4])
    return {
        "loss": [record.loss for record in result.history],
        "mean_bits": [record.mean_bits for record in result.history],
        "metrics": [record.metric for record in result.history],
        "metric": result.metric,
        "bits": result.bits,
        "weights": weights.tolist(),
        "output": output.reshape(-1).tolist(),
        "types": sorted({type(m).__name__ for m in qmodel.modules()}),
        "plain": all(type(p) is nn.Parameter for p in qmodel.parameters()),
        "equal": _equal_everywhere(weights, accelerator),
    }


def fixed(accelerator: Accelerator, **options: Any) -> dict[str, Any]:
    """All options that look at or change the whole model."""
    return tuned(
        accelerator,
        accumulate=2,
        ema=0.5,
        batch_norm_batches=5,
        validate=lambda m: float(m(share_of(accelerator)[0]).square().mean()),
        validate_every=5,
        best="min",
        tracker=gdnsq_fx.CapacityTracker(10),
        **options,
    )


def budget(accelerator: Accelerator, **options: Any) -> dict[str, Any]:
    """Bits learned."""
    bound = gdnsq_fx.Budget(mean_weight_bits=3.5, act_bits=4)
    # From fewer bits: at eight of them slopes are nearly all noise of rounding.
    schedule = gdnsq_fx.Schedule(STEPS, start_bits=5)
    return tuned(accelerator, budget=bound, schedule=schedule, **options)


def planned(accelerator: Accelerator, **options: Any) -> dict[str, Any]:
    """Bits from a plan that is predicted on the first batches; ten classes, of which
    the draws of a prediction tell four apart, so that its signs count."""
    bound = gdnsq_fx.Budget(mean_weight_bits=3.5, act_bits=4)
    return tuned(accelerator, prepared(classes=10), budget=bound, **options)


def predicted(accelerator: Accelerator) -> dict[str, Any]:
    """What that plan is made from."""
    qmodel = prepared(classes=10)
    group = engine_for(accelerator, shard=False).group
    bound = gdnsq_fx.Budget(mean_weight_bits=3.5)
    loss, schedule = gdnsq_fx.distillation_loss, gdnsq_fx.Schedule(STEPS, 1.0)
    prediction = FirstPrediction(qmodel, bound, schedule, group, loss, None, False)
    structure = model_facts(qmodel).inputs
    stream = BatchStream(share_of(accelerator), structure, STEPS, resumable=True)
    limits = prediction.limits_of_new(stream)
    assert limits.predicted is not None
    values = divergences_tensor(limits.predicted, list(limits.predicted)).flatten()
    return {
        "values": values.tolist(),
        "targets": PlannedBits(
            qmodel, bound, schedule, group, limits.predicted
        ).targets,
        "equal": _equal_everywhere(values, accelerator),
    }


def features(accelerator: Accelerator, **options: Any) -> dict[str, Any]:
    """Values inside are distilled as well."""
    return tuned(accelerator, features={"relu": 1.0}, **options)


def aewgs(accelerator: Accelerator, **options: Any) -> dict[str, Any]:
    """The estimator with statistics over all processes; its signs are drawn in each."""
    torch.manual_seed(accelerator.process_index)
    return tuned(accelerator, prepared(estimator="aewgs"), **options)


def seeds_differ(accelerator: Accelerator) -> dict[str, Any]:
    """Weights and levels are those of the first process."""
    return tuned(accelerator, prepared(seed=accelerator.process_index))


def loader(accelerator: Accelerator, **options: Any) -> dict[str, Any]:
    """Global batches that shuffle, cut by accelerate."""
    torch.manual_seed(3)
    drawn = torch.Generator().manual_seed(5)
    data = TensorDataset(samples())
    whole = DataLoader(data, batch_size=BATCH, shuffle=True, generator=drawn)
    return tuned(accelerator, batches=accelerator.prepare(whole), **options)


def resumed(folder: Path, accelerator: Accelerator, **options: Any) -> dict[str, Any]:
    """Stopped after 9 steps by a signal to the last process, then gone on with."""
    options = {"checkpoint": folder, "checkpoint_every": 4, "ema": 0.5, **options}
    is_last = accelerator.process_index == accelerator.num_processes - 1

    class Killing(list[Tensor]):
        taken = 0

        def __iter__(self) -> Any:
            for batch in super().__iter__():
                self.taken += 1
                if self.taken == 9 and is_last:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    def stop(number: int, frame: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGTERM, stop)
    stopped = False
    try:
        tuned(accelerator, batches=Killing(share_of(accelerator)), **options)
    except InterruptedError:
        stopped = True
    signal.signal(signal.SIGTERM, before)
    names = sorted(file.name for file in folder.iterdir())
    found = tuned(accelerator, **options)
    whole = tuned(accelerator, **{**options, "checkpoint": None})
    return {"stopped": stopped, "files": names, "same": found == whole}


def poisoned(accelerator: Accelerator, **options: Any) -> dict[str, Any]:
    """Not a number in the last process alone."""
    batches = share_of(accelerator)
    if accelerator.process_index == accelerator.num_processes - 1:
        batches[3] = batches[3] * torch.nan
    qmodel = prepared()
    try:
        tuned(accelerator, qmodel, batches, **options)
    except TrainingDivergedError as error:
        weights = torch.cat([t.float().reshape(-1) for t in qmodel.parameters()])
        return {
            "step": error.step,
            "finite": bool(torch.isfinite(weights).all()),
            "plain": all(type(p) is nn.Parameter for p in qmodel.parameters()),
            "equal": _equal_everywhere(weights, accelerator),
        }
    return {}


def differing(accelerator: Accelerator) -> dict[str, Any]:
    """Bits that differ between processes are refused."""
    qmodel = prepared()
    if accelerator.process_index == 1:
        name = next(iter(gdnsq_fx.sites.hard_bits(qmodel)))
        gdnsq_fx.sites.assign_targets(qmodel, {name: 3})
    try:
        tuned(accelerator, qmodel)
    except gdnsq_fx.errors.ConfigError as error:
        return {"error": str(error)}
    return {}


def _equal_everywhere(weights: Tensor, accelerator: Accelerator) -> bool:
    """To the bit."""
    found = [torch.empty_like(weights) for _ in range(accelerator.num_processes)]
    if len(found) == 1:
        return True
    dist.all_gather(found, weights)
    return all(torch.equal(one, weights) for one in found)


def main() -> None:
    """Run the cases that were named."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    cut = DataLoaderConfiguration(split_batches=True)
    accelerator = Accelerator(cpu=True, dataloader_config=cut)
    cases: dict[str, Callable[..., dict[str, Any]]] = {
        "fixed": fixed,
        "budget": budget,
        "planned": planned,
        "predicted": predicted,
        "features": features,
        "aewgs": aewgs,
        "seeds_differ": seeds_differ,
        "loader": loader,
        "poisoned": poisoned,
        "differing": differing,
        "bfloat16": lambda a, **o: tuned(a, autocast="bfloat16", **o),
        "plain": tuned,
    }
    for name in sys.argv[2:]:
        case, _, way = name.partition("-")
        options = {"shard": True} if way == "shard" else {}
        if case == "resumed":
            found = resumed(folder / name, accelerator, **options)
        else:
            found = cases[case](accelerator, **options)
        if accelerator.is_main_process:
            (folder / f"{name}.json").write_text(json.dumps(found))
            print(name, "done", flush=True)
    accelerator.wait_for_everyone()
    sys.stdout.flush()
    # Without the interpreter's end: gloo's threads abort a process there now and then.
    os._exit(0)


if __name__ == "__main__":
    main()
