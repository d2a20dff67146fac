"""Rectifiers into the layer before them."""

from __future__ import annotations

from dataclasses import replace

from bstf_compiler.graph import Add, AveragePool, Conv, Graph, Node, Product, Relu


class MergeRelu6:
    """min(relu(x), 6) -> relu6(x)."""

    def match(self, graph: Graph, node: Node) -> bool:
        """The minimum, right after a relu that nobody else reads."""
        if not isinstance(node.op, Relu) or node.op.activation != "min6":
            return False
        before = graph.producer(node.inputs[0])
        merges = (
            before is not None
            and isinstance(before.op, Relu)
            and before.op.activation == "relu"
            and graph.only_consumer(before.output) is not None
        )
        if not merges:
            raise ValueError(f"layer '{node.name}': a minimum with 6 is supported right after a relu only; use relu6")
        return True

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Makes the relu a relu6 and drops the minimum."""
        graph.producer(node.inputs[0]).op = Relu("relu6")
        graph.bypass(node)


class FoldActivation:
    """A rectifier becomes the activation of the layer before it."""

    def match(self, graph: Graph, node: Node) -> bool:
        """A relu right after a linear layer that has no activation yet and that nobody else reads."""
        if not isinstance(node.op, Relu):
            return False
        layer = graph.producer(node.inputs[0])
        return (
            layer is not None
            and isinstance(layer.op, (Conv, Add, Product, AveragePool))
            and layer.op.activation == "linear"
            and graph.only_consumer(layer.output) is not None
        )

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Sets the activation and drops the rectifier."""
        layer = graph.producer(node.inputs[0])
        layer.op = replace(layer.op, activation=node.op.activation)
        graph.bypass(node)
