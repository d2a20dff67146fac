"""Sums and shifts of a fixed-point graph must fit the 32-bit registers of the back ends."""

from __future__ import annotations

import numpy as np

from bstf_compiler import integer
from bstf_compiler.graph import Add, AveragePool, Concat, Conv, Graph, Node, Product, Requantize, Resize

_LIMIT = 2**31
_SUMS = (Conv, Add, AveragePool, Concat, Product, Requantize, Resize)


def check_sums(graph: Graph) -> None:
    """Raises ValueError, with the layer's name, where a sum or its requantisation could leave int32."""
    for node in graph:
        gridded = all(t.position is not None for t in [*graph.activations(node), graph.tensors[node.output]])
        if not gridded or not isinstance(node.op, _SUMS):
            continue
        for largest, shift in _sums(graph, node):
            if shift > 31 or largest * 2 ** max(0, -shift) + 2 ** max(0, shift - 1) >= _LIMIT:
                raise ValueError(
                    f"layer '{node.name}': its sums can reach {largest} and are shifted by {shift} bits, beyond 32-bit "
                    "registers; choose closer positions of its inputs, constants and output"
                )


def _sums(graph: Graph, node: Node) -> list[tuple[int, int]]:
    """Largest magnitude of each kind of a node's sums, and the bits that requantisation cuts (negative: adds)."""
    positions = [tensor.position for tensor in graph.activations(node)]
    out = graph.tensors[node.output].position
    if isinstance(node.op, Conv):
        kernel, bias = (graph.tensors[name].data.astype(np.int64) for name in node.inputs[1:])
        sums = np.abs(kernel).sum(axis=(0, 1, 2)) * 128 + (np.abs(bias) << integer.shift_bias(graph, node))
        return [(int(sums.max()), integer.shift_cut(graph, node))]
    if isinstance(node.op, AveragePool):
        kh, kw = node.op.window.kernel
        numerators = graph.constants(node)[0].data
        return [(128 * kh * kw * int(np.abs(numerators.astype(np.int64)).max()), node.op.shift + positions[0] - out)]
    if isinstance(node.op, Concat):
        return [(128, position - out) for position in positions]
    if isinstance(node.op, Product):
        return [(128 * 128, sum(positions) - out)]
    if isinstance(node.op, Resize):
        units = 1 if node.op.method == "nearest" else 4 * node.op.factors[0] * node.op.factors[1]
        return [(128 * units, units.bit_length() - 1 + positions[0] - out)]
    finest = max(positions)
    return [(sum(128 * 2 ** (finest - position) for position in positions), finest - out)]
