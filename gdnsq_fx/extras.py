"""Optional libraries, imported where they are needed and not before."""

from __future__ import annotations

import importlib
from typing import Any

from gdnsq_fx.errors import MissingExtraError


def required(module: str, what: str, install: str = "gdnsq-fx[report]") -> Any:
    """Import an optional library.

    Args:
        module: such as ``plotly.graph_objects``.
        what: what needs it, for the message.
        install: what to give to pip.

    Raises:
        MissingExtraError: it is not installed; names what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{what} needs {module.partition('.')[0]}, which cannot be imported "
            f'({error}); install it with: pip install "{install}"'
        ) from error
