"""What a run shows of its progress."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm.auto import tqdm

from gdnsq_fx.inputs import Batch


def step_bar(begun: int, steps: int, *, shown: bool) -> tqdm[int]:
    """The steps that are left of a run."""
    return tqdm(
        range(begun, steps),
        desc="fine-tune",
        initial=begun,
        total=steps,
        disable=not shown,
        unit="step",
    )


def prediction_bar(batches: Sequence[Batch], *, shown: bool) -> tqdm[Batch]:
    """The batches that a plan is predicted from; gone when they are done."""
    return tqdm(batches, desc="predict", disable=not shown, unit="batch", leave=False)
