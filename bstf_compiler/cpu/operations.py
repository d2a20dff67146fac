"""A graph as the operations of the CPU engine: residual sums in the convolution before them, weights packed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np

from bstf_compiler import integer
from bstf_compiler.cpu.kernels import winograd
from bstf_compiler.cpu.kernels.conv import DEPTH, ConvWeights, join, pack
from bstf_compiler.cpu.kernels.step import (
    CONCAT,
    CONV,
    DIFFERENCE,
    ELEMENTWISE,
    FROM_TILES,
    FUNCTION,
    LOAD,
    MAX_POOL,
    MEAN_POOL,
    PIXELS,
    PRODUCT,
    RESIZE,
    SPLIT,
    SUM,
    TO_TILES,
    ZERO_MAX_POOL,
)
from bstf_compiler.cpu.layout import FLOATS, WORDS, Format, round_up
from bstf_compiler.cpu.simd import Isa
from bstf_compiler.graph import (
    FUNCTIONS,
    Add,
    Affine,
    Average,
    AveragePool,
    BiasAdd,
    Concat,
    Conv,
    DepthToSpace,
    Function,
    Graph,
    Lookup,
    MaxPool,
    Multiply,
    Node,
    Product,
    Relu,
    Requantize,
    Resize,
    Softmax,
    Window,
)

_NAMES = {
    LOAD: "load", CONV: "conv", SPLIT: "split", ELEMENTWISE: "elementwise", MAX_POOL: "max pool",
    ZERO_MAX_POOL: "max pool", MEAN_POOL: "mean pool", CONCAT: "concat", TO_TILES: "to tiles",
    FROM_TILES: "from tiles", FUNCTION: "function", RESIZE: "resize", PIXELS: "pixels",
}  # fmt: skip
_PIXEL = Window((1, 1))
_BOUNDS = {"linear": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


Pays = Callable[[ConvWeights, tuple[int, int]], bool]
"""Of weights, packed for the direct way, and height and width of the result of one image."""


@dataclass(frozen=True)
class Shifts:
    """Bits between the grids of a fixed-point operation; none is negative.

    A convolution's sums lose `own`; then that, or the input, gains `up`, the tensor to add gains `other`, and the total
    loses `cut`. Each loss is rounded and clamped to int8.
    """

    own: int = 0
    up: int = 0
    other: int = 0
    cut: int = 0

    @classmethod
    def between(cls, positions: list[int], result: int) -> Shifts:
        """Those of a sum of one or two tensors at `positions`."""
        finest = max(*positions, result)
        ups = [finest - position for position in positions]
        return cls(up=ups[0], other=ups[-1], cut=finest - result)


@dataclass(frozen=True)
class Operation:
    """One step of the engine.

    Attributes:
        kind: of `bstf_compiler.cpu.kernels.step`.
        name: of the layer.
        inputs: names of the tensors it reads; the second one is added, if `join` says nothing else.
        output: name of the tensor that it writes.
        window: of convolutions, splits and pools; of RESIZE and PIXELS, with what is made of a pixel as the kernel and
            what is cropped as the padding.
        bounds: that it clamps its result to.
        weights: of a convolution.
        constants: of an elementwise operation in float32 and of a load, a factor and a summand a channel; of a mean of
            int8, a factor a pixel; of FROM_TILES, a summand a channel; of a function of int8, its table; of RESIZE, the
            weights of three rows for each row of a pixel's result, then those of columns.
        shifts: of a fixed-point operation.
        factor: from images to integers, of the load of a fixed-point network; the parameter of a function.
        before: of a load, the elements an image of the inputs before.
        join: of an elementwise operation.
        function: name of a function of float32.
        macs: multiply-adds of the layer an image if all its weights were kept.
        kept_macs: those of the kept blocks, also where Winograd's method needs fewer multiplications.
    """

    kind: int
    name: str
    inputs: tuple[str, ...]
    output: str
    window: Window = _PIXEL
    bounds: tuple[float, float] = _BOUNDS["linear"]
    weights: ConvWeights | None = None
    constants: np.ndarray | None = None
    shifts: Shifts = Shifts()
    factor: float = 1.0
    before: int = 0
    join: int = SUM
    function: str = ""
    macs: int = 0
    kept_macs: int = 0

    @property
    def kind_name(self) -> str:
        """What it does, for reports."""
        return _NAMES[self.kind]


def format_of(graph: Graph) -> Format:
    """How the engine holds the activations of a graph."""
    return WORDS if graph.is_fixed_point else FLOATS


def operations(graph: Graph, isa: Isa, pays: Pays) -> list[Operation]:
    """The operations that compute what a lowered graph does, up to its softmax.

    Args:
        graph: lowered.
        isa: what the kernels are compiled for.
        pays: whether to use Winograd's method for a convolution that allows it.

    Raises:
        ValueError: the graph holds an operation that the engine doesn't know.
    """
    fixed = graph.is_fixed_point
    made = [_load(graph, name, name) for name in graph.inputs if _loads(graph, name)]
    hosts = host_images(graph)
    for node in graph:
        if isinstance(node.op, Conv):
            made += _convolution(graph, node, isa, pays)
        elif isinstance(node.op, Concat):
            made += _concat(graph, node, made, isa)
        elif node in hosts:
            made.append(_load(graph, node.output, node.output))
        elif isinstance(node.op, Affine) and fixed:
            made.append(
                replace(_load(graph, node.inputs[0], node.output), constants=_affine(graph, node).view(np.int32))
            )
        elif not isinstance(node.op, Softmax):
            made.append(_elementwise(graph, node) or _pool(graph, node) or _enlarging(graph, node))
            if made[-1] is None:
                raise ValueError(
                    f"layer '{node.name}': the CPU engine has no {node.op.kind} like this; end the network before it"
                )
    return _fuse_sums(graph, _fuse_scales(graph, made))


def host_images(graph: Graph) -> list[Node]:
    """What is computed on inputs before all operations, since pixels have constants of their own."""
    return [node for node in graph if isinstance(node.op, Affine) and _affine(graph, node) is None]


def _loads(graph: Graph, name: str) -> bool:
    """Whether an input is loaded as it is: not if nothing but the host reads it."""
    hosts = host_images(graph)
    return name in graph.outputs or any(
        not (isinstance(node.op, Affine) and (graph.is_fixed_point or node in hosts)) for node in graph.consumers(name)
    )


def _load(graph: Graph, name: str, tensor: str) -> Operation:
    """An input, or what is computed on one before, on the grid of a tensor."""
    shapes = graph.inputs | {node.output: graph.tensors[node.output].shape for node in host_images(graph)}
    before = sum(math.prod(shape) for _, shape in takewhile(lambda one: one[0] != name, shapes.items()))
    position = graph.tensors[tensor].position
    if position is None:
        return Operation(LOAD, tensor, (), tensor, before=before)
    bounds = tuple(math.ldexp(bound, -position) for bound in (integer.INT8_MIN, integer.INT8_MAX))
    return Operation(LOAD, tensor, (), tensor, bounds=bounds, factor=math.ldexp(1.0, position), before=before)


def _affine(graph: Graph, node: Node) -> np.ndarray | None:
    """A factor and a summand for each channel and those that fill up the last step; None if pixels have their own."""
    channels = graph.tensors[node.output].shape[-1]
    pairs = np.zeros((round_up(channels, DEPTH), 2), np.float32)
    pairs[:channels] = (1, 0)
    places = {Multiply: (0,), BiasAdd: (1,), Affine: (0, 1)}[type(node.op)]
    for place, constant in zip(places, graph.constants(node)):
        if constant.data.size != 1 and constant.data.shape[-1:] != (constant.data.size,):
            return None
        pairs[:channels, place] = constant.data.ravel()
    return pairs.ravel()


def _bounds(graph: Graph, tensor: str, activation: str) -> tuple[float, float]:
    position = graph.tensors[tensor].position
    return _BOUNDS[activation] if position is None else integer.activation_bounds(activation, position)


def _convolution(graph: Graph, node: Node, isa: Isa, pays: Pays) -> Iterator[Operation]:
    """A convolution, after a split of its input if it has strides, and before a shift if it makes the grid finer."""
    op, (source, kernel, *bias) = node.op, (graph.tensors[name] for name in node.inputs)
    height, width = graph.tensors[node.output].shape[1:3]
    bounds, own, start = _bounds(graph, node.output, op.activation), 0, np.zeros(kernel.shape[3])
    if bias:
        start = bias[0].data
    if source.position is not None:
        own = integer.shift_cut(graph, node)
        # Activations are stored plus 128, and rounding is a summand: both go where the sums start.
        start = start.astype(np.int64) << integer.shift_bias(graph, node)
        start -= 128 * kernel.data.sum(axis=(0, 1, 2), dtype=np.int64)
        start = (start + (1 << max(0, own) >> 1)).astype(np.int32)
    source_name = source.name
    if op.window.strides != (1, 1):
        source_name = f"{node.name} split"
        yield Operation(SPLIT, node.name, (source.name,), source_name, op.window)
    weights = pack(kernel.data, start, op.groups, isa, format_of(graph))
    layer = Operation(
        CONV, node.name, (source_name,), node.output, op.window, bounds, weights, shifts=Shifts(max(0, own)),
        macs=kernel.data.size * height * width, kept_macs=weights.macs * height * width,
    )  # fmt: skip
    if source.position is None and winograd.fits(weights, op) and pays(weights, (height, width)):
        yield from _winograd(layer, kernel.data, (height, width), isa)
        return
    if own >= 0:
        yield layer
        return
    coarse = f"{node.name} coarse"
    yield replace(layer, output=coarse, bounds=_bounds(graph, node.output, "linear"))
    yield Operation(ELEMENTWISE, node.name, (coarse,), node.output, bounds=bounds, shifts=Shifts(up=-own))


def _winograd(layer: Operation, kernel: np.ndarray, output: tuple[int, int], isa: Isa) -> Iterator[Operation]:
    """A convolution by Winograd's method, given the direct one."""
    below, beside = (-length % winograd.TILE for length in output)
    window = replace(
        layer.window.padded((0, below, 0, beside)), kernel=(winograd.SIDE,) * 2, strides=(winograd.TILE,) * 2
    )
    kernels = winograd.transform_kernel(kernel)
    products = join([pack(one, np.zeros(one.shape[3]), 1, isa, FLOATS) for one in kernels])
    tiles, multiplied = f"{layer.name} tiles", f"{layer.name} products"
    yield Operation(TO_TILES, layer.name, layer.inputs, tiles, window)
    yield replace(layer, inputs=(tiles,), output=multiplied, window=_PIXEL, bounds=_BOUNDS["linear"], weights=products)
    yield Operation(
        FROM_TILES, layer.name, (multiplied,), layer.output, window, layer.bounds, constants=layer.weights.bias
    )


