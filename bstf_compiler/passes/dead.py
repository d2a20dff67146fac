"""Nodes that nothing reads."""

from __future__ import annotations

from bstf_compiler.graph import Graph


def remove_dead(graph: Graph) -> None:
    """Removes the nodes that no output depends on, and the tensors that nobody uses."""
    needed = set(graph.outputs)
    for node in reversed(graph.nodes):
        if node.output in needed:
            needed.update(node.inputs)
    graph.nodes = [node for node in graph.nodes if node.output in needed]
    graph.tensors = {n: t for n, t in graph.tensors.items() if n in needed or n in graph.inputs}
