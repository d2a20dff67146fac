"""A Keras model as a network for quantisation: no batch normalisation, few functions.

Scales and offsets, those of batch normalisation among them, go into a convolution or dense layer before or behind
them, or to the host if they are the first thing that happens to the input; those that are left become depthwise
convolutions. Chains of functions of one value become a single function.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from bstf.blocks import BlockShape
from bstf.quantization.network import (
    Affine,
    AveragePool,
    BatchNorm,
    Convolution,
    Dense,
    GlobalAveragePool,
    Multiply,
    Network,
    Operation,
    Relu,
    Reshape,
    Softmax,
    Unary,
    Weights,
)
from bstf.quantization.order import fold_orders
from bstf.quantization.trace import trace

_MOST_AVERAGED = 1024  # elements whose factor N / 2**M surely has M <= 16


def flatten(model: keras.Model) -> Network:
    """Turns a Keras model into a network with batch normalisation folded.

    Args:
        model: a built Sequential or functional model (nested ones included) of one input (h, w, c) or (c,).
            It is only read.

    Returns:
        The network.

    Raises:
        TypeError: not a Keras model.
        ValueError: what the model is or holds isn't supported; the sentence names the layer.

    Example:
        >>> list(flatten(keras.applications.ResNet50(weights=None)).operations)[:3]
        ['input_layer', 'conv1_pad', 'conv1_conv']
    """
    network = trace(model)
    fold_orders(network)
    _join(network)
    _prepare(network)
    _check_maps(network)
    _compose(network)
    for norm in [op for op in network.operations.values() if isinstance(op, BatchNorm)]:
        _fold(network, norm)
    _split_averages(network)
    _check_softmax(network)
    return network


def _join(network: Network) -> None:
    """A scale and an offset right behind others become one with them."""
    for norm in [op for op in network.operations.values() if isinstance(op, BatchNorm)]:
        following = network.only_consumer(norm.name, network.consumers())
        if isinstance(following, BatchNorm):
            following.offset = norm.offset * following.scale + following.offset
            following.scale = norm.scale * following.scale
            network.remove(norm)


def _prepare(network: Network) -> None:
    """A scale and an offset of an input, if nothing else reads it, are what the host computes."""
    for name in network.inputs:
        first = network.only_consumer(name, network.consumers())
        if isinstance(first, BatchNorm):
            _prepare_input(network, first)


def _prepare_input(network: Network, first: BatchNorm) -> None:
    with np.errstate(over="ignore"):
        constants = [_one_value(values).astype(np.float32) for values in (first.scale, first.offset)]
    if not all(np.isfinite(values).all() for values in constants):
        raise ValueError(f"layer {first.name!r}: what it and the layers before it do to the input overflows float32.")
    common = {"name": first.name, "inputs": first.inputs, "shape": first.shape}
    network.operations[first.name] = Affine(**common, **dict(zip(("scale", "offset"), constants)))


def _check_maps(network: Network) -> None:
    """Constants with a number a pixel are what the host computes, or refused."""
    for op in network.operations.values():
        if isinstance(op, BatchNorm) and max(op.scale.ndim, op.offset.ndim) > 1:
            raise ValueError(
                f"layer {op.name!r} has a constant with numbers of their own for pixels, of the shape {op.shape}; that "
                "is supported for an input that nothing else reads, before all other layers: use a number a channel."
            )


def _one_value(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1)[:1] if (values == values.flat[0]).all() else values


def _compose(network: Network) -> None:
    """Functions of functions of one value become one function, and so does the product of a value and its function.

    A scale before a function belongs to it, and one after it, but for those that a convolution takes in.
    """
    changed = True
    while changed:
        changed = False
        for op in list(network.operations.values()):
            inner = network.operations.get(op.inputs[0]) if op.inputs else None
            if isinstance(op, Multiply):
                changed |= _product_with_function(network, op)
            elif inner is not None and network.only_consumer(inner.name, network.consumers()) is op:
                outer_function, inner_function = _function(op), _function(inner)
                if outer_function is None or inner_function is None or _convolutions_take(network, inner, op):
                    continue
                composed = Unary(
                    name=op.name,
                    inputs=inner.inputs,
                    shape=op.shape,
                    function=lambda x, outer=outer_function, inner=inner_function: outer(inner(x)),
                )
                del network.operations[inner.name]
                network.operations[op.name] = composed
                changed = True


def _convolutions_take(network: Network, inner: Operation, outer: Operation) -> bool:
    """Whether neighbours compute both: scales and a relu behind them, relus, or a relu and a scale before a layer."""
    if isinstance(inner, Unary) or isinstance(outer, Unary):
        return False
    return (
        isinstance(outer, Relu)
        or isinstance(inner, BatchNorm)
        or _takes(network.only_consumer(outer.name, network.consumers()), outer)
    )


def _product_with_function(network: Network, op: Multiply) -> bool:
    """X * f(x) as a function of x."""
    for source, name in (op.inputs, op.inputs[::-1]):
        gate = network.operations[name]
        function = _function(gate) if isinstance(gate, (Unary, Relu)) else None
        if function is None or gate.inputs != (source,):
            continue
        if network.only_consumer(name, network.consumers()) is op:
            network.operations[op.name] = Unary(
                name=op.name, inputs=(source,), shape=op.shape, function=lambda x, gate=function: x * gate(x)
            )
            del network.operations[name]
            return True
    return False


def _function(op: Operation) -> Callable[[Any], Any] | None:
    """What an operation computes of one value; None for those that don't."""
    if isinstance(op, Unary):
        return op.function
    if isinstance(op, Relu):
        return keras.ops.relu if op.ceiling is None else keras.ops.relu6
    if isinstance(op, BatchNorm) and (op.scale == op.scale.flat[0]).all() and (op.offset == op.offset.flat[0]).all():
        scale, offset = float(op.scale.flat[0]), float(op.offset.flat[0])
        return lambda x: x * scale + offset
    return None


