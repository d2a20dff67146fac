"""The integer semantics of every operation: the oracle that all back ends are compared with, bit by bit.

Written for clarity, on NumPy: a convolution is one float64 matrix product a kernel position (exact: every partial sum
is an integer below 2**53), everything else is int64. Rounding is `floor(x + 1/2)` at every requantisation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

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

INT8_MIN, INT8_MAX = -128, 127
Images = np.ndarray | Sequence[np.ndarray] | Mapping[str, np.ndarray]
"""What a network is called with: images (n, h, w, c) of its one input; of several inputs a sequence in the order of
`Graph.inputs`, or a dictionary by name."""


def quantize(x: np.ndarray, position: int) -> np.ndarray:
    """Float values to int8 integers on the grid of `position`: clip(floor(x * 2**position + 1/2), -128, 127).

    In float32 and in the order of TensorFlow's FakeQuant, for equal results however close to a tie a value lies: the
    lower end of the grid is subtracted before scaling.
    """
    low, high = np.ldexp(np.float32(INT8_MIN), -position), np.ldexp(np.float32(INT8_MAX), -position)
    above = np.clip(np.asarray(x, np.float32), low, high) - low
    return (np.floor(np.ldexp(above, position) + np.float32(0.5)) + INT8_MIN).astype(np.int8)


def dequantize(q: np.ndarray, position: int) -> np.ndarray:
    """Integers on the grid of `position` to float32 values."""
    return np.ldexp(q.astype(np.float32), -position)


def activation_bounds(activation: str, position: int) -> tuple[int, int]:
    """Smallest and largest integer that an activation lets through on the grid of `position`.

    Clamping after rounding equals clamping before it, since rounding is monotone; 6 becomes floor(6 * 2**p + 1/2).
    """
    if activation == "linear":
        return INT8_MIN, INT8_MAX
    if activation == "relu":
        return 0, INT8_MAX
    if activation == "relu6":
        return 0, min(INT8_MAX, math.floor(math.ldexp(6.0, position) + 0.5))
    raise ValueError(f"activation '{activation}' has no integer semantics; use linear, relu or relu6")


def requantize(accumulator: np.ndarray, shift: int, bounds: tuple[int, int]) -> np.ndarray:
    """clip(floor(accumulator * 2**-shift + 1/2), *bounds) as int8, for integers and a shift of either sign."""
    wide = accumulator.astype(np.int64)
    rounded = (wide + (1 << (shift - 1))) >> shift if shift > 0 else wide << -shift
    return np.clip(rounded, *bounds).astype(np.int8)


def conv(x: np.ndarray, kernel: np.ndarray, window: Window, groups: int = 1) -> np.ndarray:
    """Sums of a convolution, int64: x (n, h, w, cin) int8, kernel (kh, kw, cin / groups, cout) int8."""
    kh, kw, cin, cout = kernel.shape
    matrices = kernel.reshape(kh, kw, cin, groups, cout // groups).swapaxes(2, 3).astype(np.float64)
    total = 0.0
    for position, view in _window_views(x, window, fill=0):
        pixels = view.reshape(-1, groups, cin).swapaxes(0, 1).astype(np.float64)
        total = total + pixels @ matrices[position]
    return total.swapaxes(0, 1).reshape(*view.shape[:3], cout).astype(np.int64)


def shift_bias(graph: Graph, node: Node) -> int:
    """How far a bias is shifted up to the grid of the products: kernel + input - bias position."""
    x, kernel, bias = (graph.tensors[name] for name in node.inputs)
    return kernel.position + x.position - bias.position


def shift_cut(graph: Graph, node: Node) -> int:
    """How many bits a convolution's sum loses at its end: kernel + input - output position."""
    x, kernel = (graph.tensors[name] for name in node.inputs[:2])
    return kernel.position + x.position - graph.tensors[node.output].position


