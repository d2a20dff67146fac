"""Transposed convolutions as convolutions whose channels are the pixels of a block."""

from __future__ import annotations

import numpy as np

from bstf_compiler.graph import (
    BiasAdd,
    Conv,
    ConvTranspose,
    DepthToSpace,
    FakeQuant,
    Graph,
    Multiply,
    Node,
    Relu,
    Tensor,
    Window,
)


class SubpixelConv:
    """A transposed convolution is a convolution at the input's resolution, one set of channels for each pixel of a
    block of strides x strides outputs, and these pixels put in their places (Shi et al. 2016, arXiv 1609.07009).

    Output row i * stride + k - before gets pixel i times kernel row k. Of the rows with (row + before) % stride == r
    those are the kernel rows k = r + t * stride, and of block q = (row + before) // stride they meet pixel q - t.
    """

    def match(self, graph: Graph, node: Node) -> bool:
        """Any transposed convolution."""
        return isinstance(node.op, ConvTranspose)

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Adds the convolution before the node, which becomes the movement of pixels."""
        kernel = graph.tensors[node.inputs[1]]
        _, height, width, _ = graph.tensors[node.inputs[0]].shape
        out = graph.tensors[node.output].shape[1:3]
        taps, pads, crops = [], [], []
        sizes = zip((height, width), out, kernel.shape, node.op.strides, node.op.before)
        for size, wanted, extent, stride, before in sizes:
            count = -(-extent // stride)
            first = before // stride  # blocks that are cut off whole
            blocks = -(-(before + wanted) // stride) - first
            taps.append(count)
            pads += [count - 1 - first, first + blocks - size]
            crops += [before - first * stride, (first + blocks) * stride - before - wanted]
        window = Window(tuple(taps), padding=tuple(pads))
        made = _by_phases(kernel.data, node.op.strides, tuple(taps))
        constant = graph.add_constant(f"{kernel.name} by phases", made, kernel.position)
        if node.op.strides == (1, 1):  # a block of one pixel
            node.op, node.inputs[1] = Conv(window), constant
            return
        name = f"{node.name}:convolution"
        graph.nodes.insert(graph.nodes.index(node), Node(name, Conv(window), [node.inputs[0], constant]))
        graph.tensors[name] = Tensor(name, (1, *window.output_size(height, width), made.shape[-1]))
        node.op, node.inputs = DepthToSpace(node.op.strides, tuple(crops)), [name]


def _by_phases(kernel: np.ndarray, strides: tuple[int, int], taps: tuple[int, int]) -> np.ndarray:
    """Kernel (kh, kw, cout, cin) as (taps, taps, cin, pixels of a block * cout), later taps first."""
    missing = [count * stride - size for count, stride, size in zip(taps, strides, kernel.shape)]
    whole = np.pad(kernel, [(0, missing[0]), (0, missing[1]), (0, 0), (0, 0)])
    cout, cin = kernel.shape[2:]
    apart = whole.reshape(taps[0], strides[0], taps[1], strides[1], cout, cin)[::-1, :, ::-1]
    return np.ascontiguousarray(apart.transpose(0, 2, 5, 1, 3, 4).reshape(*taps, cin, -1))


class SinkDepthToSpace:
    """Constants a channel, rectifiers and grids work on channels before they are put in their places as well as after:
    so they meet the convolution.
    """

    def match(self, graph: Graph, node: Node) -> bool:
        """Moved pixels that only one such operation reads."""
        reader = graph.only_consumer(node.output)
        if not isinstance(node.op, DepthToSpace) or node.op.block == (1, 1) or reader is None:
            return False
        if isinstance(reader.op, (BiasAdd, Multiply)):
            constant = graph.constants(reader)[0]
            return constant.data.size == 1 or constant.shape[-1] == constant.data.size
        return isinstance(reader.op, (Relu, FakeQuant))

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Swaps the two; a constant is repeated for every pixel of a block."""
        reader = graph.only_consumer(node.output)
        for place, constant in enumerate(graph.constants(reader), start=1):
            if constant.data.size > 1:
                rows, columns = node.op.block
                repeated = np.tile(constant.data.ravel(), rows * columns)
                reader.inputs[place] = graph.add_constant(f"{constant.name} by phases", repeated, constant.position)
        for later in graph.consumers(reader.output):
            later.inputs = [node.output if name == reader.output else name for name in later.inputs]
        graph.outputs = [node.output if name == reader.output else name for name in graph.outputs]
        reader.inputs[0], node.inputs = node.inputs[0], [reader.output]
        graph.tensors[node.output].shape = graph.tensors[reader.output].shape
        graph.tensors[reader.output].shape = graph.tensors[reader.inputs[0]].shape
        graph.nodes.remove(node)
        graph.nodes.insert(graph.nodes.index(reader) + 1, node)
