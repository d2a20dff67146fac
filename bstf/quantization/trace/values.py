"""Layers that map every value by itself: functions, and scales and offsets: a number, one a channel or one a value."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from bstf.quantization.network import BatchNorm, Relu, Softmax, Unary
from bstf.quantization.trace.tracer import Handler, Tracer, finite, function_name, refuse


def activation(tracer: Tracer, layer: Any, source: str, name: str | None = None) -> str:
    """Appends the activation function of a layer, under `name` or one made from its source's."""
    function = layer.activation
    if isinstance(function, keras.layers.Layer):
        return tracer.layer(function, [source])
    common = {"inputs": (source,), "shape": tracer.shape(source)}
    if function in (None, keras.activations.linear):
        return source
    if function in (keras.activations.relu, keras.activations.relu6):
        ceiling = 6.0 if function is keras.activations.relu6 else None
        return tracer.add(Relu(name=name or f"{source}_relu", ceiling=ceiling, **common))
    if function is keras.activations.softmax:
        return tracer.add(Softmax(name=name or f"{source}_softmax", **common))
    if function in _ELEMENTWISE:
        return tracer.add(Unary(name=name or f"{source}_{function.__name__}", function=function, **common))
    label = ".".join(getattr(function, part, "?") for part in ("__module__", "__qualname__"))
    refuse(
        layer,
        f"its activation is {label}; supported are those of keras.activations that map one value to one, and "
        "softmax at the end.",
    )


def _relu_layer(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    common = {"name": layer.name, "inputs": (inputs[0],), "shape": tracer.shape(inputs[0])}
    if not layer.negative_slope and not layer.threshold and layer.max_value in (None, 6):
        return tracer.add(Relu(ceiling=None if layer.max_value is None else 6.0, **common))
    return tracer.add(Unary(function=layer.call, **common))


def _unary_layer(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    shape = tracer.shape(inputs[0])
    return tracer.add(Unary(name=layer.name, inputs=(inputs[0],), shape=shape, function=layer.call))


def _activation_layer(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    return activation(tracer, layer, inputs[0], layer.name)


def _softmax_layer(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    shape = tracer.shape(inputs[0])
    if layer.axis not in (-1, len(shape)):
        refuse(layer, f"it works along axis {layer.axis}; only the last axis is supported.")
    return tracer.add(Softmax(name=layer.name, inputs=(inputs[0],), shape=shape))


def _relu_function(ceiling: float | None) -> Handler:
    def relu(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
        shape = tracer.shape(inputs[0])
        return tracer.add(Relu(name=layer.name, inputs=(inputs[0],), shape=shape, ceiling=ceiling))

    return relu


def _batch_norm(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    shape = tracer.shape(inputs[0])
    if layer.axis % (len(shape) + 1) != len(shape):
        refuse(layer, f"it normalises axis {layer.axis}; only the last axis, the channels, is supported.")
    variance = finite(layer, layer.moving_variance, "moving variance").astype(np.float64) + layer.epsilon
    if not (variance > 0).all():
        refuse(layer, "its moving variance is negative, or zero without an epsilon.")
    scale = 1.0 / np.sqrt(variance)
    if layer.scale:
        scale = scale * finite(layer, layer.gamma, "gamma")
    offset = -finite(layer, layer.moving_mean, "moving mean") * scale
    if layer.center:
        offset = offset + finite(layer, layer.beta, "beta")
    return tracer.add(BatchNorm(name=layer.name, inputs=(inputs[0],), shape=shape, scale=scale, offset=offset))


def _rescaling(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    shape = tracer.shape(inputs[0])
    scale, offset = (_constant(layer, getattr(layer, what), shape, what) for what in ("scale", "offset"))
    return tracer.add(BatchNorm(name=layer.name, inputs=(inputs[0],), shape=shape, scale=scale, offset=offset))


def _normalization(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    shape = tracer.shape(inputs[0])
    if layer.invert:
        refuse(layer, "it inverts a normalisation; use Rescaling.")
    mean, variance = (_constant(layer, getattr(layer, what), shape, what) for what in ("mean", "variance"))
    scale = 1 / np.maximum(np.sqrt(variance), keras.backend.epsilon())
    return tracer.add(BatchNorm(name=layer.name, inputs=(inputs[0],), shape=shape, scale=scale, offset=-mean * scale))


def with_constant(tracer: Tracer, layer: Any, inputs: list[str], arguments: Sequence[Any]) -> str:
    """A tensor and a constant: a batch normalisation of sorts."""
    source, shape = inputs[0], tracer.shape(inputs[0])
    first = not isinstance(arguments[0], keras.KerasTensor)
    constant = _constant(layer, arguments[0 if first else 1], shape, "constant")
    kind, one, zero = function_name(layer), np.ones(shape[-1]), np.zeros(shape[-1])
    if kind in ("Divide", "TrueDivide") and (first or not constant.all()):
        refuse(layer, "it divides by a tensor or by zero.")
    scale, offset = {
        "Add": lambda: (one, constant),
        "Subtract": lambda: (-one, constant) if first else (one, -constant),
        "Multiply": lambda: (constant, zero),
        "Divide": lambda: (1 / constant, zero),
        "TrueDivide": lambda: (1 / constant, zero),
    }[kind]()
    return tracer.add(BatchNorm(name=layer.name, inputs=(source,), shape=shape, scale=scale, offset=offset))


def _constant(layer: Any, value: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    """A number or one a channel as float64 (channels,); other constants of a tensor's shape, a mean image, in that."""
    values = np.asarray(keras.ops.convert_to_numpy(value), np.float64)
    if not np.isfinite(values.astype(np.float32)).all():
        refuse(layer, f"its {what} holds NaN or infinite values.")
    axes = (1,) * (len(shape) + 1 - values.ndim) + values.shape  # with that of the batch
    if len(axes) != len(shape) + 1 or any(size not in (1, whole) for size, whole in zip(axes, (1, *shape))):
        refuse(layer, f"its {what} has the shape {values.shape}, which doesn't fit images {shape}.")
    one_a_channel = max(axes[:-1]) == 1
    return np.broadcast_to(values.ravel(), shape[-1:]) if one_a_channel else np.broadcast_to(values, (1, *shape))[0]


def _identity(tracer: Tracer, layer: Any, inputs: list[str]) -> str:
    return inputs[0]


LAYERS: dict[type, Handler] = {
    keras.layers.BatchNormalization: _batch_norm,
    keras.layers.ReLU: _relu_layer,
    keras.layers.Activation: _activation_layer,
    keras.layers.Softmax: _softmax_layer,
    keras.layers.LeakyReLU: _unary_layer,
    keras.layers.ELU: _unary_layer,
    keras.layers.Rescaling: _rescaling,
    keras.layers.Normalization: _normalization,
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
FUNCTIONS: dict[str, Handler] = {
    "Relu": _relu_function(None),
    "Relu6": _relu_function(6.0),
    **dict.fromkeys(_UNARY, _unary_layer),
}
WITH_CONSTANT = ("Add", "Subtract", "Multiply", "Divide", "TrueDivide")
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
