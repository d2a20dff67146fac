"""A float graph as the operations of the CPU engine: residual sums in the convolution before them, weights packed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from bstf_compiler.cpu.kernels.conv import ConvWeights, pack
from bstf_compiler.cpu.kernels.network import CONV, ELEMENTWISE, LOAD, MAX_POOL, MEAN_POOL, SPLIT, ZERO_MAX_POOL
from bstf_compiler.cpu.simd import Isa
from bstf_compiler.graph import Add, Average, BiasAdd, Conv, Graph, MaxPool, Multiply, Node, Relu, Softmax, Window

_NAMES = {
    LOAD: "load", CONV: "conv", SPLIT: "split", ELEMENTWISE: "elementwise", MAX_POOL: "max pool",
    ZERO_MAX_POOL: "max pool", MEAN_POOL: "mean pool",
}  # fmt: skip
_PIXEL = Window((1, 1))
_BOUNDS = {"linear": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


@dataclass(frozen=True)
class Operation:
    """One step of the engine.

    Attributes:
        kind: of `bstf_compiler.cpu.kernels.network`.
        name: of the layer.
        inputs: names of the tensors it reads; the second one is added.
        output: name of the tensor that it writes.
        window: of convolutions, splits and pools.
        bounds: that it clamps its result to.
        weights: of a convolution.
        scale: a factor and a summand a channel, of an elementwise operation.
        macs: multiply-adds of the layer an image if all its weights were kept.
    """

    kind: int
    name: str
    inputs: tuple[str, ...]
    output: str
    window: Window = _PIXEL
    bounds: tuple[float, float] = _BOUNDS["linear"]
    weights: ConvWeights | None = None
    scale: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    macs: int = 0

    @property
    def kind_name(self) -> str:
        """What it does, for reports."""
        return _NAMES[self.kind]


def operations(graph: Graph, isa: Isa) -> list[Operation]:
    """The operations that compute what a lowered float graph does, up to its softmax.

    Raises:
        ValueError: the graph holds an operation that the engine doesn't know.
    """
    made = [Operation(LOAD, graph.input, (), graph.input)]
    for node in graph:
        if not isinstance(node.op, Softmax):
            made += _convolution(graph, node, isa) if isinstance(node.op, Conv) else [_other(graph, node)]
    return _fuse_sums(graph, made)


def _convolution(graph: Graph, node: Node, isa: Isa) -> list[Operation]:
    """A convolution, after a split of its input if it has strides."""
    if node.op.groups != 1 or node.op.window.dilation != (1, 1):
        what = "grouped" if node.op.groups != 1 else "dilated"
        raise ValueError(f"layer '{node.name}': the CPU engine has no {what} convolution; end the network before it")
    source, kernel, *bias = (graph.tensors[name] for name in node.inputs)
    height, width = graph.tensors[node.output].shape[1:3]
    weights = pack(kernel.data, bias[0].data if bias else None, isa)
    made, source_name = [], source.name
    if node.op.window.strides != (1, 1):
        source_name = f"{node.name} split"
        made = [Operation(SPLIT, node.name, (source.name,), source_name, node.op.window)]
    bounds = _BOUNDS[node.op.activation]
    macs = kernel.data.size * height * width
    layer = Operation(CONV, node.name, (source_name,), node.output, node.op.window, bounds, weights, macs=macs)
    return [*made, layer]


def _other(graph: Graph, node: Node) -> Operation:
    """An operation without weights."""
    op, inputs = node.op, tuple(tensor.name for tensor in graph.activations(node))
    if isinstance(op, Add):
        return Operation(ELEMENTWISE, node.name, inputs, node.output, bounds=_BOUNDS[op.activation])
    if isinstance(op, Relu) and op.activation in _BOUNDS:
        return Operation(ELEMENTWISE, node.name, inputs, node.output, bounds=_BOUNDS[op.activation])
    if isinstance(op, MaxPool):
        kind = ZERO_MAX_POOL if op.zero_padding else MAX_POOL
        return Operation(kind, node.name, inputs, node.output, op.window)
    if isinstance(op, Average):
        return Operation(MEAN_POOL, node.name, inputs, node.output, op.window)
    if isinstance(op, (BiasAdd, Multiply)):
        channels = graph.tensors[node.output].shape[-1]
        constant = graph.constants(node)[0].data
        if constant.size in (1, channels):
            values = tuple(np.broadcast_to(constant.ravel(), channels).tolist())
            ones, zeros = (1.0,) * channels, (0.0,) * channels
            scale = (values, zeros) if isinstance(op, Multiply) else (ones, values)
            return Operation(ELEMENTWISE, node.name, inputs, node.output, scale=scale)
    raise ValueError(f"layer '{node.name}': the CPU engine has no {op.kind} like this; end the network before it")


def _fuse_sums(graph: Graph, made: list[Operation]) -> list[Operation]:
    """A sum right after a convolution that nobody else reads becomes a part of it."""
    place = {operation.output: index for index, operation in enumerate(made)}
    for index, operation in enumerate(made):
        if operation.kind != ELEMENTWISE or len(operation.inputs) != 2:
            continue
        for name, other in (operation.inputs, operation.inputs[::-1]):
            before = made[place[name]] if name in place else None
            if (
                before is not None
                and before.kind == CONV
                and len(before.inputs) == 1
                and before.bounds == _BOUNDS["linear"]
                and name != other
                and name not in graph.outputs
                and sum(name in reader.inputs for reader in made) == 1
                and place[other] < place[name]
            ):
                fused = replace(
                    before, inputs=(*before.inputs, other), output=operation.output, bounds=operation.bounds
                )
                made[place[name]], made[index] = fused, replace(operation, kind=-1)
                place[operation.output] = place[name]
                break
    return [operation for operation in made if operation.kind != -1]
