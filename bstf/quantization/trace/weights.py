"""Layers with weights: convolutions of all kinds, and dense layers."""

from typing import Any

import keras
import numpy as np

from bstf.layers import MaskedConv2D, MaskedConv2DTranspose, MaskedDense, MaskedSeparableConv2D
from bstf.places import effective_kernel, is_masked
from bstf.quantization.network import Convolution, Dense, TransposedConvolution
from bstf.quantization.trace.tracer import DEFAULT_BLOCK, Handler, Tracer, finite, output_shape, refuse
from bstf.quantization.trace.values import activation


def _convolution(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    operation = Convolution(
        name=layer.name,
        inputs=(inputs[0],),
        shape=output_shape(tracer, layer, inputs[0]),
        **_weights(layer),
        **_window(layer),
        groups=layer.groups,
    )
    return activation(tracer, layer, tracer.add(operation))


def _depthwise_convolution(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    shape = output_shape(tracer, layer, inputs[0])
    bias = _bias(layer, shape[-1])
    name = _add_depthwise(tracer, layer, inputs[0], layer.name, layer.kernel, bias, shape)
    return activation(tracer, layer, name)


def _add_depthwise(
    tracer: Tracer, layer: Any, source: str, name: str, kernel: Any, bias: np.ndarray, shape: tuple[int, ...]
) -> str:
    """A depthwise convolution is one of as many groups as channels: kernel (h, w, cin, n) as (h, w, 1, cin * n)."""
    values = finite(layer, kernel, "depthwise kernel") + 0.0
    height, width, channels, _ = values.shape
    operation = Convolution(
        name=name,
        inputs=(source,),
        shape=shape,
        kernel=values.reshape(height, width, 1, -1),
        bias=bias,
        block=DEFAULT_BLOCK,
        **_window(layer),
        groups=channels,
    )
    return tracer.add(operation)


def _separable_convolution(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    """A depthwise convolution without bias, on a grid of its own, then one of 1x1."""
    shape = output_shape(tracer, layer, inputs[0])
    weights = _weights(layer)
    cin = weights["kernel"].shape[-2]
    zeros, between = np.zeros(cin, np.float32), (*shape[:2], cin)
    name = f"{layer.name}_depthwise"
    operation = Convolution(
        name=layer.name,
        inputs=(_add_depthwise(tracer, layer, inputs[0], name, layer.depthwise_kernel, zeros, between),),
        shape=shape,
        **weights,
        strides=(1, 1),
        padding="valid",
    )
    return activation(tracer, layer, tracer.add(operation))


def _transposed_convolution(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    if max(layer.dilation_rate) > 1 or layer.output_padding is not None:
        refuse(layer, "it has a dilation_rate or an output_padding; neither is supported.")
    operation = TransposedConvolution(
        name=layer.name,
        inputs=(inputs[0],),
        shape=output_shape(tracer, layer, inputs[0]),
        **_weights(layer),
        strides=tuple(layer.strides),
        padding=layer.padding,
    )
    return activation(tracer, layer, tracer.add(operation))


def _dense(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    if len(tracer.shape(inputs[0])) != 1:
        refuse(layer, f"its input has the shape {tracer.shape(inputs[0])}, not a vector; put a Flatten in front.")
    shape = output_shape(tracer, layer, inputs[0])
    name = tracer.add(Dense(name=layer.name, inputs=(inputs[0],), shape=shape, **_weights(layer)))
    return activation(tracer, layer, name)


def _window(layer: Any) -> dict[str, Any]:
    if layer.padding not in ("valid", "same"):
        refuse(layer, f"its padding is {layer.padding!r}; supported are 'valid' and 'same'.")
    strides, dilation = tuple(layer.strides), tuple(layer.dilation_rate)
    if max(strides) > 1 and max(dilation) > 1:
        refuse(layer, f"it has strides {strides} and dilation_rate {dilation}; one of both must be 1.")
    return {"strides": strides, "padding": layer.padding, "dilation": dilation}


def _weights(layer: Any) -> dict[str, Any]:
    kernel = finite(layer, effective_kernel(layer), "kernel")
    return {
        "kernel": kernel + 0.0,
        "bias": _bias(layer, kernel.shape[-1]),
        "block": getattr(layer, "block", DEFAULT_BLOCK),
        "gamma": keras.ops.convert_to_numpy(layer.gamma) if is_masked(layer) else None,
    }


def _bias(layer: Any, channels: int) -> np.ndarray:
    return finite(layer, layer.bias, "bias") if layer.use_bias else np.zeros(channels, np.float32)


LAYERS: dict[type, Handler] = {
    keras.layers.Conv2D: _convolution,
    MaskedConv2D: _convolution,
    keras.layers.DepthwiseConv2D: _depthwise_convolution,
    keras.layers.SeparableConv2D: _separable_convolution,
    MaskedSeparableConv2D: _separable_convolution,
    keras.layers.Dense: _dense,
    MaskedDense: _dense,
    keras.layers.Conv2DTranspose: _transposed_convolution,
    MaskedConv2DTranspose: _transposed_convolution,
}
