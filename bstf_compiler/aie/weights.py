"""The packed tensor: weights, bias, Γ indices and parameters of a layer, cut into the chunks that cores read.

A chunk of a convolution, for the output blocks of a piece (the computation that reads it names them) and some input
blocks, little endian, each part padded to 16 bytes:

    int32  shift, smallest, largest, output blocks     requantisation, then clamping
    int32  bias[8 * output blocks]                     already on the grid of the products
    uint16 count[output blocks], row[kept blocks]      kept blocks by output block: how many, which input block
    int8   block[kept blocks][kh][kw][8][8]            kept blocks only: input channel, then output channel
    int32  sum[6]                                      if a residual is added: the parameters of `add`

Groups of several channels are blocks along the diagonal of such a kernel. A depthwise convolution, where each output
channel reads one input channel, has a chunk of its own kind for some output blocks:

    int32  shift, smallest, largest, output channels from each input channel
    int32  bias[8 * output blocks]
    int8   kernel[kh][kw][8 * output blocks]

Other operations have one chunk of int32 parameters (see `parameters`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bstf_compiler import bsr, integer
from bstf_compiler.aie.layer import Layer
from bstf_compiler.aie.reach import BLOCK
from bstf_compiler.graph import (
    Add,
    AveragePool,
    Concat,
    Conv,
    DepthToSpace,
    Graph,
    Lookup,
    MaxPool,
    Node,
    Product,
    Requantize,
    Resize,
)

_ALIGN = 16
_HEADER_WORDS = 4
_SUM_WORDS = 6


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def chunk_bytes(layer: Layer, outputs: np.ndarray | int, kept: np.ndarray | int) -> np.ndarray | int:
    """Sizes of chunks with `outputs` output blocks and `kept` weight blocks."""
    head = 4 * (_HEADER_WORDS + BLOCK * outputs)
    if not layer.sums_channels:
        return head + _padded(layer.taps * BLOCK * outputs)
    tail = 0 if layer.residual is None else _padded(4 * _SUM_WORDS)
    return head + _padded(2 * (outputs + kept)) + kept * layer.taps * BLOCK * BLOCK + tail


def parameters(graph: Graph, node: Node, layer: Layer) -> bytes:
    """The chunk of an operation without weights: int32 words, and the table of a look-up.

    maxpool: value of a padded pixel. add: left shifts of the two inputs, 1 or -1 times the second, then shift,
    smallest, largest. product, requantize: shift, smallest, largest. averagepool: shift, smallest, largest, table rows,
    table columns, numerators by the window's valid rows and columns (a table of 1 x 1 serves every window).
    lookup: int8[256] from the value of -128 on. nearest, bilinear: shift, factors. depthtospace: channels out, block.
    concat: shift, first channel (of those copied), channels of each input.
    """
    data = _parameters(graph, node, layer)
    return data.ljust(_padded(len(data)), b"\0")


def _parameters(graph: Graph, node: Node, layer: Layer) -> bytes:
    op, out = node.op, graph.tensors[node.output]
    positions = [tensor.position for tensor in graph.activations(node)]
    shift = positions[0] - out.position
    if isinstance(op, Lookup):
        return graph.constants(node)[0].data.tobytes()
    if isinstance(op, MaxPool):
        words = [0 if op.zero_padding else integer.INT8_MIN]
    elif isinstance(op, DepthToSpace):
        words = [layer.channels[1], *op.block]
    elif isinstance(op, Resize):
        bits = sum((2 * factor).bit_length() - 1 for factor in op.factors) if op.method == "bilinear" else 0
        words = [shift + bits, *op.factors]
    elif isinstance(op, Concat):
        words = []
        for source in layer.sources:
            words += [graph.tensors[source.tensor].position - out.position, source.offset, source.channels]
    else:
        bounds = integer.activation_bounds(op.activation, out.position)
        if isinstance(op, AveragePool):
            words = [op.shift + shift, *bounds, *_numerators(graph, node)]
        elif isinstance(op, Add):
            words = _sum_words(graph, node, node.inputs)
        elif isinstance(op, Product):
            words = [sum(positions) - out.position, *bounds]
        else:
            assert isinstance(op, Requantize)
            words = [shift, *bounds]
    return np.array(words, "<i4").tobytes()


def _sum_words(graph: Graph, node: Node, operands: Sequence[str]) -> list[int]:
    """The parameters of a sum or difference whose operands come in this order."""
    out = graph.tensors[node.output].position
    one, two = (graph.tensors[name].position for name in operands)
    finest = max(one, two)
    sign = -1 if node.op.subtract else 1
    return [finest - one, finest - two, sign, finest - out, *integer.activation_bounds(node.op.activation, out)]


def _numerators(graph: Graph, node: Node) -> list[int]:
    """The averaging factors by how much of the window lies inside the image."""
    numerators, window = graph.tensors[node.inputs[1]].data, node.op.window
    if (numerators == numerators.flat[0]).all():
        return [1, 1, int(numerators.flat[0])]
    _, height, width, _ = graph.tensors[node.inputs[0]].shape
    valid = []
    for axis, size in enumerate((height, width)):
        starts = np.arange(numerators.shape[axis]) * window.strides[axis] - window.padding[2 * axis]
        taps = starts[:, None] + np.arange(window.kernel[axis]) * window.dilation[axis]
        valid.append(((taps >= 0) & (taps < size)).sum(axis=1))
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
        node = graph.producer(layer.summed or layer.output)
        assert isinstance(node.op, Conv)
        self._sum = b""
        if layer.residual is not None:
            words = _sum_words(graph, graph.producer(layer.output), (layer.summed, layer.residual.tensor))
            self._sum = np.array(words, "<i4").tobytes().ljust(_padded(4 * _SUM_WORDS), b"\0")
        kernel, bias = (graph.tensors[name].data for name in node.inputs[1:])
        self._depthwise, self._spread = not layer.sums_channels, layer.sources[0].spread
        self._kernel = bsr.ungrouped(kernel, 1 if self._depthwise else node.op.groups)
        self._bias = np.zeros(BLOCK * layer.output_shape[2], "<i4")
        self._bias[: bias.size] = bias.astype(np.int32) << integer.shift_bias(graph, node)
        bounds = integer.activation_bounds(node.op.activation, graph.tensors[node.output].position)
        self._requantisation = (integer.shift_cut(graph, node), *bounds)

    def chunk(self, outputs: Sequence[int], inputs: tuple[int, int]) -> bytes:
        """The chunk of some output blocks, ascending, and input blocks [start, stop); rows count from the first one."""
        channels = (np.array(outputs)[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        bias = self._bias[channels].tobytes()
        channels = channels[channels < self._kernel.shape[-1]]  # the last block may be ragged
        if self._depthwise:
            part = self._kernel[:, :, 0, channels]
            part = np.pad(part, ((0, 0), (0, 0), (0, BLOCK * len(outputs) - part.shape[-1])))
            values = part.tobytes()
            return self._head(self._spread) + bias + values.ljust(_padded(len(values)), b"\0")
        kernel = self._kernel[:, :, inputs[0] * BLOCK : inputs[1] * BLOCK]
        packed = bsr.pack(kernel[..., channels], (BLOCK, BLOCK))
        index = np.concatenate([np.diff(packed.starts), packed.rows]).astype("<u2").tobytes()
        head = self._head(len(outputs))
        return head + bias + index.ljust(_padded(len(index)), b"\0") + packed.blocks.tobytes() + self._sum

    def _head(self, last: int) -> bytes:
        return np.array([*self._requantisation, last], "<i4").tobytes()
