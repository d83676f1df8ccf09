"""Graph modules made anew, with no more than their graphs use."""

from __future__ import annotations

from torch.fx import Graph, GraphModule

from gdnsq_fx.capture.child_graph import LoweredChild
from gdnsq_fx.nested import graphs_of, path_of


def rebuilt(graph_module: GraphModule, name: str) -> GraphModule:
    """A plain graph module, and plain graphs inside, that hold what the graphs read."""
    for one in reversed(graphs_of(graph_module)):  # inner first
        if path := path_of(one):
            child = _lowered(one, LoweredChild, type(one).__name__)
            graph_module.set_submodule(path, child)
    return _lowered(graph_module, GraphModule, name)


def _lowered(
    graph_module: GraphModule, kind: type[GraphModule], name: str
) -> GraphModule:
    """A graph module that holds no more than the graph uses."""
    _drop_unread_parameters(graph_module.graph)
    graph_module.graph.lint()
    # torch's own class copies just what the graph refers to.
    lowered = kind(graph_module, graph_module.graph, name)
    lowered.meta = dict(graph_module.meta)
    lowered._tracer_cls = None  # pyright: ignore[reportPrivateUsage]
    lowered.train(graph_module.training)
    return lowered


def _drop_unread_parameters(graph: Graph) -> None:
    """Erase stored tensors, and calls of parametrizations, that nothing reads.

    `Graph.eliminate_dead_code` would also drop in-place calls that nobody reads.
    """
    stored = [*graph.find_nodes(op="get_attr"), *graph.find_nodes(op="call_module")]
    for node in stored:
        if not node.users and not node.args and not node.kwargs:
            graph.erase_node(node)
