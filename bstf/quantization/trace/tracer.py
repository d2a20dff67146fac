"""The list of operations to which handlers append, one handler a kind of layer; and what they need of a layer."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import keras
import numpy as np

from bstf.blocks import BlockShape
from bstf.quantization.fixed_point import FixedPoint
from bstf.quantization.network import Operation

_SUPPORTED = (
    "Conv2D, Conv2DTranspose, DepthwiseConv2D, SeparableConv2D, Dense and their masked forms, BatchNormalization, "
    "Rescaling, Normalization, ReLU, LeakyReLU, ELU and other functions of one value, Add, Subtract, Multiply, "
    "Concatenate, MaxPooling2D, AveragePooling2D, GlobalAveragePooling2D, GlobalMaxPooling2D, ZeroPadding2D, "
    "Cropping2D, UpSampling2D, Flatten, Reshape to a vector, parts and orders of channels, Dropout and a last Softmax"
)
DEFAULT_BLOCK = BlockShape(8, 8)  # of layers that were never made sparse


class Tracer:
    """The operations so far, by name.

    Attributes:
        operations: by name, every operation after its inputs.
        singles: by a name that is no operation's: a channel on its own, as the tensor that it is of and its number.
    """

    def __init__(
        self, layers: Mapping[type, "Handler"], functions: Mapping[str, "Handler"], of_several: Collection["Handler"]
    ) -> None:
        """Handlers by class of layer and by name of a function of `keras.ops`, and those that take several tensors."""
        self.operations: dict[str, Operation] = {}
        self.singles: dict[str, tuple[str, int]] = {}
        self._layers, self._functions, self._of_several = layers, functions, of_several

    def add(self, operation: Operation) -> str:
        """Appends an operation; returns its name, which gets a number if there is one of this name."""
        name, number = operation.name, 0
        while name in self.operations:  # a layer that is called twice, or a name that nested models share
            number += 1
            name = f"{operation.name}_{number}"
        self.operations[name] = replace(operation, name=name)
        return name

    def single_channel(self, source: str, number: int) -> str:
        """A channel on its own, which only a stack may read: its name."""
        name = f"channel {number} of {source}"
        self.singles[name] = source, number
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an operation's output, without batch."""
        return self.operations[name].shape

    def layer(self, layer: Any, inputs: list[str]) -> str:
        """Appends a layer's operations; returns the name of the last."""
        # Of exactly these classes: what a subclass computes isn't known.
        handler = self._layers.get(type(layer)) or self._functions.get(function_name(layer))
        if handler is None:
            _unsupported(layer)
        if getattr(layer, "data_format", "channels_last") != "channels_last":
            refuse(layer, "its data format is channels first; only channels last is supported.")
        if len(inputs) > 1 and handler not in self._of_several:
            refuse(layer, f"it is called with {len(inputs)} tensors, of which it may have one.")
        return handler(self, layer, inputs)


Handler = Callable[[Tracer, Any, list[str]], str]
"""Appends the operations of a layer that reads the given ones; returns the name of the last."""


def refuse(layer: Any, reason: str) -> NoReturn:
    """Raises ValueError with a sentence that names the layer."""
    raise ValueError(f"layer {layer.name!r} ({type(layer).__name__}) can't be quantised: {reason}")


def function_name(operation: Any) -> str | None:
    """Class name of an operation that `keras.ops` or an operator such as + made."""
    return type(operation).__name__ if type(operation).__module__.startswith("keras.src.ops.") else None


def output_shape(tracer: Tracer, layer: Any, source: str) -> tuple[int, ...]:
    """Shape of a layer's output, without batch, for the output of operation `source`."""
    shape = tuple(layer.compute_output_shape((None, *tracer.shape(source)))[1:])
    if any(size is None or size < 1 for size in shape):
        refuse(layer, f"its output for an input of shape {tracer.shape(source)} would have the shape {shape}.")
    return shape


def finite(layer: Any, variable: Any, what: str) -> np.ndarray:
    """Values of a layer's variable as float32, refused if they are NaN or infinite."""
    values = keras.ops.convert_to_numpy(variable).astype(np.float32)
    if not np.isfinite(values).all():
        refuse(
            layer,
            f"its {what} holds NaN or infinite values; quantise a checkpoint from before training diverged.",
        )
    return values


def _unsupported(layer: Any) -> NoReturn:
    if isinstance(layer, FixedPoint):
        raise ValueError(f"layer {layer.name!r} is a FixedPoint: the model is quantised already.")
    refuse(layer, f"supported are {_SUPPORTED}.")
