"""Inner products as 1x1 convolutions."""

from __future__ import annotations

from bstf_compiler.graph import Conv, Graph, MatMul, Node, Window


class DenseToConv:
    """x (1, cin) times a matrix (cin, cout) is a 1x1 convolution of a one-pixel image."""

    def match(self, graph: Graph, node: Node) -> bool:
        """Any inner product."""
        return isinstance(node.op, MatMul)

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Turns the matrix into a 1x1 kernel."""
        matrix = graph.tensors[node.inputs[1]]
        node.inputs[1] = graph.add_constant(f"{node.name} kernel", matrix.data[None, None], matrix.position)
        node.op = Conv(Window((1, 1)))
