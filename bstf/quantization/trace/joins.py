"""Layers that join tensors: sums, differences, products and concatenations."""

from typing import Any

import keras

from bstf.quantization.network import Add, Concat, Multiply, Operation
from bstf.quantization.trace.tracer import Handler, Tracer, refuse


def _sum(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    return _chain(tracer, layer, inputs, Add)


def _difference(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    first, second = inputs
    shape = _wider(tracer, layer, first, second)
    if tracer.shape(first) != shape:
        refuse(layer, f"it subtracts an image {shape} from one pixel; negate and add.")
    return tracer.add(Add(name=layer.name, inputs=(first, second), shape=shape, subtract=True))


def _product(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    return _chain(tracer, layer, inputs, Multiply)


def _chain(tracer: Tracer, layer: Any, inputs: list[str], kind: type[Operation]) -> str:
    """Two at a time; the last partial result takes the layer's name."""
    if len(inputs) < 2:
        refuse(layer, "it has one input and needs two or more.")
    total = inputs[0]
    for number, term in enumerate(inputs[1:], start=2):
        name = layer.name if number == len(inputs) else f"{layer.name}_first{number}"
        shape = _wider(tracer, layer, total, term)
        pair = (total, term) if tracer.shape(total) == shape else (term, total)
        total = tracer.add(kind(name=name, inputs=pair, shape=shape))
    return total


def _wider(tracer: Tracer, layer: Any, first: str, second: str) -> tuple[int, ...]:
    """The shape of two tensors, one of which may be a single pixel."""
    shapes = [tracer.shape(name) for name in (first, second)]
    for shape, other in (shapes, shapes[::-1]):
        if other == shape or (len(shape) == 3 and other == (1, 1, shape[-1])):
            return shape
    refuse(
        layer,
        f"its inputs have the shapes {shapes[0]}, {shapes[1]}; it needs two tensors of one shape, or an image and one "
        "pixel (1, 1, channels).",
    )


def _concat(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    shapes = [tracer.shape(name) for name in inputs]
    if layer.axis % (len(shapes[0]) + 1) != len(shapes[0]):
        refuse(layer, f"it joins along axis {layer.axis}; only the last axis, the channels, is supported.")
    shape = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
    return tracer.add(Concat(name=layer.name, inputs=tuple(inputs), shape=shape))


LAYERS: dict[type, Handler] = {
    keras.layers.Add: _sum,
    keras.layers.Subtract: _difference,
    keras.layers.Multiply: _product,
    keras.layers.Concatenate: _concat,
}
FUNCTIONS: dict[str, Handler] = {
    "Add": _sum,
    "Subtract": _difference,
    "Multiply": _product,
    "Concatenate": _concat,
}
