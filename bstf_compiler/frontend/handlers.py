"""One handler for each TensorFlow operation: reads its attributes, adds our node."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from bstf_compiler.graph import (
    Add,
    Average,
    BatchToSpace,
    BiasAdd,
    Concat,
    Conv,
    ConvTranspose,
    DepthToSpace,
    FakeQuant,
    Function,
    Gather,
    MatMul,
    MaxPool,
    Multiply,
    Pad,
    Product,
    Relu,
    Reshape,
    Resize,
    Softmax,
    SpaceToBatch,
    SumPool,
    Window,
)

if TYPE_CHECKING:
    import tensorflow as tf

    from bstf_compiler.frontend.savedmodel import _Reader

HANDLERS: dict[str, Callable[[_Reader, tf.Operation], None]] = {}


def handles(*types: str) -> Callable:
    """Registers a handler for TensorFlow operation types."""

    def register(handler: Callable) -> Callable:
        HANDLERS.update(dict.fromkeys(types, handler))
        return handler

    return register


def grid_position(op: tf.Operation, value: Callable[[int], np.ndarray]) -> int | None:
    """Position of a FakeQuant operation's grid; None for any other operation.

    Args:
        op: the operation.
        value: gives the values of the operation's input of an index (the `Vars` form has its range in inputs).

    Raises:
        ValueError: if the range is not [-128, 127] * 2**-p for an integer p.
    """
    if op.type == "FakeQuantWithMinMaxArgs":
        low, high = op.get_attr("min"), op.get_attr("max")
    elif op.type == "FakeQuantWithMinMaxVars":
        low, high = (float(value(index)) for index in (1, 2))
    else:
        return None
    position = 7 - math.log2(-low) if low < 0 else math.nan
    if (
        op.get_attr("num_bits") != 8
        or op.get_attr("narrow_range")
        or not position.is_integer()
        or high != math.ldexp(127.0, -int(position))
    ):
        raise ValueError(
            f"'{op.name}': range [{low}, {high}] is not an 8-bit power-of-two grid [-128, 127] * 2**-p; quantise with "
            "bstf.quantize"
        )
    return int(position)


@handles("FakeQuantWithMinMaxArgs", "FakeQuantWithMinMaxVars")
def _fake_quant(reader: _Reader, op: tf.Operation) -> None:
    position = grid_position(op, lambda index: reader.constant(op, index))
    reader.add(op, FakeQuant(position), [reader.input(op)])


@handles("Conv2D")
def _conv(reader: _Reader, op: tf.Operation) -> None:
    kernel = reader.constant(op, 1)
    channels = reader.shape(op.inputs[0])[-1]
    window = _window(reader, op, kernel.shape[:2])
    reader.add(op, Conv(window, groups=channels // kernel.shape[2]), [reader.input(op), reader.input(op, 1)])


@handles("DepthwiseConv2dNative")
def _depthwise(reader: _Reader, op: tf.Operation) -> None:
    kernel = reader.constant(op, 1)
    kh, kw, channels, multiplier = kernel.shape
    window = _window(reader, op, (kh, kw))
    # Ones without a grid are the first half of a fixed-point average; a quantised layer's kernel has a grid.
    if multiplier == 1 and window.dilation == (1, 1) and (kernel == 1).all() and reader.grid(op, 1) is None:
        reader.add(op, SumPool(window), [reader.input(op)])
    else:
        grouped = kernel.reshape(kh, kw, 1, channels * multiplier)
        reader.add(op, Conv(window, groups=channels), [reader.input(op), reader.derived(op, 1, grouped)])


@handles("SpaceToBatchND", "BatchToSpaceND")
def _move_to_batch(reader: _Reader, op: tf.Operation) -> None:
    block = reader.constant(op, 1).tolist()
    require(reader, op, len(block) == 2, f"{op.type} over {len(block)} axes")
    amounts = tuple(reader.constant(op, 2).ravel().tolist())
    kind = SpaceToBatch if op.type == "SpaceToBatchND" else BatchToSpace
    reader.add(op, kind(tuple(block), amounts), [reader.input(op)])


@handles("ConcatV2")
def _concat(reader: _Reader, op: tf.Operation) -> None:
    parts, rank = range(len(op.inputs) - 1), len(reader.shape(op.outputs[0]))
    axis = int(reader.constant(op, len(parts))) % rank
    require(reader, op, axis == rank - 1, "a concatenation over another axis than channels")
    require(reader, op, not any(reader.is_constant(op, index) for index in parts), "a concatenation with a constant")
    reader.add(op, Concat(), [reader.input(op, index) for index in parts])


@handles("MatMul")
def _matmul(reader: _Reader, op: tf.Operation) -> None:
    require(reader, op, not op.get_attr("transpose_a"), "MatMul of a transposed activation")
    require(reader, op, not op.get_attr("transpose_b"), "MatMul of a transposed matrix")
    reader.constant(op, 1)
    reader.add(op, MatMul(), [reader.input(op), reader.input(op, 1)])


@handles("BiasAdd", "AddV2", "Add")
def _add(reader: _Reader, op: tf.Operation) -> None:
    if reader.is_constant(op, 0) or reader.is_constant(op, 1):
        reader.add(op, BiasAdd(), _with_constant(reader, op))
    else:
        reader.add(op, Add(), _wider_first(reader, op))


@handles("Sub")
def _subtract(reader: _Reader, op: tf.Operation) -> None:
    if reader.is_constant(op, 1):
        x, _ = _with_constant(reader, op)
        reader.add(op, BiasAdd(), [x, reader.derived(op, 1, -reader.constant(op, 1))])
        return
    if reader.is_constant(op, 0):
        x, constant = _with_constant(reader, op)
        reader.add(op, Multiply(), [x, reader.number(op, -1.0)])
        reader.add(op, BiasAdd(), [reader.output(op), constant])
        return
    inputs = _wider_first(reader, op)
    require(reader, op, inputs[0] == reader.input(op, 0), "an image subtracted from one pixel")
    reader.add(op, Add(subtract=True), inputs)


@handles("RealDiv")
def _divide(reader: _Reader, op: tf.Operation) -> None:
    require(reader, op, reader.is_constant(op, 1), "division by an activation")
    divisor = reader.constant(op, 1)
    require(reader, op, divisor.all(), "division by zero")
    x, _ = _with_constant(reader, op)
    reader.add(op, Multiply(), [x, reader.derived(op, 1, 1 / divisor)])


@handles("Mul")
def _multiply(reader: _Reader, op: tf.Operation) -> None:
    if reader.is_constant(op, 0) or reader.is_constant(op, 1):
        reader.add(op, Multiply(), _with_constant(reader, op))
    else:
        reader.add(op, Product(), _wider_first(reader, op))


def _wider_first(reader: _Reader, op: tf.Operation) -> list[str]:
    """Two computed inputs of one shape, or an image and one pixel for all of it, which comes second."""
    shapes = [reader.shape(tensor) for tensor in op.inputs]
    order = [0, 1] if shapes[0] == reader.shape(op.outputs[0]) else [1, 0]
    first, second = (shapes[place] for place in order)
    fits = second == first or (len(first) == 4 and second == (1, 1, 1, first[-1]))
    require(reader, op, fits, f"{op.type} of {shapes[0][1:]} and {shapes[1][1:]}")
    return [reader.input(op, place) for place in order]


@handles("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")
def _batch_norm(reader: _Reader, op: tf.Operation) -> None:
    require(reader, op, op.get_attr("data_format") == b"NHWC", "channels-first data")
    require(reader, op, not op.get_attr("is_training"), "batch normalisation in training")
    gamma, beta, mean, variance = (reader.constant(op, place) for place in range(1, 5))
    scale = gamma / np.sqrt(variance + np.float32(op.get_attr("epsilon")))
    reader.add(op, Multiply(), [reader.input(op), reader.derived(op, 1, scale)])
    reader.add(op, BiasAdd(), [reader.output(op), reader.derived(op, 2, beta - mean * scale)])


@handles("GatherV2")
def _gather(reader: _Reader, op: tf.Operation) -> None:
    """A table, indexed by x * 2**position + 128 as an integer."""
    table, cast = reader.constant(op, 0), reader.source(op, 1)
    shift = reader.source(cast, 0) if cast.type == "Cast" else cast
    places = [place for place in range(len(shift.inputs)) if reader.is_constant(shift, place)]
    known = shift.type in ("AddV2", "Add") and len(places) == 1
    known = known and np.all(reader.constant(shift, places[0]) == 128) and table.shape == (256,)
    scale = reader.source(shift, 1 - places[0]) if known else shift
    places = [place for place in range(len(scale.inputs)) if reader.is_constant(scale, place)]
    known = known and scale.type == "Mul" and len(places) == 1 and reader.constant(scale, places[0]).size == 1
    factor = float(reader.constant(scale, places[0]).ravel()[0]) if known else 0.0
    position = math.log2(factor) if factor > 0 else math.inf
    require(reader, op, known and position.is_integer(), "a table other than of all integers of 8 bits")
    reader.add(op, Gather(int(position)), [reader.input(scale, 1 - places[0]), reader.input(op, 0)])


@handles("ResizeBilinear", "ResizeNearestNeighbor")
def _resize(reader: _Reader, op: tf.Operation) -> None:
    before, after = reader.shape(op.inputs[0]), reader.shape(op.outputs[0])
    method = "bilinear" if op.type == "ResizeBilinear" else "nearest"
    factors = tuple(new // old for old, new in zip(before[1:3], after[1:3]))
    grown = all(old * factor == new for old, factor, new in zip(before[1:3], factors, after[1:3]))
    require(reader, op, grown, f"a resize from {before[1:3]} to {after[1:3]}, no whole multiple,")
    centred = op.get_attr("half_pixel_centers") or (method == "nearest" and not op.get_attr("align_corners"))
    require(reader, op, centred, "a resize by aligned corners")
    if method == "bilinear":
        require(reader, op, not any(f & (f - 1) for f in factors), f"interpolation by {factors}, no powers of two,")
    reader.add(op, Resize(factors, method), [reader.input(op)])


@handles("DepthToSpace")
def _depth_to_space(reader: _Reader, op: tf.Operation) -> None:
    require(reader, op, op.get_attr("data_format") == b"NHWC", "channels-first data")
    size = op.get_attr("block_size")
    reader.add(op, DepthToSpace((size, size)), [reader.input(op)])


@handles("Conv2DBackpropInput")
def _transposed(reader: _Reader, op: tf.Operation) -> None:
    kernel, x = reader.constant(op, 1), reader.shape(op.inputs[2])
    require(reader, op, op.get_attr("data_format") == b"NHWC", "channels-first data")
    require(reader, op, set(op.get_attr("dilations")) == {1}, "a dilated transposed convolution")
    strides = tuple(op.get_attr("strides")[1:3])
    before = (0, 0)
    if op.get_attr("padding") == b"SAME":
        sizes = zip(x[1:3], reader.shape(op.outputs[0])[1:3], kernel.shape, strides)
        before = tuple(max(0, (size - 1) * stride + extent - out) // 2 for size, out, extent, stride in sizes)
    require(reader, op, op.get_attr("padding") in (b"SAME", b"VALID"), "a transposed convolution with explicit padding")
    reader.add(op, ConvTranspose(strides, before), [reader.input(op, 2), reader.input(op, 1)])


def _with_constant(reader: _Reader, op: tf.Operation) -> list[str]:
    """The computed input of a binary operation, then the constant one, which must not widen it."""
    x, constant = (1, 0) if reader.is_constant(op, 0) else (0, 1)
    same = reader.shape(op.outputs[0]) == reader.shape(op.inputs[x])
    require(reader, op, same, "a constant larger than the activation")
    return [reader.input(op, x), reader.input(op, constant)]


@handles("Relu", "Relu6")
def _relu(reader: _Reader, op: tf.Operation) -> None:
    reader.add(op, Relu(op.type.lower()), [reader.input(op)])


@handles("Minimum")
def _minimum(reader: _Reader, op: tf.Operation) -> None:
    """min(relu(x), 6), as some exporters write relu6."""
    index = 0 if reader.is_constant(op, 0) else 1
    require(reader, op, np.all(reader.constant(op, index) == 6.0), "minimum with a constant other than 6")
    reader.add(op, Relu("min6"), [reader.input(op, 1 - index)])


@handles("MaxPool")
def _max_pool(reader: _Reader, op: tf.Operation) -> None:
    reader.add(op, MaxPool(_window(reader, op, op.get_attr("ksize")[1:3])), [reader.input(op)])


@handles("AvgPool")
def _average_pool(reader: _Reader, op: tf.Operation) -> None:
    reader.add(op, Average(_window(reader, op, op.get_attr("ksize")[1:3])), [reader.input(op)])


@handles("Sum", "Mean", "Max")
def _reduce(reader: _Reader, op: tf.Operation) -> None:
    """Reductions over the image are windows of the image's size."""
    axes = sorted(int(axis) % 4 for axis in np.atleast_1d(reader.constant(op, 1)))
    shape = reader.shape(op.inputs[0])
    require(reader, op, axes == [1, 2] and len(shape) == 4, f"{op.type} over axes {axes}")
    window = Window(shape[1:3], shape[1:3])
    node_op = {"Sum": SumPool(window), "Mean": Average(window), "Max": MaxPool(window)}[op.type]
    reader.add(op, node_op, [reader.input(op)])


