"""The captured graph against the model it came from, in evaluation and in training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map

from gdnsq_fx.capture.captured import CapturedModule
from gdnsq_fx.capture.first_difference import first_difference
from gdnsq_fx.errors import CaptureError, CaptureWarning
from gdnsq_fx.state import cloned, preserved_state, without_fast_path

RELATIVE_TOLERANCE = 1e-4


class _Output(NamedTuple):
    leaves: list[Any]
    structure: TreeSpec


class Observation(NamedTuple):
    """What the model returned, or how it failed, for one input in one mode.

    Attributes:
        training: the mode.
        inputs: ``(args, kwargs)``.
        is_example: whether they are the example itself, not other samples and sizes.
        output: flattened, or the error that the model raised.
    """

    training: bool
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    is_example: bool
    output: _Output | Exception


def observe(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Observation]:
    """Run the model in both modes, on another batch of other values.

    The example itself is run where it is small, or where the other batch does not stand
    for it: a model that builds layers on its first call must see the size that they are
    for. Every run begins with the same random state, and leaves buffers and the random
    state as they were.

    Raises:
        CaptureError: the model fails on the example itself in evaluation.
    """
    example = args, kwargs
    other = tree_map(_other_samples, example)
    seen: list[Observation] = []
    if not _is_large(example) or _builds(model):
        seen.append(_observed_example(model, example))
    for training in (False, True):
        output = _outputs(model, model, training, other)
        seen.append(Observation(training, other, False, output))
    if not seen[0].is_example and isinstance(seen[0].output, Exception):
        seen.append(_observed_example(model, example))
    return seen


def _observed_example(
    model: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]]
) -> Observation:
    output = _outputs(model, model, False, example)
    if isinstance(output, Exception):
        raise CaptureError(
            f"{type(model).__name__} fails on the example input: {output}. "
            "Check example_input: a tensor, a tuple of arguments or a dict of keywords"
        ) from output
    return Observation(False, example, True, output)


def self_check(
    seen: list[Observation],
    model: nn.Module,
    captured: CapturedModule,
    example: tuple[tuple[Any, ...], dict[str, Any]],
) -> None:
    """Compare the graph with what the model was observed to do.

    Args:
        seen: what `observe` returned.
        model, captured: the model and its graph.
        example: ``(args, kwargs)``, run where the graph fails on other samples only.

    Raises:
        CaptureError: outputs differ by more than 1e-4 of their range, or only the
            graph fails. Where that is so for another batch size alone, the graph is
            specialized, which is a `CaptureWarning`.
    """
    found = [(one, _parting(one, model, captured)) for one in seen]
    wrong = [(one, cause) for one, cause in found if cause is not None]
    if wrong and not any(one.is_example for one in seen):
        one = _observed_example(model, example)
        cause = _parting(one, model, captured)
        wrong = [(one, cause), *wrong] if cause is not None else wrong
    for one, cause in wrong:
        mode = "training" if one.training else "evaluation"
        where = first_difference(model, captured, one.inputs, one.training)
        if one.is_example:
            raise CaptureError(
                f"the captured graph {cause} in {mode}{where}. The model's control "
                "flow depends on data in a way that one graph cannot hold; move that "
                "part into a module without children, or capture a sub-module"
            )
        fixed = "data and the size" if captured.facts.real else "size"
        warnings.warn(
            f"the captured graph holds for the {fixed} of the example only: on another "
            f"batch it {cause} in {mode}{where}. {_specializations(captured)}",
            CaptureWarning,
            stacklevel=2,
        )


def _parting(
    one: Observation, model: nn.Module, captured: CapturedModule
) -> str | None:
    """How the graph differs from what was observed, None where it does not."""
    if isinstance(one.output, Exception):
        return None  # the model refuses this input or mode in eager as well
    return _difference(one.output, _outputs(captured, model, one.training, one.inputs))


def disagreement(
    model: nn.Module,
    other: nn.Module,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    modes: tuple[bool, ...] = (False, True),
) -> str | None:
    """How another module differs from a model on one input, None where it does not.

    A mode in which the model itself fails is not compared.
    """
    for training in modes:
        wanted = _outputs(model, model, training, inputs)
        if isinstance(wanted, Exception):
            continue
        cause = _difference(wanted, _outputs(other, model, training, inputs))
        if cause is not None:
            return cause
    return None


def _specializations(captured: CapturedModule) -> str:
    found = captured.facts.specialized
    if not found:
        return "A size is fixed in it, such as by range(len(x))"
    places = ", ".join(dict.fromkeys(s.source for s in found[:5]))
    return f"What it fixes: {places}"


def _outputs(
    module: nn.Module,
    model: nn.Module,
    training: bool,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
) -> _Output | Exception:
    """The output, or the error that the module raised."""
    args, kwargs = cloned(inputs)
    with preserved_state(module, model), torch.no_grad(), without_fast_path():
        module.train(training)
        torch.manual_seed(0)
        # A failing GraphModule would print its code; its forward alone only raises.
        run = module.forward if isinstance(module, GraphModule) else module
        try:
            return _Output(*tree_flatten(_plain(run(*args, **kwargs))))
        except Exception as error:  # any error of the user's model is data here
            return error


def _plain(output: Any) -> Any:
    """Mappings as plain dicts, so that their class does not matter."""
    if isinstance(output, Mapping):
        entries: Mapping[Any, Any] = output
        return {key: _plain(value) for key, value in entries.items()}
    return output


def _difference(wanted: _Output, got: _Output | Exception) -> str | None:
    """How two outputs differ, None where they agree."""
    if isinstance(got, Exception):
        return f"fails ({type(got).__name__}: {got})"
    if wanted.structure != got.structure:
        return "returns another structure"
    if not all(map(_close, wanted.leaves, got.leaves)):
        return "returns other values"
    return None


def _close(wanted: Any, got: Any) -> bool:
    if is_dataclass(wanted):
        names = [field.name for field in fields(wanted)]
        same = type(wanted) is type(got)
        return same and all(_close(getattr(wanted, n), getattr(got, n)) for n in names)
    if not isinstance(wanted, Tensor):
        plain = isinstance(wanted, int | float | str | bool | None)
        return bool(wanted == got) if plain else type(wanted) is type(got)
    if not isinstance(got, Tensor) or wanted.shape != got.shape:
        return False
    if wanted.is_meta or wanted.numel() == 0:
        return True
    if not wanted.is_floating_point():
        return torch.equal(wanted, got)
    scale = float(wanted.nan_to_num().abs().amax()) or 1.0
    return torch.allclose(wanted, got, 0.0, RELATIVE_TOLERANCE * scale, equal_nan=True)


# As many samples as a BatchNorm over single values needs to train.
_FEW = 2


def _is_large(example: Any) -> bool:
    """Whether a few samples cost less than the example."""
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    return any(t.ndim > 0 and t.shape[0] > _FEW for t in tensors)


def _builds(model: nn.Module) -> bool:
    return any(is_lazy(t) for t in (*model.parameters(), *model.buffers()))


def _other_samples(value: Any) -> Any:
    """Another batch size, other values: the first of many samples, or a few twice."""
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    more = value[:_FEW] if value.shape[0] > _FEW else torch.cat([value, value])
    if not value.is_floating_point() or value.is_meta:
        return more
    return more.roll(1, dims=-1)