def _fold(network: Network, norm: BatchNorm) -> None:
    """Folds a scale and an offset into the layer before it or behind it; else it becomes a depthwise convolution."""
    producer, readers = network.operations[norm.inputs[0]], network.consumers()
    behind = network.only_consumer(norm.name, readers)
    if isinstance(producer, Weights) and network.only_consumer(producer.name, readers) is norm:
        _fold_back(producer, norm)
        network.remove(norm)
    elif _takes(behind, norm):
        _fold_forward(behind, norm)
        network.remove(norm)
    else:
        _to_depthwise(network, norm)


def _fold_back(producer: Weights, norm: BatchNorm) -> None:
    """W * scale and b * scale + offset per output channel; zeros of a kernel stay exactly zero."""
    with np.errstate(over="ignore"):
        producer.kernel = (producer.kernel * norm.scale).astype(np.float32) + 0.0
        producer.bias = (producer.bias * norm.scale + norm.offset).astype(np.float32)
    _check_finite(producer, norm)


def _takes(behind: Operation | None, norm: BatchNorm) -> bool:
    """Whether a layer can take in what is done to its input: zeros around an image must stay what they were."""
    if isinstance(behind, Dense):
        return True
    if not isinstance(behind, Convolution) or behind.groups > 1:
        return False
    return behind.padding == "valid" or behind.kernel.shape[:2] == (1, 1) or not norm.offset.any()


def _fold_forward(behind: Weights, norm: BatchNorm) -> None:
    """W * scale and b + w' offset, by input channel."""
    with np.errstate(over="ignore"):
        kernel = behind.kernel.astype(np.float64)
        taps = kernel.reshape(-1, *kernel.shape[-2:]).sum(axis=0)
        behind.bias = (behind.bias + norm.offset @ taps).astype(np.float32)
        behind.kernel = (kernel * norm.scale[:, None]).astype(np.float32) + 0.0
    _check_finite(behind, norm)


def _check_finite(layer: Weights, norm: BatchNorm) -> None:
    if not (np.isfinite(layer.kernel).all() and np.isfinite(layer.bias).all()):
        raise ValueError(
            f"folding batch normalisation {norm.name!r} into {layer.name!r} overflows; its scale is too large."
        )


def _to_depthwise(network: Network, norm: BatchNorm) -> None:
    """A convolution of one kernel position and channel a group; of vectors, between two reshapes."""
    source, channels = norm.inputs[0], norm.shape[-1]
    vector = len(norm.shape) == 1
    made: list[Operation] = []
    if vector:
        made.append(Reshape(name=network.free_name(f"{norm.name}_pixel"), inputs=(source,), shape=(1, 1, channels)))
        source = made[-1].name
    convolution = Convolution(
        name=network.free_name(f"{norm.name}_scale") if vector else norm.name,
        inputs=(source,),
        shape=(1, 1, channels) if vector else norm.shape,
        kernel=norm.scale.astype(np.float32).reshape(1, 1, 1, channels),
        bias=norm.offset.astype(np.float32),
        block=BlockShape(8, 8),
        strides=(1, 1),
        padding="valid",
        groups=channels,
    )
    _check_finite(convolution, norm)
    made.append(convolution)
    if vector:
        made.append(Reshape(name=norm.name, inputs=(convolution.name,), shape=norm.shape))
    _replace(network, norm.name, made)


def _split_averages(network: Network) -> None:
    """An average of more elements than one factor can divide by is one of averages."""
    for op in [op for op in network.operations.values() if isinstance(op, GlobalAveragePool)]:
        height, width, channels = network.operations[op.inputs[0]].shape
        count = height * width
        if count <= _MOST_AVERAGED or count & (count - 1) == 0:
            continue
        windows = [
            (rows, columns)
            for rows in range(1, height + 1)
            for columns in range(1, width + 1)
            if height % rows == 0 == width % columns
            and rows * columns <= _MOST_AVERAGED
            and count // (rows * columns) <= _MOST_AVERAGED
        ]
        if not windows:
            raise ValueError(
                f"layer {op.name!r} averages {height} x {width} pixels, which can't be done in two steps of at most "
                f"{_MOST_AVERAGED}; pool before it."
            )
        # Powers of two divide exactly; then, the smaller the first step, the less is rounded twice.
        size = min(windows, key=lambda one: (math.prod(one) & (math.prod(one) - 1) != 0, one[0] != one[1], one))
        first = AveragePool(
            name=network.free_name(f"{op.name}_windows"),
            inputs=op.inputs,
            shape=(height // size[0], width // size[1], channels),
            size=size,
            strides=size,
            padding="valid",
        )
        _replace(network, op.name, [first, replace(op, inputs=(first.name,))])


def _replace(network: Network, name: str, made: list[Operation]) -> None:
    """Puts operations in the place of one, whose name the last of them has."""
    operations = {}
    for key, operation in network.operations.items():
        operations |= {one.name: one for one in made} if key == name else {key: operation}
    network.operations = operations


def _check_softmax(network: Network) -> None:
    for name, readers in network.consumers().items():
        if isinstance(network.operations[name], Softmax) and readers:
            raise ValueError(
                f"softmax {name!r} is followed by {readers[0].name!r}; softmax is supported at the end of a model only."
            )
