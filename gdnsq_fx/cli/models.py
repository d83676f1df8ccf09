"""The model that a command names, and its weights."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gdnsq_fx.errors import ConfigError, FileFormatError
from gdnsq_fx.extras import required

SHOWN_KEYS = 5


def build_model(source: str, name: str) -> nn.Module:
    """Build a model; nothing is downloaded.

    Args:
        source: a key of `LIBRARIES`, or a module that can be imported.
        name: of the model there, or of a callable that returns one.

    Raises:
        ConfigError: there is no such model, or the callable fails.
        MissingExtraError: the library is not installed.
    """
    builder = LIBRARIES.get(source)
    if builder is not None:
        return builder(name)
    built = _called(source, name)
    if not isinstance(built, nn.Module):
        raise ConfigError(
            f"{source}:{name} gave {type(built).__name__}, not a torch.nn.Module; name "
            "a function without arguments that returns the model"
        )
    return built


def load_weights(model: nn.Module, path: Path) -> None:
    """Read a safetensors file into a model; keys and shapes must be the model's.

    Raises:
        FileFormatError: not a safetensors file, or one of another model.
        FileNotFoundError: there is no file.
    """
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise FileFormatError(
            f"{path} is not a safetensors file ({error}); other formats can hold code "
            "that runs when they are read. Write one with "
            "safetensors.torch.save_file(model.state_dict(), path)"
        ) from error
    state = model.state_dict(keep_vars=True)
    problems = _differences(state, found)
    if problems:
        raise FileFormatError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}"
        )
    model.load_state_dict(found, strict=False)


def _from_torchvision(name: str) -> nn.Module:
    models = required("torchvision.models", f"torchvision:{name}", "torchvision")
    _check_name("torchvision", name, models.list_models())
    # The backbones of segmentation models and detectors are downloaded by default.
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    options = dict.fromkeys({"weights_backbone"} & parameters.keys())
    return models.get_model(name, weights=None, **options)


def _from_timm(name: str) -> nn.Module:
    timm = required("timm", f"timm:{name}", "timm")
    _check_name("timm", name.partition(".")[0], timm.list_models())
    return timm.create_model(name, pretrained=False)


LIBRARIES: dict[str, Callable[[str], nn.Module]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
}


def _check_name(library: str, name: str, names: list[str]) -> None:
    if name not in names:
        near = get_close_matches(name, names, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"{library} has no model named {name}{hint}")


def _called(source: str, name: str) -> Any:
    """What the named callable of a module returns."""
    try:
        module = importlib.import_module(source)
        target = module
        for part in name.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"cannot find {source}:{name} ({error}); name a module that can be "
            "imported from here, a colon, and a function in it that returns the model"
        ) from error
    if not callable(target):
        raise ConfigError(f"{source}:{name} is {type(target).__name__}, not a function")
    try:
        return target()
    except Exception as error:  # whatever a user's function raises, say where
        raise ConfigError(
            f"{source}:{name}() failed: {type(error).__name__}: {error}; it is called "
            "without arguments and must return the model"
        ) from error


def _differences(state: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """How the keys and shapes of a file differ from those of a model."""
    # Of tensors that a model shares, a file holds one.
    held = {id(tensor) for name, tensor in state.items() if name in found}
    absent = [n for n, t in state.items() if n not in found and id(t) not in held]
    shapes = [
        f"{n} {tuple(found[n].shape)} for {tuple(t.shape)}"
        for n, t in state.items()
        if n in found and found[n].shape != t.shape
    ]
    named = {
        "missing": absent,
        "unknown": [n for n in found if n not in state],
        "of another shape": shapes,
    }
    return [
        f"{len(names)} {what} ({', '.join(names[:SHOWN_KEYS])}"
        f"{', ...' if len(names) > SHOWN_KEYS else ''})"
        for what, names in named.items()
        if names
    ]
