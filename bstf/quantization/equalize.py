"""Cross-layer equalisation: channels of neighbouring layers are scaled so that one grid suits them all.

A grid has one position for a whole kernel, so a channel of small weights keeps few bits beside one of large
weights. Scaling an output channel of a layer by s and the same input channel of the next by 1 / s leaves the
network's function as it is, wherever what lies between scales along: relu, pooling, resizing,
zero padding, cropping, flattening.
Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.1; the numbers are those of the Vitis AI quantiser.
"""

from collections.abc import Iterator

import numpy as np

from bstf.quantization.network import (
    AveragePool,
    Convolution,
    Crop,
    GlobalPool,
    MaxPool,
    Network,
    Operation,
    Relu,
    Reshape,
    Resize,
    Weights,
    ZeroPad,
)

STEPS = 10
SMALLEST_SCALE, LARGEST_SCALE = 0.1, 10.0  # of one step
NEGLIGIBLE = 0.1  # sum of both layers' largest weights of a channel, below which it is left alone
# f(s * x) = s * f(x) of each channel, for s > 0
_SCALING = (MaxPool, AveragePool, GlobalPool, Reshape, Resize, Crop, ZeroPad)


def equalize(network: Network) -> Network:
    """Equalises the channels' ranges of every two convolutions or dense layers in a row.

    Each step scales channel c between two layers by s_c = sqrt(max |tail_c| / max |head_c|), so that both have the
    same largest weight. A layer in the middle, such as a depthwise convolution, belongs to two pairs; the steps
    bring such a chain to the one largest weight of each channel that all its layers share. A relu6 ends a chain:
    its ceiling doesn't scale along. Zero weights stay exactly zero.

    Args:
        network: the folded network; its kernels and biases are replaced.

    Returns:
        The network.

    Raises:
        ValueError: scaled weights overflow; names the layer.

    Example:
        >>> network = equalize(flatten(model))
    """
    chains = list(pairs(network))
    for _ in range(STEPS):
        for head, tail in chains:
            _scale(head, tail, _scales(_largest_of_outputs(head), _largest_of_inputs(tail, len(head.bias))))
    return network


def pairs(network: Network) -> Iterator[tuple[Weights, Weights]]:
    """The layers with weights, head and tail, between which channels can be scaled."""
    readers = network.consumers()
    for head in network.operations.values():
        if not isinstance(head, Weights):
            continue
        reader = network.only_consumer(head.name, readers)
        while reader is not None and _scales_along(reader):
            reader = network.only_consumer(reader.name, readers)
        if isinstance(reader, Weights):
            yield head, reader


def _scales_along(op: Operation) -> bool:
    return isinstance(op, _SCALING) or (isinstance(op, Relu) and op.ceiling is None)


def _scales(head: np.ndarray, tail: np.ndarray) -> np.ndarray:
    """Scales of the channels from the largest weights of both layers; 1 where a channel is dead or negligible."""
    alive = (head > 0) & (tail > 0) & (head + tail >= NEGLIGIBLE)
    ratio = np.divide(tail, head, out=np.ones_like(head), where=alive)
    return np.clip(np.sqrt(ratio), SMALLEST_SCALE, LARGEST_SCALE)


def _scale(head: Weights, tail: Weights, scales: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        head.kernel = (head.kernel * scales).astype(np.float32)
        head.bias = (head.bias * scales).astype(np.float32)
        tail.kernel = (tail.kernel / _as_inputs(tail, scales)).astype(np.float32)
    for op, values in ((head, head.kernel), (head, head.bias), (tail, tail.kernel)):
        if not np.isfinite(values).all():
            raise ValueError(f"equalising layer {op.name!r} overflows: its weights are too large; scale them down.")


def _largest_of_outputs(op: Weights) -> np.ndarray:
    """Max |w| of each output channel, float64."""
    return np.abs(op.kernel).reshape(-1, op.kernel.shape[-1]).max(axis=0).astype(np.float64)


def _largest_of_inputs(op: Weights, channels: int) -> np.ndarray:
    """Max |w| of each input channel, float64. Where a flattened image comes in, of the `channels` of the image."""
    groups = op.groups if isinstance(op, Convolution) else 1
    *_, cin, cout = op.kernel.shape
    largest = np.abs(op.kernel).reshape(-1, cin, groups, cout // groups).max(axis=(0, 3))
    return largest.T.reshape(-1, channels).max(axis=0).astype(np.float64)


def _as_inputs(op: Weights, scales: np.ndarray) -> np.ndarray:
    """Scales of input channels as the kernel (..., cin / groups, cout) has them: (cin / groups, cout)."""
    groups = op.groups if isinstance(op, Convolution) else 1
    *_, cin, cout = op.kernel.shape
    flattened = np.tile(scales, cin * groups // len(scales))
    return np.repeat(flattened.reshape(groups, cin).T, cout // groups, axis=1)
