"""Architectures of transformers, built from small configs."""

from __future__ import annotations

import transformers
import transformers_audio
import transformers_decoders
import transformers_dense
import transformers_encoders
import transformers_multimodal
import transformers_vision
from cases import Case

_GROUPS = (
    transformers_encoders,
    transformers_decoders,
    transformers_vision,
    transformers_dense,
    transformers_audio,
    transformers_multimodal,
)


def cases() -> list[Case]:
    """All architectures, each with every kind of attention that it supports.

    Dropout and the use of a cache are as each config has them by default.
    """
    transformers.logging.set_verbosity_error()
    recipes = (recipe for group in _GROUPS for recipe in group.RECIPES)
    return [case for recipe in recipes for case in recipe.cases()]