def _concat(graph: Graph, node: Node, made: list[Operation], isa: Isa) -> Iterator[Operation]:
    """Nothing to do for parts that can be written in their places; the others are copied there.

    Parts that don't end with a whole step of channels are put together by convolutions with ones.
    """
    parts, bounds, whole = [], _bounds(graph, node.output, "linear"), graph.tensors[node.output]
    taken = {name for one in made if one.kind == CONCAT for name in one.inputs}
    taken |= {one.output for one in made if one.kind == LOAD}
    for name in node.inputs:
        part = graph.tensors[name]
        if part.position != whole.position or name in taken or name in parts:
            shifts = Shifts() if whole.position is None else Shifts.between([part.position], whole.position)
            copy = f"{node.name} part {len(parts)}"
            yield Operation(ELEMENTWISE, node.name, (name,), copy, bounds=bounds, shifts=shifts)
            name = copy
        parts.append(name)
    channels = [graph.tensors[name].shape[-1] for name in node.inputs]
    if all(count % DEPTH == 0 for count in channels[:-1]) and channels[-1] >= DEPTH:
        yield Operation(CONCAT, node.name, tuple(parts), node.output)
        return
    first, sum_before = 0, ()
    for place, (part, count) in enumerate(zip(parts, channels)):
        kernel = np.zeros((1, 1, count, whole.shape[-1]), np.float32 if whole.position is None else np.int8)
        kernel[0, 0, np.arange(count), first + np.arange(count)] = 1
        start = -128 * kernel.sum(axis=(0, 1, 2)) if whole.position is not None else np.zeros(whole.shape[-1])
        weights = pack(kernel, start, 1, isa, format_of(graph))
        output = node.output if place == len(parts) - 1 else f"{node.name} to {place}"
        yield Operation(CONV, node.name, (part, *sum_before), output, bounds=bounds, weights=weights)
        first, sum_before = first + count, (output,)


