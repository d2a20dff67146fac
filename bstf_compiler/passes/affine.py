"""Scales and shifts by constants, such as a batch norm leaves behind, into the layer before them."""

from __future__ import annotations

import numpy as np

from bstf_compiler.graph import BiasAdd, Conv, Graph, MatMul, Multiply, Node

_LINEAR = (Conv, MatMul)
_AFFINE = (Multiply, BiasAdd)


def is_per_channel(graph: Graph, node: Node) -> bool:
    """Whether a node's constant is one number, or one a channel."""
    constant, channels = graph.constants(node)[0].data, graph.tensors[node.output].shape[-1]
    return constant.size == 1 or (constant.size == channels and constant.shape[-1] == channels)


class MergeAffine:
    """Scales and shifts in a row become one scale, then one shift: (x + b) * c -> x * c + b c."""

    def match(self, graph: Graph, node: Node) -> bool:
        """A float constant a channel, right after another one that nobody else reads; a shift after a scale is left."""
        before = graph.producer(node.inputs[0])
        return (
            before is not None
            and graph.only_consumer(before.output) is not None
            and all(isinstance(n.op, _AFFINE) and is_per_channel(graph, n) for n in (before, node))
            and all(c.position is None for n in (before, node) for c in graph.constants(n))
            and not (isinstance(before.op, Multiply) and isinstance(node.op, BiasAdd))
        )

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Joins two of a kind; a scale goes before a shift, where the next scale may be."""
        before = graph.producer(node.inputs[0])
        first, second = (graph.constants(n)[0].data for n in (before, node))
        if type(before.op) is type(node.op):
            joined = first * second if isinstance(node.op, Multiply) else first + second
            before.inputs[1] = graph.add_constant(f"{before.name} joined", joined)
            graph.bypass(node)
            return
        before.op, node.op = node.op, before.op
        before.inputs[1], node.inputs[1] = node.inputs[1], graph.add_constant(f"{node.name} scaled", first * second)
        if self.match(graph, before):
            self.rewrite(graph, before)


class FoldScale:
    """(x * K) * c -> x * (K c), for float constants; a bias in between is scaled too."""

    def match(self, graph: Graph, node: Node) -> bool:
        """A product by one constant a channel, right after a linear layer that nobody else reads."""
        if not isinstance(node.op, Multiply) or not is_per_channel(graph, node):
            return False
        chain = self._chain(graph, node)
        return chain is not None and all(c.position is None for link in chain for c in graph.constants(link))

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Scales the last axis of every constant of the linear layer."""
        scale = graph.constants(node)[0].data.reshape(-1)
        for link in self._chain(graph, node):
            for constant in graph.constants(link):
                name = graph.add_constant(constant.name + " scaled", constant.data * scale)
                link.inputs = [name if old == constant.name else old for old in link.inputs]
        graph.bypass(node)

    def _chain(self, graph: Graph, node: Node) -> list[Node] | None:
        """The linear layer and the bias between it and `node`."""
        chain, tensor = [], node.inputs[0]
        while graph.only_consumer(tensor) is not None:
            link = graph.producer(tensor)
            if link is None:
                return None
            chain.append(link)
            if isinstance(link.op, _LINEAR):
                return chain
            if not (isinstance(link.op, BiasAdd) and is_per_channel(graph, link)):
                return None
            tensor = link.inputs[0]
        return None


class FoldBias:
    """A constant added after a linear layer becomes its bias, or joins the bias that it has."""

    def match(self, graph: Graph, node: Node) -> bool:
        """A sum with one constant a channel, right after a linear layer that nobody else reads."""
        if not isinstance(node.op, BiasAdd) or not is_per_channel(graph, node):
            return False
        layer = graph.producer(node.inputs[0])
        if layer is None or not isinstance(layer.op, _LINEAR) or graph.only_consumer(layer.output) is None:
            return False
        return len(layer.inputs) == 2 or all(c.position is None for c in graph.constants(layer))

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Moves the constant into the layer's inputs."""
        layer, shift = graph.producer(node.inputs[0]), graph.constants(node)[0]
        channels = graph.tensors[node.output].shape[-1]
        data = np.broadcast_to(shift.data.reshape(-1), (channels,))
        if len(layer.inputs) == 3:
            data = data + graph.tensors[layer.inputs.pop()].data
        layer.inputs.append(graph.add_constant(f"{layer.name} bias", np.array(data), shift.position))
        graph.bypass(node)
