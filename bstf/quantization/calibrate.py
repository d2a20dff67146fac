"""Positions of activations, from running the folded float network on real images.

Each batch chooses a position for each tensor, the most common one wins (the rule of the Vitis AI
quantiser). Batches are streamed, and of one batch only the tensors that later operations still read are
held.
"""

import functools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
from keras import ops

from bstf.batches import Progress, image_batches, number_of_batches
from bstf.quantization import positions
from bstf.quantization.network import (
    Add,
    Affine,
    AveragePool,
    Concat,
    Convolution,
    Crop,
    Dense,
    GlobalAveragePool,
    GlobalMaxPool,
    Input,
    MaxPool,
    Multiply,
    Network,
    Operation,
    Relu,
    Reshape,
    Resize,
    Softmax,
    TransposedConvolution,
    Unary,
    ZeroPad,
)


def calibrate(network: Network, calibration: Any) -> dict[str, int]:
    """Finds the positions of all activations.

    The input takes the non-overflow position, every other tensor the one of least squared error.

    Args:
        network: the folded network.
        calibration: an array (n, height, width, channels), a `tf.data.Dataset` or `keras.utils.PyDataset`
            or any iterable of batches `x` or `(x, y)`. Read once.

    Returns:
        The position of every operation that owns a grid, by name.

    Raises:
        ValueError: no images, endless, of a wrong shape, or NaN or infinite values, in images or computed.
        TypeError: `calibration` is nothing of the above.
    """
    fused = network.fused()
    measured = {fused.get(owner, owner): owner for owner in network.grids().values()}
    chosen: dict[str, list[int]] = defaultdict(list)
    batches = number_of_batches(calibration)
    progress = Progress(batches and len(network.operations) * batches, "operation")
    for batch in image_batches(calibration, network.input.shape, network.input.name):
        for name, values in _run(network, batch):
            progress.step()
            if name in measured:
                chosen[measured[name]].append(_position(network, name, values))
    if not chosen:
        raise ValueError("calibration holds no images; quantisation needs at least one.")
    progress.finish()
    return {name: positions.most_common(found) for name, found in chosen.items()}


def _position(network: Network, name: str, values: np.ndarray) -> int:
    if isinstance(network.operations[name], (Input, Affine)):
        return positions.non_overflow(float(values.min()), float(values.max()))
    if not np.isfinite(values).all():
        raise ValueError(f"layer {name!r} computes NaN or infinite values on the calibration images.")
    return positions.min_mse(values, positions.half_up)


def _run(network: Network, images: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Computes the network in float32, operation by operation; yields each tensor's name and values."""
    last_use = {name: op.name for op in network.operations.values() for name in op.inputs}
    tensors: dict[str, Any] = {}
    for name, operation in network.operations.items():
        if isinstance(operation, Input):
            tensors[name] = ops.convert_to_tensor(images)
        else:
            tensors[name] = _compute(operation, *(tensors[source] for source in operation.inputs))
        yield name, ops.convert_to_numpy(tensors[name])
        for source in {name, *operation.inputs}:
            if last_use.get(source, name) == name:
                del tensors[source]


@functools.singledispatch
def _compute(operation: Operation, *x: Any) -> Any:
    raise TypeError(type(operation).__name__)


@_compute.register
def _(op: Convolution, x: Any) -> Any:
    # The format is given everywhere: a user's global default may differ.
    format = {"data_format": "channels_last", "dilation_rate": op.dilation}
    if op.depthwise_kernel is not None:
        return ops.depthwise_conv(x, op.depthwise_kernel, op.strides[0], op.padding, **format) + op.bias
    return ops.conv(x, op.kernel, op.strides, op.padding, **format) + op.bias


@_compute.register
def _(op: Dense, x: Any) -> Any:
    return ops.matmul(x, op.kernel) + op.bias


@_compute.register
def _(op: Relu, x: Any) -> Any:
    return ops.relu(x) if op.ceiling is None else ops.relu6(x)


@_compute.register
def _(op: Unary, x: Any) -> Any:
    return op.function(x)


@_compute.register
def _(op: Affine, x: Any) -> Any:
    return x * op.scale + op.offset


@_compute.register
def _(op: TransposedConvolution, x: Any) -> Any:
    kernel = np.swapaxes(op.kernel, 2, 3)
    return ops.conv_transpose(x, kernel, op.strides, op.padding, data_format="channels_last") + op.bias


@_compute.register
def _(op: Add, x: Any, y: Any) -> Any:
    return ops.subtract(x, y) if op.subtract else ops.add(x, y)


@_compute.register
def _(op: Multiply, x: Any, y: Any) -> Any:
    return ops.multiply(x, y)


@_compute.register
def _(op: Concat, *x: Any) -> Any:
    return ops.concatenate(x, axis=-1)


@_compute.register
def _(op: MaxPool, x: Any) -> Any:
    return ops.max_pool(x, op.size, op.strides, op.padding, data_format="channels_last")


@_compute.register
def _(op: AveragePool, x: Any) -> Any:
    return ops.average_pool(x, op.size, op.strides, op.padding, data_format="channels_last")


@_compute.register
def _(op: GlobalAveragePool, x: Any) -> Any:
    return ops.mean(x, axis=(1, 2), keepdims=op.keepdims)


@_compute.register
def _(op: GlobalMaxPool, x: Any) -> Any:
    return ops.max(x, axis=(1, 2), keepdims=op.keepdims)


@_compute.register
def _(op: ZeroPad, x: Any) -> Any:
    return ops.pad(x, ((0, 0), *op.padding, (0, 0)))


@_compute.register
def _(op: Crop, x: Any) -> Any:
    (top, bottom), (left, right) = op.cropping
    return x[:, top : x.shape[1] - bottom, left : x.shape[2] - right]


@_compute.register
def _(op: Resize, x: Any) -> Any:
    return ops.image.resize(x, op.shape[:2], op.method, data_format="channels_last")


@_compute.register
def _(op: Reshape, x: Any) -> Any:
    return ops.reshape(x, (-1, *op.shape))


@_compute.register
def _(op: Softmax, x: Any) -> Any:
    return ops.softmax(x)
