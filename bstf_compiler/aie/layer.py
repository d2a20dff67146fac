"""A node of the graph as the array sees it: images with channels in blocks of eight, windows, blocks kept."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from bstf_compiler import bsr
from bstf_compiler.graph import Add, AveragePool, Conv, Graph, MaxPool, Node, Op, Requantize, Softmax, Window

BLOCK = 8
"""Channels of a block, in and out: the native multiply of the cores is 4x8x8."""

ON_ARRAY = (Conv, Add, Requantize, MaxPool, AveragePool)


def blocks_of(channels: int) -> int:
    """Number of blocks that hold `channels` channels."""
    return -(-channels // BLOCK)


@dataclass(frozen=True)
class Layer:
    """What the back end needs to know of a node.

    Shapes are (rows, columns, channel blocks); `channels` are those before padding, in and out. `kept` (input blocks,
    output blocks): Γ as found in the weights, for a convolution; other operations work channel by channel.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    output: str
    input_shape: tuple[int, int, int]
    output_shape: tuple[int, int, int]
    channels: tuple[int, int]
    window: Window
    kept: np.ndarray | None

    @property
    def channelwise(self) -> bool:
        """Whether output channel i depends on input channel i alone."""
        return self.kept is None

    @property
    def taps(self) -> int:
        """Kernel positions."""
        return self.window.kernel[0] * self.window.kernel[1]

    def work(self, pixels: int, blocks: int) -> int:
        """What `pixels` output pixels cost a core: multiply-adds of `blocks` whole weight blocks a pixel and kernel
        position (the vector unit multiplies the padding of a ragged block too), or element operations on `blocks`
        blocks of channels.
        """
        if not self.channelwise:
            return pixels * self.taps * blocks * BLOCK * BLOCK
        return pixels * blocks * BLOCK * (self.taps if self.op.endswith("pool") else len(self.inputs))

    def macs(self, pixels: int, inputs: tuple[int, int], outputs: tuple[int, int]) -> int:
        """Effective multiply-adds of `pixels` output pixels: the true channels of the kept blocks between input blocks
        [start, stop) and output blocks [start, stop).
        """
        if self.channelwise:
            return 0
        sizes = [
            np.minimum(BLOCK, channels - BLOCK * np.arange(*span))
            for channels, span in zip(self.channels, (inputs, outputs))
        ]
        return pixels * self.taps * int(sizes[0] @ self.kept[slice(*inputs), slice(*outputs)] @ sizes[1])

    def input_rows(self, first: int, last: int) -> tuple[int, int, int]:
        """Input rows [start, stop) under output rows [first, last), and the rows of padding above them."""
        return _reach(first, last, 0, self.window, self.input_shape[0])

    def input_columns(self, first: int, last: int) -> tuple[int, int, int]:
        """Input columns [start, stop) under output columns [first, last), and the columns of padding before them."""
        return _reach(first, last, 1, self.window, self.input_shape[1])


def _reach(first: int, last: int, axis: int, window: Window, size: int) -> tuple[int, int, int]:
    stride, kernel, before = window.strides[axis], window.kernel[axis], window.padding[2 * axis]
    virtual = first * stride - before
    start = min(max(virtual, 0), size)
    stop = min(max((last - 1) * stride - before + kernel, start), size)
    return start, stop, start - virtual


def layers_of(graph: Graph) -> list[Layer]:
    """The layers that the array runs, in the graph's order.

    Raises:
        ValueError: if an operation can't run on the array, and it is not a host operation at the end.
    """
    layers = []
    for node in graph:
        if _runs_on_array(node):
            layers.append(_layer(graph, node))
        elif not isinstance(node.op, Softmax) or not _ends_network(graph, node):
            raise ValueError(
                f"layer '{node.name}': {_named(node.op)} can't run on the array; end the network before it, or run "
                "the float network on the CPU"
            )
    return layers


def _runs_on_array(node: Node | None) -> bool:
    if node is None or not isinstance(node.op, ON_ARRAY):
        return False
    window = getattr(node.op, "window", Window((1, 1)))
    return window.dilation == (1, 1) and getattr(node.op, "groups", 1) == 1


def _ends_network(graph: Graph, node: Node) -> bool:
    return node.output in graph.outputs and _runs_on_array(graph.producer(node.inputs[0]))


def _named(op: Op) -> str:
    """What an operation that the array can't run is, for a sentence."""
    if getattr(op, "groups", 1) != 1:
        return f"a convolution in {op.groups} groups"
    if isinstance(op, Conv):
        return "a dilated convolution"
    return f"operation '{op.kind}'"


def _layer(graph: Graph, node: Node) -> Layer:
    window = getattr(node.op, "window", Window((1, 1)))
    images = [tensor.name for tensor in graph.activations(node)]
    channels = (graph.tensors[images[0]].shape[-1], graph.tensors[node.output].shape[-1])
    kept = None
    if isinstance(node.op, Conv):
        kept = bsr.nonzero_blocks(graph.tensors[node.inputs[1]].data, (BLOCK, BLOCK))
    return Layer(
        node.name, node.op.kind, tuple(images), node.output, _shape(graph, images[0]), _shape(graph, node.output),
        channels, window, kept,
    )  # fmt: skip


def _shape(graph: Graph, tensor: str) -> tuple[int, int, int]:
    _, rows, columns, channels = graph.tensors[tensor].shape
    return rows, columns, blocks_of(channels)


def share(total: int, parts: int) -> list[tuple[int, int]]:
    """`total` things cut into `parts` runs whose sizes differ by one at most, larger first: [(start, stop), ...]."""
    size, larger = divmod(total, parts)
    bounds = [part * size + min(part, larger) for part in range(parts + 1)]
    return list(pairwise(bounds))
