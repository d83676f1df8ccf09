"""From an ``accelerate.Accelerator`` to the engine of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gdnsq_fx.errors import ConfigError
from gdnsq_fx.extras import required
from gdnsq_fx.training.engine import Engine, SingleProcess
from gdnsq_fx.training.process_group import ProcessGroup

if TYPE_CHECKING:
    from accelerate import Accelerator

_UNSUPPORTED = ("DEEPSPEED", "MEGATRON_LM", "XLA", "TP")


def engine_for(accelerator: Accelerator | None, *, shard: bool) -> Engine:
    """How a run is shared among processes.

    Args:
        accelerator: says how many there are; None is one process on its own, and
            ``accelerate`` is not imported.
        shard: cut weights, gradients and optimizer state in parts (FSDP2); also where
            the accelerator is configured so.

    Raises:
        ConfigError: it asks for what `finetune` does itself, or cannot do.
        MissingExtraError: ``accelerate`` is not installed.
    """
    if accelerator is None:
        if shard:
            raise ConfigError(
                "shard=True needs accelerator=accelerate.Accelerator() and several "
                "processes, as torchrun starts them"
            )
        return SingleProcess()
    _check(accelerator)
    count = accelerator.num_processes
    if count == 1:
        return SingleProcess()
    group = ProcessGroup(accelerator.process_index, count, accelerator.device)
    if shard or accelerator.distributed_type.name == "FSDP":
        from gdnsq_fx.training.sharded import Sharded

        return Sharded(group, accelerator.device.type)
    from gdnsq_fx.training.replicated import Replicated

    return Replicated(group, accelerator.ddp_handler)


def _check(accelerator: Any) -> None:
    what = "finetune(accelerator=...)"
    kind: Any = required("accelerate", what, "gdnsq-fx[distributed]").Accelerator
    if not isinstance(accelerator, kind):
        raise ConfigError(
            f"accelerator must be an accelerate.Accelerator, got {accelerator!r}"
        )
    given: Any = accelerator
    if given.mixed_precision != "no":
        raise ConfigError(
            f"the accelerator asks for mixed precision {given.mixed_precision!r}; "
            "leave that to finetune, autocast='bfloat16' or 'float16', which keeps "
            "quantizers in float32"
        )
    if given.gradient_accumulation_steps != 1:
        raise ConfigError(
            "the accelerator accumulates gradients; leave that to finetune, accumulate="
            f"{given.gradient_accumulation_steps}"
        )
    name = given.distributed_type.name
    if name in _UNSUPPORTED or (name == "FSDP" and not given.is_fsdp2):
        raise ConfigError(
            f"finetune does not run on {name} as the accelerator is configured; use "
            "DDP or FSDP2 (fsdp_version=2)"
        )
    if name == "FSDP" and given.state.fsdp_plugin.cpu_offload:
        raise ConfigError("finetune cannot offload parameters; leave cpu_offload out")
