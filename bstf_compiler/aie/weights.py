"""The packed tensor: weights, bias, Γ indices and parameters of a layer, cut into the chunks that cores read.

A chunk of a convolution, for some output blocks and some input blocks, little endian, each part padded to 16 bytes:

    int32  shift, smallest, largest, output blocks     requantisation, then clamping
    int32  bias[8 * output blocks]                     already on the grid of the products
    uint16 count[output blocks], row[kept blocks]      kept blocks by output block: how many, which input block
    int8   block[kept blocks][kh][kw][8][8]            kept blocks only: input channel, then output channel

Other operations have one chunk of int32 parameters (see `parameters`).
"""

from __future__ import annotations

import numpy as np

from bstf_compiler import bsr, integer
from bstf_compiler.aie.layer import BLOCK, Layer
from bstf_compiler.graph import AveragePool, Conv, Graph, MaxPool, Node

_ALIGN = 16
_HEADER_WORDS = 4


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def chunk_bytes(outputs: int, kept: int, taps: int) -> int:
    """Size of a chunk with `outputs` output blocks and `kept` weight blocks of `taps` kernel positions."""
    index = _padded(2 * (outputs + kept))
    return 4 * (_HEADER_WORDS + BLOCK * outputs) + index + kept * taps * BLOCK * BLOCK


def parameters(graph: Graph, node: Node) -> bytes:
    """The chunk of an operation without weights, int32 words.

    maxpool: value of a padded pixel. add: left shifts of the two inputs, then shift, smallest, largest.
    requantize: shift, smallest, largest. averagepool: shift, smallest, largest, table rows, table columns, numerators
    by the window's valid rows and columns (a table of 1 x 1 serves every window).
    """
    op, out = node.op, graph.tensors[node.output]
    positions = [tensor.position for tensor in graph.activations(node)]
    if isinstance(op, MaxPool):
        words = [0 if op.zero_padding else integer.INT8_MIN]
    else:
        bounds = integer.activation_bounds(op.activation, out.position)
        if isinstance(op, AveragePool):
            words = [op.shift + positions[0] - out.position, *bounds, *_numerators(graph, node)]
        elif len(positions) == 2:
            finest = max(positions)
            words = [finest - positions[0], finest - positions[1], finest - out.position, *bounds]
        else:
            words = [positions[0] - out.position, *bounds]
    data = np.array(words, "<i4").tobytes()
    return data.ljust(_padded(len(data)), b"\0")


def _numerators(graph: Graph, node: Node) -> list[int]:
    """The averaging factors by how much of the window lies inside the image."""
    numerators, window = graph.tensors[node.inputs[1]].data, node.op.window
    if (numerators == numerators.flat[0]).all():
        return [1, 1, int(numerators.flat[0])]
    _, height, width, _ = graph.tensors[node.inputs[0]].shape
    valid = []
    for axis, size in enumerate((height, width)):
        starts = np.arange(numerators.shape[axis]) * window.strides[axis] - window.padding[2 * axis]
        valid.append(np.maximum(np.minimum(starts + window.kernel[axis], size) - np.maximum(starts, 0), 0))
    rows, columns = valid[0][:, None], valid[1][None, :]
    inside = (rows > 0) & (columns > 0)  # a window in the padding sums nothing, whatever its factor
    table = np.zeros((window.kernel[0] + 1, window.kernel[1] + 1), np.int64)
    table[rows, columns] = numerators
    if not np.array_equal(table[rows, columns][inside], numerators[inside]):
        raise ValueError(
            f"layer '{node.name}': its averaging factors depend on more than how many pixels lie inside the image; "
            "quantise with bstf.quantize"
        )
    return [*window.kernel, *table[1:, 1:].ravel().tolist()]


class Packer:
    """Packs chunks of one convolution."""

    def __init__(self, graph: Graph, layer: Layer) -> None:
        node = graph.producer(layer.output)
        assert isinstance(node.op, Conv)
        kernel, bias = (graph.tensors[name].data for name in node.inputs[1:])
        self._kernel = kernel
        self._bias = np.zeros(BLOCK * layer.output_shape[2], "<i4")
        self._bias[: bias.size] = bias.astype(np.int32) << integer.shift_bias(graph, node)
        bounds = integer.activation_bounds(node.op.activation, graph.tensors[node.output].position)
        self._requantisation = (integer.shift_cut(graph, node), *bounds)

    def chunk(self, outputs: tuple[int, int], inputs: tuple[int, int]) -> bytes:
        """The chunk of output blocks [start, stop) and input blocks [start, stop); rows count from the first input."""
        part = self._kernel[..., inputs[0] * BLOCK : inputs[1] * BLOCK, outputs[0] * BLOCK : outputs[1] * BLOCK]
        packed = bsr.pack(part, (BLOCK, BLOCK))
        head = np.array([*self._requantisation, outputs[1] - outputs[0]], "<i4").tobytes()
        bias = self._bias[outputs[0] * BLOCK : outputs[1] * BLOCK].tobytes()
        index = np.concatenate([np.diff(packed.starts), packed.rows]).astype("<u2").tobytes()
        return head + bias + index.ljust(_padded(len(index)), b"\0") + packed.blocks.tobytes()