@handles("Pad", "PadV2")
def _pad(reader: _Reader, op: tf.Operation) -> None:
    amounts = reader.constant(op, 1)
    value = reader.constant(op, 2) if op.type == "PadV2" else 0
    require(reader, op, np.all(value == 0), "padding with another value than zero")
    require(reader, op, len(amounts) == 4 and not amounts[0].any(), "padding of the batch")
    (top, bottom), (left, right), (before, after) = amounts[1:].tolist()
    if not before + after:
        reader.add(op, Pad((top, bottom, left, right)), [reader.input(op)])
        return
    # Channels of zeros: a convolution with ones.
    channels = reader.shape(op.inputs[0])[-1]
    ones = np.eye(channels, before + channels + after, before, dtype=np.float32)[None, None]
    window = Window((1, 1), padding=(top, bottom, left, right))
    reader.add(op, Conv(window), [reader.input(op), reader.derived(op, 1, ones)])


@handles("Tile")
def _tile(reader: _Reader, op: tf.Operation) -> None:
    """Only as `_repeat` knows it."""
    counts, opened = reader.constant(op, 1).tolist(), op.inputs[0].shape.as_list()
    axes = [axis for axis, count in enumerate(counts) if count != 1]
    require(
        reader,
        op,
        reader.source(op, 0).type == "ExpandDims" and len(axes) <= 1 and all(opened[axis] == 1 for axis in axes),
        "a tensor tiled like this",
    )
    reader.alias(op)


