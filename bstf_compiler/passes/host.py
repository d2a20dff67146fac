"""What the host computes before the first grid."""

from __future__ import annotations

import numpy as np

from bstf_compiler.graph import Affine, BiasAdd, FakeQuant, Graph, Multiply, Node
from bstf_compiler.passes.affine import is_per_channel


class FormAffine:
    """A scale and a shift of an input, then a grid: one operation of the host."""

    def match(self, graph: Graph, node: Node) -> bool:
        """A grid, right behind a product and a sum with constants of an input; nobody else reads any of them."""
        return isinstance(node.op, FakeQuant) and self._chain(graph, node) is not None

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Makes the grid's node the operation; the constants keep their values, for equal rounding."""
        tensor, scale, shift = self._chain(graph, node)
        position, node.op = node.op.position, Affine()
        node.inputs = [tensor]
        for what, link, neutral in (("scale", scale, 1.0), ("offset", shift, 0.0)):
            data = np.float32([neutral]) if link is None else graph.tensors[link.inputs[1]].data.reshape(-1)
            node.inputs.append(graph.add_constant(f"{node.name} {what}", data))
        for link in filter(None, (scale, shift)):
            graph.nodes.remove(link)
            del graph.tensors[link.output]
        graph.tensors[node.output].position = position

    def _chain(self, graph: Graph, node: Node) -> tuple[str, Node | None, Node | None] | None:
        """The input, and the product and the sum between it and the grid, if there is one of them at least."""
        found: dict[type, Node] = {}
        tensor = node.inputs[0]
        for kind in (BiasAdd, Multiply):
            link = graph.producer(tensor)
            if link is None or not isinstance(link.op, kind):
                continue
            if graph.only_consumer(tensor) is None or not is_per_channel(graph, link):
                return None
            found[kind], tensor = link, link.inputs[0]
        if not found or tensor not in graph.inputs or graph.only_consumer(tensor) is None:
            return None
        return tensor, found.get(Multiply), found.get(BiasAdd)