def evaluate(graph: Graph, node: Node, values: list[np.ndarray]) -> np.ndarray:
    """The output of one node for the values of its inputs, as int8 integers (n, h, w, c)."""
    op, out = node.op, graph.tensors[node.output]
    tensors = [graph.tensors[name] for name in node.inputs]
    if isinstance(op, MaxPool):
        fill = 0 if op.zero_padding else INT8_MIN
        return np.maximum.reduce([view for _, view in _window_views(values[0], op.window, fill)])
    if isinstance(op, Concat):
        shifts = [tensor.position - out.position for tensor in tensors]
        parts = [requantize(value, shift, (INT8_MIN, INT8_MAX)) for value, shift in zip(values, shifts)]
        return np.concatenate(parts, axis=-1)
    if isinstance(op, Lookup):
        return values[1][values[0].astype(np.int64) - INT8_MIN]
    if isinstance(op, DepthToSpace):
        return depth_to_space(values[0], op)
    if isinstance(op, Resize):
        total, bits = resize(values[0], op)
        return requantize(total, bits + tensors[0].position - out.position, (INT8_MIN, INT8_MAX))
    if isinstance(op, Affine):
        x, scale, offset = (np.asarray(value, np.float32) for value in values)
        return quantize(x * scale + offset, out.position)
    bounds = activation_bounds(op.activation, out.position)
    if isinstance(op, Conv):
        total = conv(values[0], values[1], op.window, op.groups)
        total += values[2].astype(np.int64) << shift_bias(graph, node)
        return requantize(total, shift_cut(graph, node), bounds)
    if isinstance(op, Add):
        finest = max(tensor.position for tensor in tensors)
        a, b = (value.astype(np.int64) << (finest - tensor.position) for value, tensor in zip(values, tensors))
        return requantize(a - b if op.subtract else a + b, finest - out.position, bounds)
    if isinstance(op, Product):
        a, b = (value.astype(np.int64) for value in values)
        return requantize(a * b, sum(tensor.position for tensor in tensors) - out.position, bounds)
    if isinstance(op, Requantize):
        return requantize(values[0], tensors[0].position - out.position, bounds)
    if isinstance(op, AveragePool):
        total = sum(view.astype(np.int64) for _, view in _window_views(values[0], op.window, fill=0))
        total *= values[1].astype(np.int64)[..., None]
        return requantize(total, op.shift + tensors[0].position - out.position, bounds)
    raise ValueError(f"layer '{node.name}': operation '{op.kind}' has no integer semantics")


