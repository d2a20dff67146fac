"""What the host computes on an input: before the first grid, or with numbers of their own for pixels."""

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
            data = np.float32([neutral]) if link is None else _constant(graph, link)
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
            if graph.only_consumer(tensor) is None or _constant(graph, link) is None:
                return None
            found[kind], tensor = link, link.inputs[0]
        if not found or tensor not in graph.inputs or graph.only_consumer(tensor) is None:
            return None
        return tensor, found.get(Multiply), found.get(BiasAdd)


class FormMeanImage:
    """In a float graph too, constants of an input with numbers of their own for pixels, a mean image for example, are
    an operation of the host, and so are the constants before them.
    """

    def match(self, graph: Graph, node: Node) -> bool:
        """A product or a sum with such a constant, of an input or what others made of it; nobody else reads them."""
        return (
            isinstance(node.op, (Multiply, BiasAdd))
            and not is_per_channel(graph, node)
            and not any(isinstance(other.op, FakeQuant) for other in graph)
            and self._links(graph, node) is not None
        )

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Joins the constants to one factor and one summand."""
        links = self._links(graph, node)
        scale, offset = np.float32([1.0]), np.float32([0.0])
        for link in links:
            if isinstance(link.op, Affine):
                scale, offset = (constant.data for constant in graph.constants(link))
            elif isinstance(link.op, Multiply):
                scale, offset = (values * _constant(graph, link) for values in (scale, offset))
            else:
                offset = offset + _constant(graph, link)
        node.op, node.inputs = Affine(), links[0].inputs[:1]
        for what, data in (("scale", scale), ("offset", offset)):
            node.inputs.append(graph.add_constant(f"{node.name} {what}", data))
        for link in links[:-1]:
            graph.nodes.remove(link)
            del graph.tensors[link.output]

    def _links(self, graph: Graph, node: Node) -> list[Node] | None:
        """The operations from an input to this one, in order, if they are all with constants."""
        links = [node]
        while (source := links[0].inputs[0]) not in graph.inputs:
            before = graph.producer(source)
            if not isinstance(before.op, (Multiply, BiasAdd, Affine)) or graph.only_consumer(source) is None:
                return None
            links.insert(0, before)
        known = all(isinstance(link.op, Affine) or _constant(graph, link) is not None for link in links)
        return links if known and graph.only_consumer(source) is not None else None


def _constant(graph: Graph, node: Node) -> np.ndarray | None:
    """A node's constant: of shape (1,), (channels,), or that of an image; None if it is none of these."""
    data, shape = graph.constants(node)[0].data, graph.tensors[node.output].shape
    if is_per_channel(graph, node):
        return data.reshape(-1)
    axes = (1,) * (len(shape) - data.ndim) + data.shape
    if axes[0] != 1 or any(size not in (1, whole) for size, whole in zip(axes, shape)):
        return None
    return np.ascontiguousarray(np.broadcast_to(data.reshape(axes[1:]), shape[1:]))
