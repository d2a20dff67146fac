"""Concatenations of concatenations."""

from __future__ import annotations

from bstf_compiler.graph import Concat, Graph, Node


class FlattenConcat:
    """Concat(Concat(a, b), c) -> Concat(a, b, c)."""

    def match(self, graph: Graph, node: Node) -> bool:
        """A concatenation that only another one reads, and that no grid of its own rounds before."""
        if not isinstance(node.op, Concat):
            return False
        reader = graph.only_consumer(node.output)
        return (
            reader is not None
            and isinstance(reader.op, Concat)
            and graph.tensors[node.output].position in (None, graph.tensors[reader.output].position)
        )

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Gives the reader this node's inputs in the place of its output, and drops this node."""
        reader = graph.only_consumer(node.output)
        parts = [node.inputs if name == node.output else [name] for name in reader.inputs]
        reader.inputs = [name for part in parts for name in part]
        graph.nodes.remove(node)
        del graph.tensors[node.output]