def _repeat(reader: _Reader, op: tf.Operation) -> bool:
    """Rows or columns repeated: a reshape of what was tiled along a new axis right behind theirs."""
    tiled = reader.source(op, 0)
    if tiled.type != "Tile":
        return False
    before, after, counts = reader.shape(op.inputs[0]), reader.shape(op.outputs[0]), reader.constant(tiled, 1)
    opened = int(reader.constant(reader.source(tiled, 0), 1)) % len(before)
    axis, rest = opened - 1, [count for place, count in enumerate(counts) if place != opened]
    whole = (*before[:axis], before[axis] * before[opened], *before[opened + 1 :])
    known = axis in (1, 2) and set(rest) == {1} and len(after) == 4 and after == whole
    require(reader, op, known, "a tensor tiled and reshaped like this")
    factor = int(counts[opened])
    reader.add(op, Resize((factor, 1) if axis == 1 else (1, factor)), [reader.input(op)])
    return True


@handles("Reshape", "Squeeze", "ExpandDims")
def _reshape(reader: _Reader, op: tf.Operation) -> None:
    if op.type == "ExpandDims" and op.outputs[0].shape.rank == 5:
        reader.alias(op)  # `_tile` says what may come of it
        return
    if _repeat(reader, op):
        return
    before, after = reader.shape(op.inputs[0]), reader.shape(op.outputs[0])
    moves_batch = math.prod(before) != math.prod(after) or len(after) not in (2, 4)
    require(reader, op, not moves_batch, f"a reshape from {before[1:]} to {after[1:]}")
    reader.add(op, Reshape(), [reader.input(op)])


