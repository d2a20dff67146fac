"""Reshapes: away where they move nothing, into a convolution where they flatten an image for an inner product."""

from __future__ import annotations

import numpy as np

from bstf_compiler.graph import Conv, FakeQuant, Graph, MatMul, Node, Relu, Reshape, Transpose, Window

_ELEMENTWISE = (FakeQuant, Relu)


class RemoveReshape:
    """Flattening keeps the order of values (channels fastest), so a reader can take the image as it is.

    After this every activation has four axes; shapes that the network returns are kept by the graph.
    """

    def match(self, graph: Graph, node: Node) -> bool:
        """Any reshape, and any node whose output is still a vector."""
        return isinstance(node.op, Reshape) or len(graph.tensors[node.output].shape) == 2

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Drops the reshape; an inner product of a flattened image becomes a convolution of the image's size."""
        source = graph.activations(node)[0]
        if len(source.shape) == 2:  # the network's input is a vector
            source.shape = (1, 1, 1, source.shape[1])
        if not isinstance(node.op, Reshape):
            target = graph.tensors[node.output]
            target.shape = (1, 1, 1, target.shape[1])
            return
        readers = graph.consumers(node.output)
        target = graph.tensors[node.output].shape
        one_pixel = source.shape[1:3] == (1, 1) and (len(target) == 2 or target[1:3] == (1, 1))
        if one_pixel or source.shape == target or not readers:
            graph.bypass(node)
            return
        if len(readers) == 1 and isinstance(readers[0].op, _ELEMENTWISE):
            self._sink(graph, node, readers[0])
            return
        if len(target) == 4 or node.output in graph.outputs or any(not isinstance(r.op, MatMul) for r in readers):
            raise ValueError(
                f"layer '{node.name}': a reshape from {source.shape[1:]} to {target[1:]} is supported only right "
                "before a dense layer or at the end of the network; use global pooling or move the flatten"
            )
        height, width, channels = source.shape[1:]
        for reader in readers:
            matrix = graph.tensors[reader.inputs[1]]
            kernel = matrix.data.reshape(height, width, channels, -1)
            reader.inputs[1] = graph.add_constant(f"{reader.name} kernel", kernel, matrix.position)
            reader.op = Conv(Window((height, width)))
        graph.bypass(node)

    def _sink(self, graph: Graph, node: Node, reader: Node) -> None:
        """Swaps the reshape with the element-wise node after it."""
        for later in graph.consumers(reader.output):
            later.inputs = [node.output if name == reader.output else name for name in later.inputs]
        graph.outputs = [node.output if name == reader.output else name for name in graph.outputs]
        reader.inputs, node.inputs = node.inputs, [reader.output]
        before, after = graph.tensors[reader.inputs[0]].shape, graph.tensors[reader.output].shape
        graph.tensors[reader.output].shape, graph.tensors[node.output].shape = before, after
        graph.nodes.remove(node)
        graph.nodes.insert(graph.nodes.index(reader) + 1, node)


class FoldTranspose:
    """Axes moved before an image is flattened for inner products: their matrices take the values where they were."""

    def match(self, graph: Graph, node: Node) -> bool:
        """A transposition that only a flattening reads, which only inner products read."""
        if not isinstance(node.op, Transpose):
            return False
        flat = graph.only_consumer(node.output)
        if flat is None or not isinstance(flat.op, Reshape) or len(graph.tensors[flat.output].shape) != 2:
            return False
        readers = graph.consumers(flat.output)
        return flat.output not in graph.outputs and all(isinstance(reader.op, MatMul) for reader in readers)

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Moves the matrices' rows, and drops the transposition."""
        shape = graph.activations(node)[0].shape
        places = np.arange(np.prod(shape)).reshape(shape).transpose(node.op.axes).ravel()
        for reader in graph.consumers(graph.consumers(node.output)[0].output):
            matrix = graph.tensors[reader.inputs[1]]
            moved = np.empty_like(matrix.data)
            moved[places] = matrix.data
            reader.inputs[1] = graph.add_constant(f"{matrix.name} moved", moved, matrix.position)
        graph.bypass(node)