def _elementwise(graph: Graph, node: Node) -> Operation | None:
    """An operation on pixels in the same place, or None if the node's isn't."""
    op, tensors, out = node.op, graph.activations(node), graph.tensors[node.output]
    layer = Operation(ELEMENTWISE, node.name, tuple(tensor.name for tensor in tensors), node.output)
    positions = [tensor.position for tensor in tensors]
    if isinstance(op, Product):
        cut = sum(positions) - out.position if out.position is not None else 0
        shifts = Shifts(up=max(0, -cut), cut=max(0, cut))
        return replace(layer, bounds=_bounds(graph, node.output, op.activation), shifts=shifts, join=PRODUCT)
    if isinstance(op, (Add, Requantize)) or (isinstance(op, Relu) and op.activation in _BOUNDS):
        shifts = Shifts.between(positions, out.position) if out.position is not None else Shifts()
        join = DIFFERENCE if isinstance(op, Add) and op.subtract else SUM
        return replace(layer, bounds=_bounds(graph, node.output, op.activation), shifts=shifts, join=join)
    if isinstance(op, (Multiply, BiasAdd, Affine)) and (constants := _affine(graph, node)) is not None:
        return replace(layer, constants=constants)
    if isinstance(op, Function) and op.name in FUNCTIONS and out.position is None:
        return replace(layer, kind=FUNCTION, function=op.name, factor=op.alpha)
    if isinstance(op, Lookup) and out.position is not None:  # bytes are stored plus 128, and so are the table's
        table = (graph.constants(node)[0].data.view(np.uint8) ^ 128).view(np.int32)
        return replace(layer, kind=FUNCTION, constants=table)
    return None


