"""A node of the graph as the array sees it: what it reads, channels in blocks of eight, blocks kept."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from bstf_compiler import bsr
from bstf_compiler.aie.joining import Slice, copies, slices
from bstf_compiler.aie.reach import BLOCK, Scaled, Sliding, Source, blocks_of
from bstf_compiler.graph import (
    Add,
    Affine,
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
    Softmax,
    Window,
)

ON_ARRAY = (Conv, Add, Product, Requantize, Lookup, MaxPool, AveragePool, Concat, Resize, DepthToSpace)

_PIXEL = Window((1, 1))
_ELEMENT_OPERATIONS = {"add": 2, "product": 2, "bilinear": 4, "lookup": 16}
"""Element operations a value, where it isn't one or the window's size; of look-ups a core does four a cycle, so one
takes the time of sixteen others (aie::lut with four parallel accesses, AMD UG1603, lookup tables).
"""


@dataclass(frozen=True)
class Layer:
    """What the back end needs to know of a node.

    `output_shape` is (rows, columns, channel blocks) of the output, `channels` are those of the first
    input and the output before padding. `kept` (input blocks, output blocks): Γ as found in the weights of a
    convolution, whose `groups` are then the blocks along a diagonal; None for what works channel by channel. `filled`:
    runs (first block, blocks) of the output that the layer computes, None for all. `part_of`: the larger
    tensor that the output is a part of. `summed`: the result of the convolution alone, where the second source is added
    to it before it is written; no memory ever holds it.
    """

    name: str
    op: str
    sources: tuple[Source, ...]
    output: str
    output_shape: tuple[int, int, int]
    channels: tuple[int, int]
    window: Window = _PIXEL
    kept: np.ndarray | None = None
    groups: int = 1
    filled: tuple[tuple[int, int], ...] | None = None
    part_of: Slice | None = None
    summed: str | None = None

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Runs of output blocks that the layer computes: (first, blocks)."""
        return ((0, self.output_shape[2]),) if self.filled is None else self.filled

    @property
    def blocks(self) -> int:
        """Output blocks that the layer computes."""
        return sum(blocks for _, blocks in self.runs)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensors that the layer reads."""
        return tuple(source.tensor for source in self.sources)

    @property
    def has_weights(self) -> bool:
        """Whether each output block has weights of its own."""
        return self.op in ("conv", "depthwise")

    @property
    def grain(self) -> int:
        """Tiles of so many output rows, or a multiple, all lie in the same way over the input's rows."""
        rows = self.sources[0].rows
        return rows.factor if isinstance(rows, Scaled) else 1

    @property
    def sums_channels(self) -> bool:
        """Whether an output channel sums over input channels, block by block."""
        return self.kept is not None

    @property
    def taps(self) -> int:
        """Kernel positions."""
        return self.window.kernel[0] * self.window.kernel[1]

    def weight_blocks(self, inputs: tuple[int, int], outputs: Sequence[int]) -> int:
        """Weight blocks between input blocks [start, stop) and some output blocks; those of other operations are the
        output blocks.
        """
        if self.sums_channels:
            return int(self.kept[slice(*inputs), outputs].sum())
        return len(outputs)

    def needed(self, inputs: tuple[int, int], outputs: Sequence[int]) -> tuple[int, int]:
        """The input blocks [start, stop), of those given, from the first to the last that is kept for some output
        blocks.
        """
        used = np.flatnonzero(self.kept[slice(*inputs), outputs].any(axis=1))
        return (inputs[0] + int(used[0]), inputs[0] + int(used[-1]) + 1) if used.size else (inputs[0], inputs[0])

    @property
    def residual(self) -> Source | None:
        """What is added to a convolution's result, once for all input channels."""
        return self.sources[1] if self.summed is not None else None

    def added(self, pixels: int, blocks: int) -> int:
        """Element operations of adding the residual to `pixels` output pixels of `blocks` blocks."""
        return 0 if self.summed is None else pixels * blocks * BLOCK * _ELEMENT_OPERATIONS["add"]

    def work(self, pixels: int, blocks: int) -> int:
        """What `pixels` output pixels cost a core: multiply-adds of `blocks` whole weight blocks a pixel and kernel
        position (the vector unit multiplies the padding of a ragged block too), or element operations on `blocks`
        blocks of channels.
        """
        if self.sums_channels:
            return pixels * self.taps * blocks * BLOCK * BLOCK
        return pixels * blocks * BLOCK * _ELEMENT_OPERATIONS.get(self.op, self.taps)

    def macs(self, pixels: int, inputs: tuple[int, int], outputs: Sequence[int]) -> int:
        """Effective multiply-adds of `pixels` output pixels: those of a depthwise convolution, or of the kept blocks
        between input blocks [start, stop) and some output blocks with their true channels and groups.
        """
        if self.op == "depthwise":
            return pixels * self.taps * sum(min(BLOCK, self.channels[1] - BLOCK * block) for block in outputs)
        if not self.sums_channels:
            return 0
        return pixels * self.taps * int(self._multiplies[slice(*inputs), outputs].sum())

    @cached_property
    def kept_from(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is kept of each output block, by an input block from 0 to all of them and the output block: how many
        input blocks before it, the first one from it on (their number if none), and the last one before it (-1).
        """
        depth, edge = len(self.kept), np.zeros_like(self.kept[:1], np.int64)
        number = np.arange(depth)[:, None]
        before = np.concatenate([edge, np.cumsum(self.kept, axis=0)])
        first = np.concatenate([np.where(self.kept, number, depth), edge + depth])
        last = np.concatenate([edge - 1, np.where(self.kept, number, -1)])
        return before, np.minimum.accumulate(first[::-1])[::-1], np.maximum.accumulate(last)

    @cached_property
    def _multiplies(self) -> np.ndarray:
        """Multiply-adds a pixel and kernel position, by input and output block."""
        ins, outs = (_overlaps(channels, self.groups) for channels in self.channels)
        return self.kept * (ins @ outs.T)


def _overlaps(channels: int, groups: int) -> np.ndarray:
    """How many channels a block and a group have in common: (blocks, groups)."""
    group = np.arange(channels) // (channels // groups)
    counts = np.zeros((blocks_of(channels), groups), np.int64)
    np.add.at(counts, (np.arange(channels) // BLOCK, group), 1)
    return counts


class DoesNotFit(ValueError):
    """A layer has no room in a core or in a memory tile."""

    def __init__(self, layer: Layer, sentence: str) -> None:
        super().__init__(f"layer '{layer.name}': {sentence}")
        self.layer = layer


def layers_of(graph: Graph, apart: Container[str] = ()) -> list[Layer]:
    """The layers that the array runs, in the graph's order; sums end the convolutions before them, but for those of
    the tensors `apart`.

    Raises:
        ValueError: if an operation can't run on the array, and it is not a host operation at an end.
    """
    layers, outputs = [], outputs_of(graph)
    parts, summed = slices(graph, outputs), _summed_convolutions(graph, outputs)
    summed = {name: own for name, own in summed.items() if name not in apart}
    for node in graph:
        if node.output in summed.values():
            continue
        if isinstance(node.op, ON_ARRAY):
            if isinstance(node.op, Concat):
                layer = _joining(graph, node, parts)
            elif node.output in summed:
                layer = _residual_convolution(graph, node, graph.producer(summed[node.output]))
            else:
                layer = _layer(graph, node)
            layers.append(replace(layer, part_of=parts.get(node.output)))
        elif not (_begins_network(graph, node) or _ends_network(graph, node)):
            raise ValueError(
                f"layer '{node.name}': operation '{node.op.kind}' can't run on the array; end the network before it, "
                "or run the float network on the CPU"
            )
    return layers


def inputs_of(graph: Graph) -> list[str]:
    """The tensors that the host gives to the array: the network's inputs, or what the host makes of them first."""
    made = [node.output for node in graph if isinstance(node.op, Affine)]
    read = (name for name in graph.inputs if graph.consumers(name))
    return [*(name for name in read if graph.tensors[name].position is not None), *made]


def outputs_of(graph: Graph) -> list[str]:
    """For each output of the network the tensor that the array computes: the input of a host operation, or itself.

    Raises:
        ValueError: an output is an input that no layer reads.
    """
    names = []
    for name in graph.outputs:
        if name in graph.inputs and not graph.consumers(name):
            raise ValueError(f"output '{name}' is an input that no layer reads; end the network at layers")
        node = graph.producer(name)
        names.append(node.inputs[0] if node is not None and isinstance(node.op, Softmax) else name)
    return names


def _summed_convolutions(graph: Graph, outputs: list[str]) -> dict[str, str]:
    """Sums that a convolution can finish before it writes: the sum's tensor, and the convolution's own. Of two such
    convolutions the second operand's.
    """
    found: dict[str, str] = {}
    for node in graph:
        if not isinstance(node.op, Add) or len({graph.tensors[name].shape for name in node.inputs}) > 1:
            continue
        for name, other in (node.inputs, node.inputs[::-1]):
            maker = graph.producer(name)
            first = not node.op.subtract or name == node.inputs[0]
            unread = len(graph.consumers(name)) == 1 and name not in outputs
            sums = maker is not None and isinstance(maker.op, Conv) and not _is_depthwise(graph, maker)
            if first and unread and sums and other not in (name, maker.inputs[0]):
                found[node.output] = name
    return found


def _is_depthwise(graph: Graph, node: Node) -> bool:
    return node.op.groups == graph.tensors[node.inputs[0]].shape[-1] > 1


def _begins_network(graph: Graph, node: Node) -> bool:
    return isinstance(node.op, Affine) and node.inputs[0] in graph.inputs and bool(graph.consumers(node.output))


def _ends_network(graph: Graph, node: Node) -> bool:
    if not isinstance(node.op, Softmax) or node.output not in graph.outputs:
        return False
    before = graph.producer(node.inputs[0])
    return before is not None and isinstance(before.op, ON_ARRAY)


def _layer(graph: Graph, node: Node) -> Layer:
    op, (_, *size, channels) = node.op, graph.tensors[node.output].shape
    images = [(tensor.name, *tensor.shape[1:]) for tensor in graph.activations(node)]
    shape, pair = (*size, blocks_of(channels)), (images[0][3], channels)
    if isinstance(op, Resize):
        name, *sizes, channels = images[0]
        axes = [Scaled(size, factor, blends=op.method == "bilinear") for size, factor in zip(sizes, op.factors)]
        return Layer(node.name, op.method, (Source(name, *axes, channels),), node.output, shape, pair)
    if isinstance(op, DepthToSpace):
        name, *sizes, channels = images[0]
        axes = [Scaled(size, factor, crop) for size, factor, crop in zip(sizes, op.block, op.crop[::2])]
        source = Source(name, *axes, channels, every=op.block != (1, 1))
        return Layer(node.name, op.kind, (source,), node.output, shape, pair)
    if isinstance(op, Conv):
        return _convolution(graph, node, images[0], shape, pair)
    if isinstance(op, (MaxPool, AveragePool)):
        return Layer(node.name, op.kind, (_under(op.window, *images[0]),), node.output, shape, pair, op.window)
    sources = tuple(_same(*image) if list(image[1:3]) == size else _broadcast(*image) for image in images)
    return Layer(node.name, op.kind, sources, node.output, shape, pair)


def _joining(graph: Graph, node: Node, parts: dict[str, Slice]) -> Layer:
    """A concatenation of those parts that don't lie in their places already; perhaps of none."""
    _, *size, channels = graph.tensors[node.output].shape
    sources, runs = copies(graph, node, parts)
    shape = (*size, blocks_of(channels))
    return Layer(node.name, "concat", sources, node.output, shape, (channels, channels), filled=runs)


def _convolution(
    graph: Graph, node: Node, image: tuple[str, int, int, int], shape: tuple[int, int, int], channels: tuple[int, int]
) -> Layer:
    op, kernel = node.op, graph.tensors[node.inputs[1]].data
    if _is_depthwise(graph, node):
        source = _under(op.window, *image, spread=channels[1] // channels[0])
        return Layer(node.name, "depthwise", (source,), node.output, shape, channels, op.window)
    kept = bsr.nonzero_blocks(bsr.ungrouped(kernel, op.groups), (BLOCK, BLOCK))
    source = _under(op.window, *image, every=True)
    return Layer(node.name, "conv", (source,), node.output, shape, channels, op.window, kept, op.groups)


def _residual_convolution(graph: Graph, node: Node, convolution: Node) -> Layer:
    """A convolution and the sum `node` that it ends in."""
    layer = _layer(graph, convolution)
    other = next(name for name in node.inputs if name != convolution.output)
    source = _same(other, *graph.tensors[other].shape[1:])
    return replace(
        layer, name=node.name, sources=(*layer.sources, source), output=node.output, summed=convolution.output
    )


def _same(tensor: str, rows: int, columns: int, channels: int) -> Source:
    return Source(tensor, Sliding(rows), Sliding(columns), channels)


def _broadcast(tensor: str, rows: int, columns: int, channels: int) -> Source:
    return Source(tensor, Sliding(rows, stride=0), Sliding(columns, stride=0), channels)


def _under(
    window: Window, tensor: str, rows: int, columns: int, channels: int, spread: int = 1, every: bool = False
) -> Source:
    axes = [
        Sliding(size, window.strides[axis], window.extent[axis], window.padding[2 * axis])
        for axis, size in enumerate((rows, columns))
    ]
    return Source(tensor, *axes, channels, spread, every=every)


def cut_runs(runs: tuple[tuple[int, int], ...], start: int, stop: int) -> list[tuple[int, int, int]]:
    """Where those numbered [start, stop) of the blocks of all `runs` lie: (how many come before, first, blocks)."""
    found, before = [], 0
    for first, blocks in runs:
        low, high = max(start, before), min(stop, before + blocks)
        if low < high:
            found.append((low - start, first + low - before, high - low))
        before += blocks
    return found


def share(total: int, parts: int) -> list[tuple[int, int]]:
    """`total` things cut into `parts` runs whose sizes differ by one at most, larger first: [(start, stop), ...]."""
    size, larger = divmod(total, parts)
    bounds = [part * size + min(part, larger) for part in range(parts + 1)]
    return list(pairwise(bounds))
