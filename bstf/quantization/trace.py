"""A Keras model as a flat list of typed operations.

Sequential, functional and nested models become one list in an order in which every operation follows its
inputs. Activations that layers carry as an argument become operations of their own, dropout and other
identities vanish, masked layers give their masked kernels. Whatever can't be expressed is refused with a
sentence that names the layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import keras
import numpy as np

from bstf.blocks import BlockShape
from bstf.layers import MaskedConv2D, MaskedConv2DTranspose, MaskedDense, MaskedSeparableConv2D
from bstf.places import effective_kernel, is_masked
from bstf.quantization.fixed_point import FixedPoint
from bstf.quantization.network import (
    Add,
    AveragePool,
    BatchNorm,
    Concat,
    Convolution,
    Crop,
    Dense,
    GlobalAveragePool,
    GlobalMaxPool,
    GlobalPool,
    Input,
    MaxPool,
    Multiply,
    Network,
    Operation,
    Pool,
    Relu,
    Reshape,
    Resize,
    Softmax,
    TransposedConvolution,
    Unary,
    ZeroPad,
)

SUPPORTED = (
    "Conv2D, Conv2DTranspose, DepthwiseConv2D, SeparableConv2D, Dense and their masked forms, BatchNormalization, "
    "Rescaling, Normalization, ReLU, LeakyReLU, ELU and other functions of one value, Add, Subtract, Multiply, "
    "Concatenate, MaxPooling2D, AveragePooling2D, GlobalAveragePooling2D, GlobalMaxPooling2D, ZeroPadding2D, "
    "Cropping2D, UpSampling2D, Flatten, Reshape to a vector, Dropout and a last Softmax"
)
_DEFAULT_BLOCK = BlockShape(8, 8)  # of layers that were never made sparse


def trace(model: keras.Model) -> Network:
    """Turns a Keras model into a network, as it is.

    Args:
        model: a built Sequential or functional model (nested ones included) of inputs (h, w, c) or (c,). It is
            only read.

    Returns:
        The network, batch normalisation not folded.

    Raises:
        TypeError: not a Keras model.
        ValueError: what the model is or holds isn't supported; the sentence names the layer.
    """
    graph = _graph(model)
    tracer = _Tracer()
    outputs = tracer.trace(model, [tracer.input(tensor) for tensor in graph.inputs])
    return Network(tracer.operations, tuple(outputs), graph._outputs_struct, graph._inputs_struct)


def _graph(model: Any) -> Any:
    """The functional graph of a Sequential or functional model."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"quantisation needs a Keras model; got {type(model).__name__}.")
    if isinstance(model, keras.Sequential):
        if not model.built or model._functional is None:
            raise ValueError(f"model {model.name!r} isn't built; give it a keras.Input as its first layer.")
        return model._functional
    if not hasattr(model, "_nodes_by_depth"):
        raise ValueError(
            f"model {model.name!r} is a subclassed {type(model).__name__}, whose layers can't be read; write "
            "it as a functional or Sequential model."
        )
    return model


def _refuse(layer: Any, reason: str) -> NoReturn:
    raise ValueError(f"layer {layer.name!r} ({type(layer).__name__}) can't be quantised: {reason}")


def _unsupported(layer: Any) -> NoReturn:
    if isinstance(layer, FixedPoint):
        raise ValueError(f"layer {layer.name!r} is a FixedPoint: the model is quantised already.")
    _refuse(layer, f"supported are {SUPPORTED}.")


