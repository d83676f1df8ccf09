"""The names of quantized activations in an ONNX file.

The value that holds the codes of edge ``layer1.conv.input`` is called
``layer1.conv.input.codes``, and the metadata of the file say so: an entry
``gdnsq_fx.edges``, in JSON, edge -> value.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gdnsq_fx.errors import FileFormatError

KEY = "gdnsq_fx.edges"


def name_edges(model: Any, edges: Sequence[str]) -> dict[str, str]:
    """Name the last outputs of an exported model, and make them outputs no more.

    Args:
        model: ``onnx_ir.Model`` of one that returns codes
            (`gdnsq_fx.deploy.edges.with_codes`).
        edges: their names, in the order of the outputs.

    Returns:
        What the metadata of the file are to say.
    """
    graph = model.graph
    first = len(graph.outputs) - len(edges)
    codes = list(graph.outputs[first:])
    del graph.outputs[first:]
    places: dict[str, str] = {}
    named: set[int] = set()
    for edge, output in zip(edges, codes, strict=True):
        value = _source(graph, output)
        # Two edges with the same levels of one tensor are one value.
        if id(value) not in named:
            value.name = f"{edge}.codes"
            named.add(id(value))
        places[edge] = value.name
    return {KEY: json.dumps(places)}


def edge_values(model: Any) -> dict[str, str]:
    """Names of the values that hold codes, by edge; empty where a file says nothing.

    Args:
        model: an ``onnx.ModelProto``.

    Raises:
        FileFormatError: what the file says is not such a mapping.
    """
    text = next((e.value for e in model.metadata_props if e.key == KEY), "{}")
    try:
        found: Any = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(
        isinstance(part, str) for pair in found.items() for part in pair
    ):
        raise FileFormatError(
            f"the entry {KEY} of the ONNX file's metadata is not a mapping of names; "
            "export the model again"
        )
    return found


def _source(graph: Any, value: Any) -> Any:
    """The value itself, where an output is a mere copy of it."""
    node = value.producer()
    if node is None or node.op_type != "Identity":
        return value
    copied = node.inputs[0]  # a node that is removed has none
    graph.remove(node, safe=True)
    return _source(graph, copied)
