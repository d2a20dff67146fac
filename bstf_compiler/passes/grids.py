"""Fixed-point grids: from FakeQuant operations to positions of tensors and integers in constants."""

from __future__ import annotations

import numpy as np

from bstf_compiler.graph import (
    Add,
    AveragePool,
    Concat,
    Conv,
    DepthToSpace,
    FakeQuant,
    Gather,
    Graph,
    Lookup,
    MaxPool,
    Node,
    Product,
    Relu,
    Requantize,
    Resize,
    Tensor,
)

_ROUNDED = (Conv, Add, Product, Gather, AveragePool, Concat, Resize)
_MOVED = (MaxPool, Relu, Concat, Resize, DepthToSpace)


class AbsorbGrid:
    """FakeQuant at the end of a layer, or on the input, becomes the position of that tensor."""

    def match(self, graph: Graph, node: Node) -> bool:
        """Any FakeQuant of an activation."""
        return isinstance(node.op, FakeQuant)

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Sets the position, or requantises a tensor that already has one (or has other readers)."""
        source, layer = graph.tensors[node.inputs[0]], graph.producer(node.inputs[0])
        takes_grid = layer is None or isinstance(layer.op, _ROUNDED)
        readers = graph.consumers(source.name)
        agree = all(reader.op == node.op for reader in readers) and source.name not in graph.outputs
        if takes_grid and source.position is None and agree:
            source.position = node.op.position
            for reader in readers:
                graph.bypass(reader)
        elif isinstance(layer.op if layer else None, Relu) and graph.only_consumer(source.name) is not None:
            layer.op = Requantize(layer.op.activation)
            source.position = node.op.position
            graph.bypass(node)
        else:
            graph.tensors[node.output].position = node.op.position
            node.op = Requantize()


class KeepGrid:
    """A maximum, a rectifier that stands alone, a concatenation and moved pixels keep the grid of their inputs; a
    requantisation to the same grid is nothing.
    """

    def match(self, graph: Graph, node: Node) -> bool:
        """One of these without a grid whose inputs have one, or an idle requantisation."""
        if isinstance(node.op, _MOVED):
            gridded = all(tensor.position is not None for tensor in graph.activations(node))
            return gridded and graph.tensors[node.output].position is None
        return node.op == Requantize() and graph.tensors[node.output].position == _position(graph, node)

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Copies the position, or drops the node."""
        position = _position(graph, node)
        if isinstance(node.op, Requantize):
            graph.bypass(node)
            return
        if isinstance(node.op, Concat):
            self._require_one_grid(graph, node)
        if isinstance(node.op, Resize) and node.op.method != "nearest":
            raise ValueError(f"layer '{node.name}': it interpolates and has no grid; put a FakeQuant after it")
        graph.tensors[node.output].position = position
        if isinstance(node.op, Relu):
            if node.op.activation == "relu6" and position < -1:
                raise ValueError(
                    f"layer '{node.name}': 6 is no point of the grid of position {position} that its input has; "
                    "put a FakeQuant after it"
                )
            node.op = Requantize(node.op.activation)

    def _require_one_grid(self, graph: Graph, node: Node) -> None:
        positions = sorted({tensor.position for tensor in graph.activations(node)})
        if len(positions) > 1:
            raise ValueError(
                f"layer '{node.name}': it joins channels of positions {', '.join(map(str, positions))} and has no grid "
                "of its own; put a FakeQuant after it"
            )


class FormLookup:
    """A table indexed by the integers of a tensor's grid becomes one of integers on its own grid."""

    def match(self, graph: Graph, node: Node) -> bool:
        """Any such table whose result has a grid."""
        return isinstance(node.op, Gather) and graph.tensors[node.output].position is not None

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Replaces the table."""
        if _position(graph, node) != node.op.position:
            raise ValueError(
                f"layer '{node.name}': its table is for position {node.op.position}, its input has "
                f"{_position(graph, node)}; export the network again"
            )
        table = graph.tensors[node.inputs[1]]
        gridded = Tensor(table.name, table.shape, table.dtype, graph.tensors[node.output].position, table.data)
        integers = _integers(node, gridded)
        node.inputs[1] = graph.add_constant(f"{table.name} int8", integers, gridded.position)
        node.op = Lookup()


class IntegerConstants:
    """Kernels and biases of fixed-point convolutions become int8 integers; a missing bias becomes zeros."""

    def match(self, graph: Graph, node: Node) -> bool:
        """A convolution with gridded input, kernel and output whose constants are still float."""
        if not isinstance(node.op, Conv):
            return False
        kernel = graph.tensors[node.inputs[1]]
        gridded = _position(graph, node) is not None and graph.tensors[node.output].position is not None
        return gridded and kernel.position is not None and kernel.data.dtype != np.int8

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Replaces the constants."""
        kernel = graph.tensors[node.inputs[1]]
        products = kernel.position + _position(graph, node)
        if len(node.inputs) == 2:
            zeros = np.zeros(kernel.shape[-1], np.float32)
            node.inputs.append(graph.add_constant(f"{node.name} bias", zeros, products))
        bias = graph.tensors[node.inputs[2]]
        for index, tensor in ((1, kernel), (2, bias)):
            name = graph.add_constant(f"{tensor.name} int8", _integers(node, tensor), tensor.position)
            node.inputs[index] = name
        shift = products - bias.position
        if not 0 <= shift <= 24:
            raise ValueError(
                f"layer '{node.name}': its bias has position {bias.position}, which is {shift} bits below the "
                f"products' {products}; 0 to 24 are supported: quantise with bstf.quantize"
            )


def _integers(node: Node, tensor: Tensor) -> np.ndarray:
    if tensor.position is None:
        raise ValueError(f"layer '{node.name}': its bias has no grid though its kernel has; quantise both")
    scaled = np.ldexp(tensor.data.astype(np.float64), tensor.position)
    integers = np.clip(np.rint(scaled), -128, 127)
    if not np.array_equal(scaled, integers):
        raise ValueError(
            f"layer '{node.name}': constant '{tensor.name}' is not on its grid of position {tensor.position}; "
            "export the network again"
        )
    return integers.astype(np.int8)


def _position(graph: Graph, node: Node) -> int | None:
    return graph.tensors[node.inputs[0]].position
