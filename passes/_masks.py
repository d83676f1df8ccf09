"""Edges that turn out to hold a mask lose their quantizer again.

A mask marks what must not count with the lowest number there is. Levels between that
number and 0 say nothing of any other value, and their range overflows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from gdnsq_fx.annotations import KEY, ModelFacts, annotate, facts
from gdnsq_fx.quantize.observer import MASK_LIMIT
from gdnsq_fx.quantize.quantizer import Quantizer
from gdnsq_fx.sites import Site, sites


def release_masks(graph_module: GraphModule, edges: Iterable[str]) -> None:
    """Take the quantizers of some edges away, and leave their readers alone.

    Operations that multiply with such an edge stay in floating point with all their
    operands, and say why. The edges are noted in `ModelFacts`, so that a file can name
    them.

    Args:
        graph_module: with quantizers; recompiled, graphs inside it as well.
        edges: names of edges; others than those of the graph are ignored.
    """
    named = set(edges)
    released = [site for site in sites(graph_module) if site.edge in named]
    for site in released:
        _release(site.owner, site)
    for owner in {id(site.owner): site.owner for site in released}.values():
        _erase_idle(owner)
        owner.recompile()
    known = graph_module.meta.get(KEY)
    if isinstance(known, ModelFacts):
        masks = dict.fromkeys([*known.masks, *(site.edge for site in released)])
        graph_module.meta[KEY] = replace(known, masks=tuple(masks))


def _release(owner: GraphModule, site: Site[Any]) -> None:
    for node in site.nodes:
        for reader in list(_products(node)):
            name = site.edge.removeprefix(f"{facts(reader).layer}.")
            reason = f"its {name} holds values of a mask, |x| > {MASK_LIMIT:.1e}"
            annotate(reader, skip=reason)
            _free(owner, reader)
        node.replace_all_uses_with(node.all_input_nodes[0])


def _products(value: Node) -> Iterator[Node]:
    """The operations that multiply with a value, be it through views."""
    for user in value.users:
        op = facts(user).op
        if op is not None and op.is_compute:
            yield user
        elif op is not None and op.kind == "view":
            yield from _products(user)


def _free(graph_module: GraphModule, reader: Node) -> None:
    """An operation reads its operands as they were before they were quantized."""
    for value in list(reader.all_input_nodes):
        if _quantizer(graph_module, value) is not None:
            reader.replace_input_with(value, value.all_input_nodes[0])


def _erase_idle(graph_module: GraphModule) -> None:
    """Drop quantizers that nothing reads any more, node and module."""
    graph = graph_module.graph
    for node in reversed(graph.nodes):
        if not node.users and _quantizer(graph_module, node) is not None:
            graph.erase_node(node)
    called = {str(n.target) for n in graph.find_nodes(op="call_module")}
    for path, module in list(graph_module.named_modules()):
        if isinstance(module, Quantizer) and path not in called:
            graph_module.delete_submodule(path)


def _quantizer(graph_module: GraphModule, node: Node) -> nn.Module | None:
    if node.op != "call_module":
        return None
    module = graph_module.get_submodule(str(node.target))
    return module if isinstance(module, Quantizer) else None