class _Tracer:
    """Walks the graph of a model and of the models in it and collects operations."""

    def __init__(self) -> None:
        self.operations: dict[str, Operation] = {}

    def input(self, tensor: Any) -> str:
        shape = tuple(tensor.shape[1:])
        name = tensor._keras_history.operation.name
        if None in shape or len(shape) not in (1, 3):
            raise ValueError(
                f"input {name!r} has the shape {shape}; quantisation needs images (height, width, channels) "
                "or vectors of fixed size: build the model with such a keras.Input."
            )
        return self.add(Input(name=name, inputs=(), shape=shape))

    def add(self, operation: Operation) -> str:
        name, number = operation.name, 0
        while name in self.operations:  # a layer that is called twice, or a name that nested models share
            number += 1
            name = f"{operation.name}_{number}"
        self.operations[name] = replace(operation, name=name)
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        return self.operations[name].shape

    def trace(self, model: keras.Model, inputs: Sequence[str]) -> list[str]:
        graph = _graph(model)
        tensors = {id(tensor): name for tensor, name in zip(graph.inputs, inputs)}
        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                if node.is_input:
                    continue
                names = [tensors[id(tensor)] for tensor in node.input_tensors]
                for tensor, name in zip(node.outputs, self.call(node, names)):
                    tensors[id(tensor)] = name
        return [tensors[id(tensor)] for tensor in graph.outputs]

    def call(self, node: Any, inputs: list[str]) -> list[str]:
        layer = node.operation
        if isinstance(layer, keras.Model):
            return self.trace(layer, inputs)
        if node.arguments.kwargs.get("training"):
            _refuse(layer, "it is called with training=True; call it without.")
        if _function_name(layer) == "Pad" and any((*node.arguments.args[1:], *node.arguments.kwargs.values())):
            _refuse(layer, "it pads with another value than zero.")
        if _function_name(layer) in _WITH_CONSTANT and len(inputs) == 1:
            return [_with_constant(self, layer, inputs, node.arguments.args)]
        return [self.layer(layer, inputs)]

    def layer(self, layer: Any, inputs: list[str]) -> str:
        """Appends a layer's operations; returns the name of the last."""
        # Of exactly these classes: what a subclass computes isn't known.
        handler = _HANDLERS.get(type(layer)) or _FUNCTIONS.get(_function_name(layer))
        if handler is None:
            _unsupported(layer)
        if getattr(layer, "data_format", "channels_last") != "channels_last":
            _refuse(layer, "its data format is channels first; only channels last is supported.")
        if len(inputs) > 1 and handler not in _OF_SEVERAL:
            _refuse(layer, f"it is called with {len(inputs)} tensors, of which it may have one.")
        return handler(self, layer, inputs)

    def activation(self, layer: Any, source: str, name: str | None = None) -> str:
        """Appends the activation function of a layer, under `name` or one made from its source's."""
        function = layer.activation
        if isinstance(function, keras.layers.Layer):
            return self.layer(function, [source])
        common = {"inputs": (source,), "shape": self.shape(source)}
        if function in (None, keras.activations.linear):
            return source
        if function in (keras.activations.relu, keras.activations.relu6):
            ceiling = 6.0 if function is keras.activations.relu6 else None
            return self.add(Relu(name=name or f"{source}_relu", ceiling=ceiling, **common))
        if function is keras.activations.softmax:
            return self.add(Softmax(name=name or f"{source}_softmax", **common))
        if function in _ELEMENTWISE:
            return self.add(Unary(name=name or f"{source}_{function.__name__}", function=function, **common))
        label = ".".join(getattr(function, part, "?") for part in ("__module__", "__qualname__"))
        _refuse(
            layer,
            f"its activation is {label}; supported are those of keras.activations that map one value to one, and "
            "softmax at the end.",
        )


def _function_name(operation: Any) -> str | None:
    """Class name of an operation that `keras.ops` or an operator such as + made."""
    return type(operation).__name__ if type(operation).__module__.startswith("keras.src.ops.") else None


def _output_shape(tracer: _Tracer, layer: Any, source: str) -> tuple[int, ...]:
    shape = tuple(layer.compute_output_shape((None, *tracer.shape(source)))[1:])
    if any(size is None or size < 1 for size in shape):
        _refuse(layer, f"its output for an input of shape {tracer.shape(source)} would have the shape {shape}.")
    return shape


def _array(layer: Any, variable: Any, what: str) -> np.ndarray:
    values = keras.ops.convert_to_numpy(variable).astype(np.float32)
    if not np.isfinite(values).all():
        _refuse(
            layer,
            f"its {what} holds NaN or infinite values; quantise a checkpoint from before training diverged.",
        )
    return values


