"""What is known of a stored graph and its nodes, as JSON, and back."""

from __future__ import annotations

from typing import Any, cast

from torch.fx import GraphModule, Node

from gdnsq_fx.annotations import annotate, facts
from gdnsq_fx.deploy.edges import KEY as EDGE
from gdnsq_fx.deploy.edges import name_edge
from gdnsq_fx.deploy.graph_values import UnknownValueError, decoded, encoded
from gdnsq_fx.deploy.qdq import DeployFacts, deploy_facts, is_deployable
from gdnsq_fx.inputs import InputStructure
from gdnsq_fx.optable import DEFAULT_TABLE
from gdnsq_fx.structure import (
    LeafStructure,
    MappingStructure,
    SequenceStructure,
    Structure,
    TensorStructure,
)

_DEPTH = 32


def stored_facts(node: Node, owner: GraphModule) -> dict[str, Any]:
    """Facts of a node that deployment asks for.

    Raises:
        UnknownValueError: its row is of an op table of the user's own.
    """
    known = facts(node)
    found: dict[str, Any] = {}
    if known.op is not None:
        if DEFAULT_TABLE.find(node, owner) is not known.op:
            raise UnknownValueError(f"the operation {known.op.name} of an own table")
        found["known"] = True
    if known.layer:
        found["layer"] = known.layer
    if known.shape is not None:
        found["shape"] = [int(size) for size in known.shape]
    if known.dtype is not None:
        found["dtype"] = encoded(known.dtype, {})
    if isinstance(edge := node.meta.get(EDGE), str):
        found["edge"] = edge
    return found


def place_facts(node: Node, stored: Any, owner: GraphModule) -> None:
    """Give a node the facts that `stored_facts` found.

    Raises:
        UnknownValueError: they are something else.
    """
    if not isinstance(stored, dict):
        raise UnknownValueError("facts that are no object")
    known = cast(dict[str, Any], stored)
    _check_kinds(known)
    shape = known.get("shape")
    annotate(
        node,
        op=DEFAULT_TABLE.find(node, owner) if "known" in known else None,
        layer=known.get("layer", ""),
        shape=None if shape is None else tuple(shape),
        dtype=decoded(known.get("dtype"), []),
    )
    if "edge" in known:
        name_edge(node, known["edge"])


def _check_kinds(known: dict[str, Any]) -> None:
    kinds = {"known": bool, "layer": str, "shape": list, "dtype": dict, "edge": str}
    for name, value in known.items():
        if name not in kinds or type(value) is not kinds[name]:
            raise UnknownValueError(f"facts of another kind: {name[:40]!r}")
    if any(type(size) is not int for size in known.get("shape", [])):
        raise UnknownValueError("a shape that is no list of integers")


def stored_inputs(inputs: InputStructure) -> Any:
    """The structure of the example input as JSON.

    Raises:
        UnknownValueError: it has keys that are no strings or numbers.
    """
    return _stored(inputs.root)


def read_inputs(stored: Any) -> InputStructure:
    """The structure of the example input.

    Raises:
        UnknownValueError: it is something else.
    """
    return InputStructure(_read(stored, 0))


def stored_deployment(imodel: GraphModule) -> Any:
    """What the deployable form changed; None for a model in another form."""
    if not is_deployable(imodel):
        return None
    known = deploy_facts(imodel)
    return {"moved": dict(known.moved), "kept": dict(known.kept)}


def read_deployment(stored: Any) -> DeployFacts | None:
    """The facts that `stored_deployment` wrote.

    Raises:
        UnknownValueError: they are something else.
    """
    if stored is None:
        return None
    try:
        moved = {str(k): float(v) for k, v in stored["moved"].items()}
        return DeployFacts(moved, {str(k): str(v) for k, v in stored["kept"].items()})
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UnknownValueError(f"facts of the deployable form ({error})") from error


def _stored(root: Structure) -> Any:
    if isinstance(root, TensorStructure):
        return {"tensor": [list(root.shape), encoded(root.dtype, {})]}
    if isinstance(root, SequenceStructure):
        kind = "list" if root.is_list else "tuple"
        return {kind: [_stored(item) for item in root.items]}
    if isinstance(root, MappingStructure):
        entries = [[key, _stored(item)] for key, item in root.entries]
        if any(not isinstance(key, str) for key, _ in entries):
            raise UnknownValueError("inputs by keys that are no strings")
        return {"dict": entries}
    assert isinstance(root, LeafStructure)
    return {"leaf": root.type_name}


def _read(stored: Any, depth: int) -> Structure:
    if depth > _DEPTH:
        raise UnknownValueError(f"inputs nested deeper than {_DEPTH}")
    try:
        ((kind, content),) = stored.items()
        if kind == "tensor":
            shape, dtype = content
            if any(type(size) is not int for size in shape):
                raise TypeError("sizes that are no integers")
            return TensorStructure(tuple(shape), decoded(dtype, []))
        if kind in ("list", "tuple"):
            items = tuple(_read(item, depth + 1) for item in content)
            return SequenceStructure(items, kind == "list")
        if kind == "dict":
            pairs = tuple((str(k), _read(item, depth + 1)) for k, item in content)
            return MappingStructure(pairs)
        if kind == "leaf":
            return LeafStructure(str(content))
    except (TypeError, AttributeError, ValueError) as error:
        raise UnknownValueError(f"a structure of inputs ({error})") from error
    raise UnknownValueError("a structure of inputs of another kind")