def _pool(graph: Graph, node: Node) -> Operation | None:
    """An operation on windows without weights, or None if the node's isn't."""
    op, tensors, out = node.op, graph.activations(node), graph.tensors[node.output]
    inputs = tuple(tensor.name for tensor in tensors)
    if isinstance(op, MaxPool) and op.window.kernel == (1, 1) and not any(op.window.padding):
        return Operation(SPLIT, node.name, inputs, node.output, op.window)
    if isinstance(op, MaxPool):
        kind = ZERO_MAX_POOL if op.zero_padding else MAX_POOL
        return Operation(kind, node.name, inputs, node.output, op.window)
    if isinstance(op, Average):
        return Operation(MEAN_POOL, node.name, inputs, node.output, op.window)
    if isinstance(op, AveragePool):
        cut = op.shift + tensors[0].position - out.position
        return Operation(
            MEAN_POOL,
            node.name,
            inputs,
            node.output,
            op.window,
            _bounds(graph, node.output, op.activation),
            constants=graph.constants(node)[0].data.astype(np.int32).ravel() << max(0, -cut),
            shifts=Shifts(cut=max(0, cut)),
        )
    return None


def _enlarging(graph: Graph, node: Node) -> Operation | None:
    """An operation that makes several pixels of one, or None if the node's doesn't."""
    op, source, out = node.op, graph.activations(node)[0], graph.tensors[node.output]
    layer = Operation(PIXELS, node.name, (source.name,), node.output)
    if isinstance(op, DepthToSpace):
        return replace(layer, window=Window(op.block, padding=op.crop))
    if not isinstance(op, Resize):
        return None
    layer = replace(layer, kind=RESIZE, window=Window(op.factors))
    units = [1 if op.method == "nearest" else 2 * factor for factor in op.factors]
    weights = np.concatenate([_weights(factor, unit) for factor, unit in zip(op.factors, units)]).ravel()
    if out.position is None:
        scales = np.repeat(units, 3 * np.array(op.factors))
        return replace(layer, constants=(weights / scales).astype(np.float32))
    cut = math.prod(units).bit_length() - 1 + source.position - out.position
    return replace(layer, constants=weights.astype(np.int32), shifts=Shifts(up=max(0, -cut), cut=max(0, cut)))


