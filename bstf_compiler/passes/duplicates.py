"""Common sub-expressions."""

from __future__ import annotations

import numpy as np

from bstf_compiler.graph import Graph, Node


class MergeDuplicates:
    """Two nodes that compute the same from the same are one."""

    def match(self, graph: Graph, node: Node) -> bool:
        """A node with an earlier twin; one that the network returns stays."""
        return node.output not in graph.outputs and self._twin(graph, node) is not None

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Lets the twin serve the node's readers."""
        twin = self._twin(graph, node)
        for reader in graph.consumers(node.output):
            reader.inputs = [twin.output if name == node.output else name for name in reader.inputs]
        graph.nodes.remove(node)
        del graph.tensors[node.output]

    def _twin(self, graph: Graph, node: Node) -> Node | None:
        """The first node of the same operation and grid with the same inputs, or constants that are equal."""
        for other in graph.nodes:
            if other is node:
                return None
            if other.op == node.op and len(other.inputs) == len(node.inputs):
                pairs = [(node.output, other.output), *zip(node.inputs, other.inputs)]
                if all(_equal(graph, *pair) for pair in pairs[1:]) and _grid(graph, *pairs[0]):
                    return other
        return None


def _grid(graph: Graph, one: str, other: str) -> bool:
    return graph.tensors[one].position == graph.tensors[other].position


def _equal(graph: Graph, one: str, other: str) -> bool:
    if one == other:
        return True
    a, b = graph.tensors[one].data, graph.tensors[other].data
    return a is not None and b is not None and _grid(graph, one, other) and a.dtype == b.dtype and np.array_equal(a, b)
