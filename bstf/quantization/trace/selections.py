"""Channels and pixels taken out of a tensor, and axes in another order."""

from collections.abc import Sequence
from typing import Any

import keras

from bstf.quantization.network import Crop, Permute, Select
from bstf.quantization.trace.tracer import Handler, Tracer, function_name, refuse


def item(tracer: Tracer, layer: Any, inputs: list[str], arguments: Sequence[Any]) -> str:
    """`x[key]`: rows, columns and channels from one to another, every n-th channel, or one channel for a stack."""
    source, shape = inputs[0], tracer.shape(inputs[0])
    key = arguments[1] if isinstance(arguments[1], tuple) else (arguments[1],)
    if Ellipsis in key:
        place = key.index(Ellipsis)
        key = (*key[:place], *[slice(None)] * (len(shape) + 2 - len(key)), *key[place + 1 :])
    key = (*key, *[slice(None)] * (len(shape) + 1 - len(key)))
    *spatial, channels = key[1:]
    plain = key[0] == slice(None) and all(isinstance(one, slice) and one.step in (None, 1) for one in spatial)
    if not plain or not isinstance(channels, (slice, int)):
        refuse(layer, "it takes other parts than rows and columns from one to another, and channels.")
    ranges = [range(size)[one] for size, one in zip(shape, spatial)]
    numbers = range(shape[-1])[channels]
    if not all(ranges) or numbers == range(0):
        refuse(layer, f"nothing is left of its input of shape {shape}.")
    if any(len(one) < size for one, size in zip(ranges, shape)):
        cropping = tuple((one.start, size - one.stop) for one, size in zip(ranges, shape))
        size = (*map(len, ranges), shape[-1])
        source = tracer.add(Crop(name=f"{layer.name}_image", inputs=(source,), shape=size, cropping=cropping))
    if isinstance(numbers, int):
        return tracer.single_channel(source, numbers)
    return _select(tracer, layer, source, tuple(numbers))


def stack(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    """Single channels of one tensor, in any order."""
    singles = [tracer.singles.get(name) for name in inputs]
    if None in singles or len({source for source, _ in singles}) > 1 or layer.axis not in (-1, len(inputs)):
        refuse(layer, "it stacks other tensors than single channels of one, as channels; use Concatenate.")
    return _select(tracer, layer, singles[0][0], tuple(number for _, number in singles))


def _select(tracer: Tracer, layer: Any, source: str, numbers: tuple[int, ...]) -> str:
    shape = tracer.shape(source)
    if numbers == tuple(range(shape[-1])):
        return source
    shape = (*shape[:-1], len(numbers))
    return tracer.add(Select(name=layer.name, inputs=(source,), shape=shape, numbers=numbers))


def _flip(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    shape = tracer.shape(inputs[0])
    if layer.axis not in (-1, len(shape)):
        refuse(layer, f"it flips axis {layer.axis}; only the last axis, the channels, is supported.")
    return _select(tracer, layer, inputs[0], tuple(reversed(range(shape[-1]))))


def _permute(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    source, shape = inputs[0], tracer.shape(inputs[0])
    axes = tuple(layer.axes) if function_name(layer) else (0, *layer.dims)
    if axes[0] != 0:
        refuse(layer, "it moves the axis of the batch.")
    axes = tuple(axis - 1 for axis in axes[1:])
    if axes == tuple(range(len(shape))):
        return source
    made = tuple(shape[axis] for axis in axes)
    return tracer.add(Permute(name=layer.name, inputs=(source,), shape=made, axes=axes))


LAYERS: dict[type, Handler] = {keras.layers.Permute: _permute}
FUNCTIONS: dict[str, Handler] = {"Flip": _flip, "Transpose": _permute}