def depth_to_space(x: np.ndarray, op: DepthToSpace) -> np.ndarray:
    """Pixels (n, h * rows, w * columns, c), cropped, from channels (n, h, w, rows * columns * c)."""
    n, height, width, channels = x.shape
    (rows, columns), (top, bottom, left, right) = op.block, op.crop
    apart = x.reshape(n, height, width, rows, columns, channels // (rows * columns)).transpose(0, 1, 3, 2, 4, 5)
    whole = apart.reshape(n, height * rows, width * columns, -1)
    return whole[:, top : whole.shape[1] - bottom, left : whole.shape[2] - right]


def resize(x: np.ndarray, op: Resize) -> tuple[np.ndarray, int]:
    """The larger image as int64 in units of 2**-bits of the input's, and these bits.

    Along an axis, output pixel i lies at (i + 1/2) / factor - 1/2 of the input: its weights are whole numbers of
    1 / (2 * factor), so a sum of two axes' has 2 + log2(factor) + log2(factor) bits more.
    """
    total, bits = x.astype(np.int64), 0
    for axis, factor in zip((1, 2), op.factors):
        if op.method == "nearest":
            total = np.repeat(total, factor, axis)
            continue
        first, second, weight = interpolation(total.shape[axis], factor)
        weight = weight.reshape([-1 if place == axis else 1 for place in range(4)])
        total = np.take(total, first, axis) * (2 * factor - weight) + np.take(total, second, axis) * weight
        bits += (2 * factor).bit_length() - 1
    return total, bits


def interpolation(size: int, factor: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of size * factor pixels: the two input pixels between whose centres it lies, at the edges the same one,
    and the weight of the second in units of 1 / (2 * factor).
    """
    place = 2 * np.arange(size * factor) + 1 - factor  # in units of 1 / (2 * factor), from the first pixel's centre
    first = place // (2 * factor)
    return np.clip(first, 0, size - 1), np.clip(first + 1, 0, size - 1), place - 2 * factor * first


def trace(graph: Graph, x: Images) -> dict[str, np.ndarray]:
    """Every layer's output.

    Args:
        graph: a fixed-point graph, as `bstf_compiler.load` returns it.
        x: float images (n, h, w, c), of several inputs a list or a dictionary; quantised by the inputs' positions.

    Returns:
        int8 integers (n, h, w, c) by tensor name, the inputs among them; float32 values of what only the host reads.

    Raises:
        ValueError: if the graph is not fixed-point or the images have another shape.
    """
    require_fixed_point(graph)
    values = {}
    for name, given in zip(graph.inputs, require_images(graph.inputs, x)):
        tensor = graph.tensors[name]
        images = given.reshape(-1, *tensor.shape[1:])
        fixed = tensor.position is not None
        values[name] = quantize(images, tensor.position) if fixed else images.astype(np.float32)
    for node in graph:
        values[node.output] = _value(graph, node, values)
    return values


def run(graph: Graph, x: Images) -> np.ndarray | list[np.ndarray]:
    """The network's outputs as float32 values, in the shapes of the SavedModel; arguments as for `trace`."""
    return outputs(graph, trace(graph, x))


def outputs(graph: Graph, values: dict[str, np.ndarray]) -> np.ndarray | list[np.ndarray]:
    """The network's outputs as float32 from its integer tensors (`trace`); one array if it has one output."""
    results = []
    for name, shape in zip(graph.outputs, graph.output_shapes):
        tensor = graph.tensors[name]
        value = values[name] if name in values else _value(graph, graph.producer(name), values)
        if tensor.position is not None:
            value = dequantize(value, tensor.position)
        results.append(value.reshape(-1, *shape))
    return results[0] if len(results) == 1 else results


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, float32: the same for equal values in any memory order, as its sums' order counts."""
    x = np.ascontiguousarray(x)
    shifted = np.exp(x - x.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def require_fixed_point(graph: Graph) -> None:
    """Raises ValueError unless every tensor has a grid."""
    if (name := graph.ungridded) is not None:
        raise ValueError(
            f"tensor '{name}' of '{graph.name}' has no fixed-point grid; quantise the network with "
            "bstf.quantize before bstf.export, or end it before that layer"
        )


def require_images(inputs: Mapping[str, tuple[int, ...]], x: Images) -> list[np.ndarray]:
    """The images of every input, in the order of the inputs.

    Args:
        inputs: shapes without batch by name, as `Graph.inputs`.
        x: images.

    Raises:
        ValueError: an input has no images, or images of another shape, number or type than it takes, or with NaN.
    """
    arrays = [np.asarray(one) for one in _by_input(inputs, x)]
    for (name, shape), array in zip(inputs.items(), arrays):
        if array.dtype.kind not in "fiub":
            raise ValueError(f"input '{name}' takes numbers; got {array.dtype}")
        if array.shape[1:] != shape or not array.ndim:
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"input '{name}' takes images of shape (n, {wanted}); got {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"input '{name}' holds NaN or infinite values; clean the images first")
        if len(array) != len(arrays[0]):
            raise ValueError(
                f"input '{name}' has {len(array)} images and '{next(iter(inputs))}' has {len(arrays[0])}; give all "
                "inputs equally many"
            )
    return arrays


def _by_input(inputs: Mapping[str, tuple[int, ...]], x: Images) -> Sequence[np.ndarray]:
    names = ", ".join(f"'{name}'" for name in inputs)
    if isinstance(x, Mapping):
        if set(x) != set(inputs):
            raise ValueError(f"the network's inputs are {names}; got images of {', '.join(map(repr, x)) or 'none'}")
        return [x[name] for name in inputs]
    if len(inputs) == 1:
        return [x]
    if not isinstance(x, (list, tuple)) or len(x) != len(inputs):
        got = f"{len(x)} arrays" if isinstance(x, (list, tuple)) else f"a {type(x).__name__}"
        raise ValueError(f"the network has the inputs {names}; give a list of their images, or a dictionary; got {got}")
    return x


def _value(graph: Graph, node: Node, values: dict[str, np.ndarray]) -> np.ndarray:
    if isinstance(node.op, Softmax):
        source = graph.tensors[node.inputs[0]]
        return softmax(dequantize(values[source.name], source.position))
    arguments = []
    for name in node.inputs:
        tensor = graph.tensors[name]
        arguments.append(tensor.data if tensor.is_constant else values[name])
    return evaluate(graph, node, arguments)


def _window_views(x: np.ndarray, window: Window, fill: int) -> list[tuple[tuple[int, int], np.ndarray]]:
    """For each kernel position, the pixels that it meets: (n, oh, ow, c) strided views of the padded images."""
    top, bottom, left, right = window.padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=fill)
    oh, ow = window.output_size(*x.shape[1:3])
    (sh, sw), (dh, dw) = window.strides, window.dilation
    rows, columns = (oh - 1) * sh + 1, (ow - 1) * sw + 1
    return [
        ((i, j), padded[:, i * dh : i * dh + rows : sh, j * dw : j * dw + columns : sw])
        for i in range(window.kernel[0])
        for j in range(window.kernel[1])
    ]