def _weights(layer: Any) -> dict[str, Any]:
    kernel = _array(layer, effective_kernel(layer), "kernel")
    return {
        "kernel": kernel + 0.0,
        "bias": _bias(layer, kernel.shape[-1]),
        "block": getattr(layer, "block", _DEFAULT_BLOCK),
        "gamma": keras.ops.convert_to_numpy(layer.gamma) if is_masked(layer) else None,
    }


def _bias(layer: Any, channels: int) -> np.ndarray:
    return _array(layer, layer.bias, "bias") if layer.use_bias else np.zeros(channels, np.float32)


def _convolution(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
    operation = Convolution(
        name=layer.name,
        inputs=(inputs[0],),
        shape=_output_shape(tracer, layer, inputs[0]),
        **_weights(layer),
        **_window(layer),
        groups=layer.groups,
    )
    return tracer.activation(layer, tracer.add(operation))


def _window(layer: Any) -> dict[str, Any]:
    if layer.padding not in ("valid", "same"):
        _refuse(layer, f"its padding is {layer.padding!r}; supported are 'valid' and 'same'.")
    strides, dilation = tuple(layer.strides), tuple(layer.dilation_rate)
    if max(strides) > 1 and max(dilation) > 1:
        _refuse(layer, f"it has strides {strides} and dilation_rate {dilation}; one of both must be 1.")
    return {"strides": strides, "padding": layer.padding, "dilation": dilation}


def _depthwise_convolution(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
    shape = _output_shape(tracer, layer, inputs[0])
    bias = _bias(layer, shape[-1])
    name = _add_depthwise(tracer, layer, inputs[0], layer.name, layer.kernel, bias, shape)
    return tracer.activation(layer, name)


def _add_depthwise(
    tracer: _Tracer, layer: Any, source: str, name: str, kernel: Any, bias: np.ndarray, shape: tuple[int, ...]
) -> str:
    """A depthwise convolution is one of as many groups as channels: kernel (h, w, cin, n) as (h, w, 1, cin * n)."""
    values = _array(layer, kernel, "depthwise kernel") + 0.0
    height, width, channels, _ = values.shape
    operation = Convolution(
        name=name,
        inputs=(source,),
        shape=shape,
        kernel=values.reshape(height, width, 1, -1),
        bias=bias,
        block=_DEFAULT_BLOCK,
        **_window(layer),
        groups=channels,
    )
    return tracer.add(operation)


def _separable_convolution(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
    """A depthwise convolution without bias, on a grid of its own, then one of 1x1."""
    shape = _output_shape(tracer, layer, inputs[0])
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
    return tracer.activation(layer, tracer.add(operation))


def _dense(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
    if len(tracer.shape(inputs[0])) != 1:
        _refuse(layer, f"its input has the shape {tracer.shape(inputs[0])}, not a vector; put a Flatten in front.")
    shape = _output_shape(tracer, layer, inputs[0])
    name = tracer.add(Dense(name=layer.name, inputs=(inputs[0],), shape=shape, **_weights(layer)))
    return tracer.activation(layer, name)


def _batch_norm(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
    shape = tracer.shape(inputs[0])
    if layer.axis % (len(shape) + 1) != len(shape):
        _refuse(layer, f"it normalises axis {layer.axis}; only the last axis, the channels, is supported.")
    variance = _array(layer, layer.moving_variance, "moving variance").astype(np.float64) + layer.epsilon
    if not (variance > 0).all():
        _refuse(layer, "its moving variance is negative, or zero without an epsilon.")
    scale = 1.0 / np.sqrt(variance)
    if layer.scale:
        scale = scale * _array(layer, layer.gamma, "gamma")
    offset = -_array(layer, layer.moving_mean, "moving mean") * scale
    if layer.center:
        offset = offset + _array(layer, layer.beta, "beta")
    return tracer.add(BatchNorm(name=layer.name, inputs=(inputs[0],), shape=shape, scale=scale, offset=offset))


def _relu_layer(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
    common = {"name": layer.name, "inputs": (inputs[0],), "shape": tracer.shape(inputs[0])}
    if not layer.negative_slope and not layer.threshold and layer.max_value in (None, 6):
        return tracer.add(Relu(ceiling=None if layer.max_value is None else 6.0, **common))
    return tracer.add(Unary(function=layer.call, **common))


def _unary_layer(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
    shape = tracer.shape(inputs[0])
    return tracer.add(Unary(name=layer.name, inputs=(inputs[0],), shape=shape, function=layer.call))


def _activation_layer(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
    return tracer.activation(layer, inputs[0], layer.name)


def _softmax_layer(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
    shape = tracer.shape(inputs[0])
    if layer.axis not in (-1, len(shape)):
        _refuse(layer, f"it works along axis {layer.axis}; only the last axis is supported.")
    return tracer.add(Softmax(name=layer.name, inputs=(inputs[0],), shape=shape))


def _relu_function(ceiling: float | None) -> Callable[[_Tracer, Any, list[str]], str]:
    def relu(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
        shape = tracer.shape(inputs[0])
        return tracer.add(Relu(name=layer.name, inputs=(inputs[0],), shape=shape, ceiling=ceiling))

    return relu


def _unary_function(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
    shape = tracer.shape(inputs[0])
    return tracer.add(Unary(name=layer.name, inputs=(inputs[0],), shape=shape, function=layer.call))


def _sum(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
    return _chain(tracer, layer, inputs, Add)


def _difference(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
    first, second = inputs
    shape = _wider(tracer, layer, first, second)
    if tracer.shape(first) != shape:
        _refuse(layer, f"it subtracts an image {shape} from one pixel; negate and add.")
    return tracer.add(Add(name=layer.name, inputs=(first, second), shape=shape, subtract=True))


def _product(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
    return _chain(tracer, layer, inputs, Multiply)


def _chain(tracer: _Tracer, layer: Any, inputs: list[str], kind: type[Operation]) -> str:
    """Two at a time; the last partial result takes the layer's name."""
    if len(inputs) < 2:
        _refuse(layer, "it has one input and needs two or more.")
    total = inputs[0]
    for number, term in enumerate(inputs[1:], start=2):
        name = layer.name if number == len(inputs) else f"{layer.name}_first{number}"
        shape = _wider(tracer, layer, total, term)
        pair = (total, term) if tracer.shape(total) == shape else (term, total)
        total = tracer.add(kind(name=name, inputs=pair, shape=shape))
    return total


def _wider(tracer: _Tracer, layer: Any, first: str, second: str) -> tuple[int, ...]:
    """The shape of two tensors, one of which may be a single pixel."""
    shapes = [tracer.shape(name) for name in (first, second)]
    for shape, other in (shapes, shapes[::-1]):
        if other == shape or (len(shape) == 3 and other == (1, 1, shape[-1])):
            return shape
    _refuse(
        layer,
        f"its inputs have the shapes {shapes[0]}, {shapes[1]}; it needs two tensors of one shape, or an image and one "
        "pixel (1, 1, channels).",
    )


def _with_constant(tracer: _Tracer, layer: Any, inputs: list[str], arguments: Sequence[Any]) -> str:
    """A tensor and a number, or a number a channel: a batch normalisation of sorts."""
    source, shape = inputs[0], tracer.shape(inputs[0])
    first = not isinstance(arguments[0], keras.KerasTensor)
    constant = _by_channel(layer, arguments[0 if first else 1], shape, "constant")
    kind, one, zero = _function_name(layer), np.ones(shape[-1]), np.zeros(shape[-1])
    if kind in ("Divide", "TrueDivide") and (first or not constant.all()):
        _refuse(layer, "it divides by a tensor or by zero.")
    scale, offset = {
        "Add": lambda: (one, constant),
        "Subtract": lambda: (-one, constant) if first else (one, -constant),
        "Multiply": lambda: (constant, zero),
        "Divide": lambda: (1 / constant, zero),
        "TrueDivide": lambda: (1 / constant, zero),
    }[kind]()
    return tracer.add(BatchNorm(name=layer.name, inputs=(source,), shape=shape, scale=scale, offset=offset))


def _rescaling(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
    shape = tracer.shape(inputs[0])
    scale, offset = (_by_channel(layer, getattr(layer, what), shape, what) for what in ("scale", "offset"))
    return tracer.add(BatchNorm(name=layer.name, inputs=(inputs[0],), shape=shape, scale=scale, offset=offset))


def _normalization(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
    shape = tracer.shape(inputs[0])
    if layer.invert:
        _refuse(layer, "it inverts a normalisation; use Rescaling.")
    mean, variance = (_by_channel(layer, getattr(layer, what), shape, what) for what in ("mean", "variance"))
    scale = 1 / np.maximum(np.sqrt(variance), keras.backend.epsilon())
    return tracer.add(BatchNorm(name=layer.name, inputs=(inputs[0],), shape=shape, scale=scale, offset=-mean * scale))


def _by_channel(layer: Any, value: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    """A number, or a number a channel, as float64 (channels,)."""
    values = np.asarray(keras.ops.convert_to_numpy(value), np.float64)
    one_a_channel = values.shape[-1:] == shape[-1:] and values.size == shape[-1] and values.ndim <= len(shape) + 1
    if values.size != 1 and not one_a_channel:
        _refuse(layer, f"its {what} has the shape {values.shape}; supported are a number and one a channel.")
    if not np.isfinite(values.astype(np.float32)).all():
        _refuse(layer, f"its {what} holds NaN or infinite values.")
    return np.broadcast_to(values.ravel(), shape[-1:])


def _concat(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
    shapes = [tracer.shape(name) for name in inputs]
    if layer.axis % (len(shapes[0]) + 1) != len(shapes[0]):
        _refuse(layer, f"it joins along axis {layer.axis}; only the last axis, the channels, is supported.")
    shape = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
    return tracer.add(Concat(name=layer.name, inputs=tuple(inputs), shape=shape))


def _pool(kind: type[Pool]) -> Callable[[_Tracer, Any, list[str]], str]:
    def pool(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
        shape = _output_shape(tracer, layer, inputs[0])
        if kind is AveragePool and len(set(layer.strides)) > 1:
            _refuse(layer, f"its strides are {tuple(layer.strides)}; average pooling needs equal ones.")
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


def _global_pool(kind: type[GlobalPool]) -> Callable[[_Tracer, Any, list[str]], str]:
    def pool(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
        shape = _output_shape(tracer, layer, inputs[0])
        return tracer.add(kind(name=layer.name, inputs=(inputs[0],), shape=shape, keepdims=bool(layer.keepdims)))

    return pool


def _zero_pad(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
    shape = _output_shape(tracer, layer, inputs[0])
    padding = tuple(tuple(pair) for pair in layer.padding)
    return tracer.add(ZeroPad(name=layer.name, inputs=(inputs[0],), shape=shape, padding=padding))


def _pad_function(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
    """Zeros around the image and, by a convolution with ones, beside its channels."""
    source, shape = inputs[0], tracer.shape(inputs[0])
    amounts = [tuple(pair) for pair in layer.pad_width]
    if layer.mode != "constant" or len(amounts) != 4 or amounts[0] != (0, 0) or len(shape) != 3:
        _refuse(
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
        block=_DEFAULT_BLOCK,
        strides=(1, 1),
        padding="valid",
    )
    return tracer.add(operation)


def _crop(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
    shape = _output_shape(tracer, layer, inputs[0])
    cropping = tuple(tuple(pair) for pair in layer.cropping)
    return tracer.add(Crop(name=layer.name, inputs=(inputs[0],), shape=shape, cropping=cropping))


def _up_sampling(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
    shape, factors = _output_shape(tracer, layer, inputs[0]), tuple(layer.size)
    if layer.interpolation not in ("nearest", "bilinear"):
        _refuse(layer, f"it interpolates '{layer.interpolation}'; supported are nearest and bilinear.")
    if layer.interpolation == "bilinear" and any(factor & (factor - 1) for factor in factors):
        _refuse(layer, f"it interpolates by {factors}, whose weights are no binary fractions; use powers of two.")
    name = layer.name
    return tracer.add(Resize(name=name, inputs=(inputs[0],), shape=shape, factors=factors, method=layer.interpolation))


def _transposed_convolution(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
    if max(layer.dilation_rate) > 1 or layer.output_padding is not None:
        _refuse(layer, "it has a dilation_rate or an output_padding; neither is supported.")
    operation = TransposedConvolution(
        name=layer.name,
        inputs=(inputs[0],),
        shape=_output_shape(tracer, layer, inputs[0]),
        **_weights(layer),
        strides=tuple(layer.strides),
        padding=layer.padding,
    )
    return tracer.activation(layer, tracer.add(operation))


def _reshape(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
    shape = _output_shape(tracer, layer, inputs[0])
    if len(shape) != 1 and not (len(shape) == 3 and shape[:2] == (1, 1)):
        _refuse(layer, f"it reshapes to {shape}; supported are vectors (n,) and (1, 1, n).")
    return tracer.add(Reshape(name=layer.name, inputs=(inputs[0],), shape=shape))


def _identity(tracer: _Tracer, layer: Any, inputs: list[str]) -> str:
    return inputs[0]


_HANDLERS = {
    keras.layers.Conv2D: _convolution,
    MaskedConv2D: _convolution,
    keras.layers.DepthwiseConv2D: _depthwise_convolution,
    keras.layers.SeparableConv2D: _separable_convolution,
    MaskedSeparableConv2D: _separable_convolution,
    keras.layers.Dense: _dense,
    MaskedDense: _dense,
    keras.layers.BatchNormalization: _batch_norm,
    keras.layers.ReLU: _relu_layer,
    keras.layers.Activation: _activation_layer,
    keras.layers.Softmax: _softmax_layer,
    keras.layers.LeakyReLU: _unary_layer,
    keras.layers.ELU: _unary_layer,
    keras.layers.Conv2DTranspose: _transposed_convolution,
    MaskedConv2DTranspose: _transposed_convolution,
    keras.layers.Rescaling: _rescaling,
    keras.layers.Normalization: _normalization,
    keras.layers.Add: _sum,
    keras.layers.Subtract: _difference,
    keras.layers.Multiply: _product,
    keras.layers.Cropping2D: _crop,
    keras.layers.UpSampling2D: _up_sampling,
    keras.layers.Concatenate: _concat,
    keras.layers.MaxPooling2D: _pool(MaxPool),
    keras.layers.AveragePooling2D: _pool(AveragePool),
    keras.layers.GlobalAveragePooling2D: _global_pool(GlobalAveragePool),
    keras.layers.GlobalMaxPooling2D: _global_pool(GlobalMaxPool),
    keras.layers.ZeroPadding2D: _zero_pad,
    keras.layers.Flatten: _reshape,
    keras.layers.Reshape: _reshape,
    keras.layers.Dropout: _identity,
    keras.layers.SpatialDropout2D: _identity,
    keras.layers.AlphaDropout: _identity,
    keras.layers.GaussianDropout: _identity,
    keras.layers.GaussianNoise: _identity,
    keras.layers.ActivityRegularization: _identity,
    keras.layers.Identity: _identity,
}
_UNARY = (
    *("Absolute", "Elu", "Exp", "Gelu", "HardSigmoid", "HardSilu", "LeakyRelu", "Negative", "Selu", "Sigmoid", "Silu"),
    *("Softplus", "Softsign", "Sqrt", "Square", "Tanh"),
)
_FUNCTIONS = {  # of keras.ops
    "Add": _sum,
    "Subtract": _difference,
    "Multiply": _product,
    "Concatenate": _concat,
    "Pad": _pad_function,
    "Relu": _relu_function(None),
    "Relu6": _relu_function(6.0),
    **dict.fromkeys(_UNARY, _unary_function),
}
_OF_SEVERAL = (_sum, _difference, _product, _concat)
_WITH_CONSTANT = ("Add", "Subtract", "Multiply", "Divide", "TrueDivide")
_ELEMENTWISE = tuple(
    getattr(keras.activations, name)
    for name in (
        "celu",
        "elu",
        "exponential",
        "gelu",
        "hard_shrink",
        "hard_sigmoid",
        "hard_silu",
        "hard_tanh",
        "leaky_relu",
        "log_sigmoid",
        "mish",
        "selu",
        "sigmoid",
        "silu",
        "soft_shrink",
        "softplus",
        "softsign",
        "sparse_plus",
        "squareplus",
        "tanh",
        "tanh_shrink",
        "threshold",
    )
    if hasattr(keras.activations, name)
)