def _weights(factor: int, unit: int) -> np.ndarray:
    """For each of the pixels that an axis makes of one, the weights of the one before, it and the next, in 1 / unit."""
    if unit == 1:
        return np.tile([0, 1, 0], (factor, 1))
    after = 2 * np.arange(factor) + 1 - factor  # from the centre of the pixel, see `integer.interpolation`
    return np.stack([np.maximum(-after, 0), unit - abs(after), np.maximum(after, 0)], axis=1)


def _needed(graph: Graph) -> list[str]:
    """Tensors that are read when all operations are done."""
    return [*graph.outputs, *(node.inputs[0] for node in graph if isinstance(node.op, Softmax))]


def _fuse_scales(graph: Graph, made: list[Operation]) -> list[Operation]:
    """A scale and shift right before another operation on pixels in their places, its only reader, becomes part of it.

    So a batch norm that no convolution can take in, and the rectifier after it, are one operation.
    """
    readers = Counter(name for one in made for name in one.inputs) + Counter(_needed(graph))
    fused: dict[str, Operation] = {}
    for one in made:
        before = fused.get(one.inputs[0]) if one.inputs else None
        if (
            one.kind == ELEMENTWISE
            and before is not None
            and before.kind == ELEMENTWISE
            and before.constants is not None
            and (len(before.inputs), before.bounds, readers[before.output]) == (1, _BOUNDS["linear"], 1)
        ):
            (scale, shift), constants = before.constants.reshape(-1, 2).T, before.constants
            if one.constants is not None:
                factor, summand = one.constants.reshape(-1, 2).T
                constants = np.stack([scale * factor, shift * factor + summand], axis=1).ravel()
            del fused[before.output]
            one = replace(one, inputs=(before.inputs[0], *one.inputs[1:]), constants=constants)
        fused[one.output] = one
    return list(fused.values())


def _fuse_sums(graph: Graph, made: list[Operation]) -> list[Operation]:
    """A sum right after a convolution that nobody else reads becomes a part of it."""
    linear = _BOUNDS["linear"] if format_of(graph) == FLOATS else (integer.INT8_MIN, integer.INT8_MAX)
    place = {operation.output: index for index, operation in enumerate(made)}
    for index, operation in enumerate(made):
        if operation.kind != ELEMENTWISE or operation.join != SUM or len(operation.inputs) != 2:
            continue
        if len({graph.tensors[name].shape for name in operation.inputs}) > 1:
            continue
        if operation.constants is not None:  # the first one is scaled before
            continue
        for name, other in (operation.inputs, operation.inputs[::-1]):
            before = made[place[name]] if name in place else None
            if (
                before is not None
                and before.kind in (CONV, FROM_TILES)
                and len(before.inputs) == 1
                and before.bounds == linear
                and name != other
                and name not in _needed(graph)
                and sum(name in reader.inputs for reader in made) == 1
                and place[other] < place[name]
            ):
                shifts = operation.shifts
                if name != operation.inputs[0]:
                    shifts = replace(shifts, up=shifts.other, other=shifts.up)
                fused = replace(
                    before,
                    inputs=(*before.inputs, other),
                    output=operation.output,
                    bounds=operation.bounds,
                    shifts=replace(shifts, own=before.shifts.own),
                )
                made[place[name]], made[index] = fused, replace(operation, kind=-1)
                place[operation.output] = place[name]
                break
    return [operation for operation in made if operation.kind != -1]
