"""Positions of activations, from running the folded float network on real images.

Each batch chooses a position for each tensor, the most common one wins (the rule of the Vitis AI
quantiser). Batches are streamed, and of one batch only the tensors that later operations still read are
held.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
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


def calibrate(
    network: Network, calibration: Any, rule: str = "min_mse", watch: Callable[[list[np.ndarray]], None] | None = None
) -> dict[str, int]:
    """Finds the positions of all activations.

    Inputs take the non-overflow position, every other tensor the one that `rule` finds.

    Args:
        network: the folded network.
        calibration: as of `bstf.batches.image_batches`. Read once.
        rule: a key of `positions.ACTIVATION_RULES`.
        watch: called with every batch.

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
    for batch in image_batches(calibration, network.inputs):
        if watch is not None:
            watch(batch)
        for name, values in run(network, batch):
            progress.step()
            if name in measured:
                chosen[measured[name]].append(_position(network, name, values, rule))
    if not chosen:
        raise ValueError("calibration holds no images; quantisation needs at least one.")
    progress.finish()
    return {name: positions.most_common(found) for name, found in chosen.items()}


def _position(network: Network, name: str, values: np.ndarray, rule: str) -> int:
    if isinstance(network.operations[name], (Input, Affine)):
        return positions.non_overflow(float(values.min()), float(values.max()))
    if not np.isfinite(values).all():
        raise ValueError(f"layer {name!r} computes NaN or infinite values on the calibration images.")
    return positions.ACTIVATION_RULES[rule](values)


def run(
    network: Network, images: Sequence[np.ndarray], change: Callable[[str, Any], Any] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Computes the network in float32, operation by operation.

    Args:
        network: the folded network.
        images: of every input, float32 (n, *shape of the input).
        change: called with every tensor's name and values; what it returns takes the tensor's place.

    Yields:
        Each tensor's name and values, in order of computation.
    """
    last_use = {name: op.name for op in network.operations.values() for name in op.inputs}
    tensors: dict[str, Any] = {name: ops.convert_to_tensor(x) for name, x in zip(network.inputs, images)}
    for name, operation in network.operations.items():
        if not isinstance(operation, Input):
            tensors[name] = _compute(operation, *(tensors[source] for source in operation.inputs))
        if change is not None:
            tensors[name] = change(name, tensors[name])
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
