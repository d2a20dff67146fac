"""Layers that give images another size or shape: pooling, padding, cropping, enlarging, and vectors of images."""

from typing import Any

import keras
import numpy as np

from bstf.quantization.network import (
    AveragePool,
    Convolution,
    Crop,
    GlobalAveragePool,
    GlobalMaxPool,
    GlobalPool,
    MaxPool,
    Pool,
    Reshape,
    Resize,
    ZeroPad,
)
from bstf.quantization.trace.tracer import DEFAULT_BLOCK, Handler, Tracer, output_shape, refuse


def _pool(kind: type[Pool]) -> Handler:
    def pool(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
        shape = output_shape(tracer, layer, inputs[0])
        if kind is AveragePool and len(set(layer.strides)) > 1:
            refuse(layer, f"its strides are {tuple(layer.strides)}; average pooling needs equal ones.")
        return tracer.add(
            kind(
                name=layer.name,
                inputs=(inputs[0],),
                shape=shape,
                size=tuple(layer.pool_size),
                strides=tuple(layer.strides),
                padding=layer.padding,
            )
        )

    return pool


def _global_pool(kind: type[GlobalPool]) -> Handler:
    def pool(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
        shape = output_shape(tracer, layer, inputs[0])
        return tracer.add(kind(name=layer.name, inputs=(inputs[0],), shape=shape, keepdims=bool(layer.keepdims)))

    return pool


def _zero_pad(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    shape = output_shape(tracer, layer, inputs[0])
    padding = tuple(tuple(pair) for pair in layer.padding)
    return tracer.add(ZeroPad(name=layer.name, inputs=(inputs[0],), shape=shape, padding=padding))


def _pad_function(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    """Zeros around the image and, by a convolution with ones, beside its channels."""
    source, shape = inputs[0], tracer.shape(inputs[0])
    amounts = [tuple(pair) for pair in layer.pad_width]
    if layer.mode != "constant" or len(amounts) != 4 or amounts[0] != (0, 0) or len(shape) != 3:
        refuse(
            layer, f"it pads {layer.pad_width}, mode {layer.mode!r}; supported are zeros around images and channels."
        )
    rows, columns, (before, after) = amounts[1:]
    if rows + columns != (0, 0, 0, 0):
        shape = (shape[0] + sum(rows), shape[1] + sum(columns), shape[2])
        name = f"{layer.name}_image" if before + after else layer.name
        source = tracer.add(ZeroPad(name=name, inputs=(source,), shape=shape, padding=(rows, columns)))
    if not before + after:
        return source
    channels = before + shape[2] + after
    operation = Convolution(
        name=layer.name,
        inputs=(source,),
        shape=(*shape[:2], channels),
        kernel=np.eye(shape[2], channels, before, dtype=np.float32)[None, None],
        bias=np.zeros(channels, np.float32),
        block=DEFAULT_BLOCK,
        strides=(1, 1),
        padding="valid",
    )
    return tracer.add(operation)


def _crop(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    shape = output_shape(tracer, layer, inputs[0])
    cropping = tuple(tuple(pair) for pair in layer.cropping)
    return tracer.add(Crop(name=layer.name, inputs=(inputs[0],), shape=shape, cropping=cropping))


def _up_sampling(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    shape, factors = output_shape(tracer, layer, inputs[0]), tuple(layer.size)
    if layer.interpolation not in ("nearest", "bilinear"):
        refuse(layer, f"it interpolates '{layer.interpolation}'; supported are nearest and bilinear.")
    if layer.interpolation == "bilinear" and any(factor & (factor - 1) for factor in factors):
        refuse(layer, f"it interpolates by {factors}, whose weights are no binary fractions; use powers of two.")
    name = layer.name
    return tracer.add(Resize(name=name, inputs=(inputs[0],), shape=shape, factors=factors, method=layer.interpolation))


def _reshape(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    shape = output_shape(tracer, layer, inputs[0])
    if len(shape) != 1 and not (len(shape) == 3 and shape[:2] == (1, 1)):
        refuse(layer, f"it reshapes to {shape}; supported are vectors (n,) and (1, 1, n).")
    return tracer.add(Reshape(name=layer.name, inputs=(inputs[0],), shape=shape))


LAYERS: dict[type, Handler] = {
    keras.layers.Cropping2D: _crop,
    keras.layers.UpSampling2D: _up_sampling,
    keras.layers.MaxPooling2D: _pool(MaxPool),
    keras.layers.AveragePooling2D: _pool(AveragePool),
    keras.layers.GlobalAveragePooling2D: _global_pool(GlobalAveragePool),
    keras.layers.GlobalMaxPooling2D: _global_pool(GlobalMaxPool),
    keras.layers.ZeroPadding2D: _zero_pad,
    keras.layers.Flatten: _reshape,
    keras.layers.Reshape: _reshape,
}
FUNCTIONS: dict[str, Handler] = {"Pad": _pad_function}
