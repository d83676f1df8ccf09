"""What stays in floating point and why, and whether anybody asked for it."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from gdnsq_fx.annotations import facts, source_of
from gdnsq_fx.errors import NotQuantizedError
from gdnsq_fx.nested import graphs_of, owner_of

EXCLUDED = "excluded by the configuration"


def skipped_nodes(graph_module: GraphModule) -> list[Node]:
    """Nodes that hold weights or multiply and cannot be quantized, in graph order."""
    nodes = [n for one in graphs_of(graph_module) for n in one.graph.nodes]
    return [n for n in nodes if facts(n).skip and _matters(n)]


def operation_name(graph_module: GraphModule, node: Node) -> str:
    """Name of the operation for patterns: that of its row, class or function."""
    op = facts(node).op
    if op is not None:
        return op.name
    if node.op == "call_module":
        owner = owner_of(graph_module, node)
        return type(owner.get_submodule(str(node.target))).__name__
    return str(getattr(node.target, "__name__", node.target))


def check_skips(graph_module: GraphModule) -> None:
    """Refuse a model of which something stays in floating point that nobody excluded.

    Raises:
        NotQuantizedError: lists each with its reason and source line.
    """
    lines = [_line(n) for n in skipped_nodes(graph_module) if not facts(n).asked]
    if not lines:
        return
    names = [facts(n).layer for n in skipped_nodes(graph_module) if not facts(n).asked]
    raise NotQuantizedError(
        f"strict=True, and {len(lines)} operations would stay in floating point:\n"
        + "\n".join(lines)
        + f"\nExclude what is meant to (exclude=({names[0]!r}, ...)), add a row for "
        "what the op table lacks (table=gdnsq_fx.DEFAULT_TABLE.with_rows(...)), or set "
        "strict=False"
    )


def _line(node: Node) -> str:
    where = source_of(node)
    at = f" ({where})" if where else ""
    return f"  {facts(node).layer or node.name}: {facts(node).skip}{at}"


def _matters(node: Node) -> bool:
    """Whether it multiplies; a BatchNorm that was not folded does not."""
    found = facts(node)
    return found.macs > 0 or (found.op is not None and found.op.is_compute)