@handles("Softmax")
def _softmax(reader: _Reader, op: tf.Operation) -> None:
    reader.add(op, Softmax(), [reader.input(op)])


def _window(reader: _Reader, op: tf.Operation, kernel: tuple[int, int]) -> Window:
    """The window of a convolution or pooling operation, its padding in pixels."""
    require(reader, op, op.get_attr("data_format") == b"NHWC", "channels-first data")
    kernel = (int(kernel[0]), int(kernel[1]))
    steps = list(op.get_attr("strides")) + (list(op.get_attr("ksize")) if "Pool" in op.type else [])
    require(reader, op, all(steps[i] == 1 for i in range(len(steps)) if i % 4 in (0, 3)), "a window over channels")
    strides = tuple(int(s) for s in op.get_attr("strides")[1:3])
    dilation = (1, 1) if "Pool" in op.type else tuple(int(d) for d in op.get_attr("dilations")[1:3])
    window = Window(kernel, strides, dilation=dilation)
    padding = op.get_attr("padding").decode()
    if padding == "VALID":
        return window
    if padding == "EXPLICIT":
        return window.padded(tuple(int(p) for p in op.get_attr("explicit_paddings")[2:6]))
    pads = []
    for size, extent, stride in zip(reader.shape(op.inputs[0])[1:3], window.extent, strides):
        total = max(0, (-(-size // stride) - 1) * stride + extent - size)
        pads += [total // 2, total - total // 2]
    return window.padded(tuple(pads))


def require(reader: _Reader, op: tf.Operation, holds: bool, what: str) -> None:
    """Raises ValueError with a sentence that names the layer, unless something holds."""
    if not holds:
        raise ValueError(
            f"layer '{reader.layer(op)}': {what} is not supported by the compiler; replace the layer or end the "
            "network before it"
        )


@handles("Sigmoid", "Tanh", "Elu", "Selu", "Softplus", "Erf", "Exp")
def _function(reader: _Reader, op: tf.Operation) -> None:
    reader.add(op, Function(op.type.lower()), [reader.input(op)])


@handles("LeakyRelu")
def _leaky_relu(reader: _Reader, op: tf.Operation) -> None:
    reader.add(op, Function("leaky_relu", op.get_attr("alpha")), [reader.input(op)])


@handles("Square", "Pow")
def _power(reader: _Reader, op: tf.Operation) -> None:
    """Small whole powers, as gelu has one, are products."""
    power = np.float32(2) if op.type == "Square" else reader.constant(op, 1)
    require(reader, op, power.size == 1 and power in (2, 3), "a power other than 2 and 3")
    x = reader.input(op)
    reader.add(op, Product(), [x, x])
    if np.all(power == 3):
        reader.add(op, Product(), [reader.output(op), x])


@handles("Neg")
def _negative(reader: _Reader, op: tf.Operation) -> None:
    reader.add(op, Multiply(), [reader.input(op), reader.number(op, -1.0)])


@handles("Erfc")
def _erfc(reader: _Reader, op: tf.Operation) -> None:
    """1 - erf(x)."""
    reader.add(op, Function("erf"), [reader.input(op)])
    reader.add(op, Multiply(), [reader.output(op), reader.number(op, -1.0)])
    reader.add(op, BiasAdd(), [reader.output(op), reader.number(op, 1.0)])
