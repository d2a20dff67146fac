"""Layers of a model that trains on its grids: forward the fixed-point arithmetic, backward straight through.

A grid has a threshold t, and its position is 7 - ceil(log2 t): the grid reaches from -2**ceil(log2 t) to one unit
below 2**ceil(log2 t). With learned thresholds log2 t trains like a weight.
Source: Jain et al. 2019, "Trained Quantization Thresholds" (arXiv 1903.08066), sections 3.2 and 3.3.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from bstf.blocks import expand, grid
from bstf.quantization.fixed_point import (
    FixedPointConv2D,
    FixedPointConv2DTranspose,
    FixedPointDense,
    FixedPointDepthwiseConv2D,
)
from bstf.quantization.positions import HIGHEST, LOWEST

_COARSEST = 100  # binary logarithm of the largest step, with which 128 steps still fit float32
_STEPS = np.ldexp(np.float32(1), np.arange(-_COARSEST, _COARSEST + 1))  # exact, where a backend's 2**x may not be


def trainable_fake_quantize(x: Any, log2_threshold: Any, half_even: bool = False) -> Any:
    """Puts a tensor on the grid of a threshold, with gradients for both.

    Forward it is `fake_quantize` at the position 7 - ceil(log2 t). Backward, with s the step of the grid and
    r = round(x / s), the gradients are those of Jain et al. 2019, section 3.3:

        dq/dx = 1 if -128 <= r <= 127, else 0
        dq/dlog2 t = s * ln 2 * (r - x / s) if -128 <= r <= 127, else s * ln 2 * clip(r, -128, 127)

    Args:
        x: a float32 tensor.
        log2_threshold: a float32 scalar.
        half_even: whether ties round to even, as those of weights and biases do, and not up.

    Returns:
        A float32 tensor of the shape of `x`.
    """
    index = ops.cast(ops.ceil(log2_threshold), "int32") - 7 + _COARSEST
    step = ops.take(ops.convert_to_tensor(_STEPS), ops.clip(index, 0, 2 * _COARSEST))
    value = ops.stop_gradient(x)
    low, high = LOWEST * step, HIGHEST * step
    clipped = ops.clip(value, low, high)
    if half_even:
        quantised = ops.round(clipped / step) * step
    else:  # as in fake_quantize, so that a trained and a converted model round alike, whatever the bits of x
        quantised = ops.floor((clipped - low) / step + 0.5) * step + low
    held = ops.cast((value >= low - step / 2) & (value < high + step / 2), "float32")
    slope = math.log(2) * (quantised - held * value)
    linear = held * x + slope * log2_threshold
    return quantised + (linear - ops.stop_gradient(linear))  # the bracket is 0 with the gradients of `linear`


def threshold_of(position: int) -> float:
    """The log2 threshold in the middle of those that have a position."""
    return 6.5 - position


def position_of(log2_threshold: Any) -> int:
    """The position of a grid with this log2 threshold, a variable."""
    return 7 - math.ceil(float(ops.convert_to_numpy(log2_threshold)))


@keras.saving.register_keras_serializable("bstf")
class TrainableGrid(keras.layers.Layer):
    """Puts a tensor on the grid of its threshold; several tensors that share a grid share the layer.

    Args:
        tensor: name of the operation that owns the grid.
        initial_position: position to start with.
        learned: whether the threshold trains.
        **kwargs: of `keras.layers.Layer`; the layer computes in float32 under any dtype policy.

    Attributes:
        log2_threshold: the variable.

    Example:
        >>> TrainableGrid("conv1", 4)
    """

    def __init__(self, tensor: str, initial_position: int, learned: bool = True, **kwargs: Any):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.tensor, self.initial_position, self.learned = tensor, int(initial_position), bool(learned)
        self.log2_threshold = _threshold(self, "log2_threshold", self.initial_position)
        self.built = True

    @property
    def position(self) -> int:
        """The position that the threshold has now."""
        return position_of(self.log2_threshold)

    def call(self, inputs: Any) -> Any:
        """Returns `inputs` on the grid."""
        return trainable_fake_quantize(inputs, self.log2_threshold)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Sequence[int | None]:
        """The shape stays."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        own = {"tensor": self.tensor, "initial_position": self.initial_position, "learned": self.learned}
        return {**super().get_config(), **own}


class _TrainableWeights:
    """What the layers with weights share: float weights beneath the grids, and thresholds of kernel and bias."""

    swapped = False  # whether the kernel ends in (cout, cin)

    def __init__(self, *args: Any, learned: bool = True, **kwargs: Any):
        # Sums beyond float32 are rare, and float64 would make the training slow.
        super().__init__(*args, **{**kwargs, "accumulator": "float32"})
        self.learned = bool(learned)

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates kernel and bias, their thresholds, and Γ where a kernel has blocks."""
        super().build(input_shape)
        self.kernel_threshold = _threshold(self, "kernel_log2_threshold", self.kernel_position)
        self.bias_threshold = _threshold(self, "bias_log2_threshold", self.bias_position)
        if hasattr(self, "block") and getattr(self, "groups", 1) == 1:
            shape = grid(*self._plane(), self.block)
            self.gamma = self.add_weight(name="gamma", shape=shape, initializer="ones", trainable=False)
        else:
            self.gamma = None

    def _plane(self) -> tuple[int, int]:
        first, second = self.kernel.shape[-2:]
        return (second, first) if self.swapped else (first, second)

    def quantised_kernel(self) -> Any:
        """The kernel on the grid of its threshold, exactly zero under a zero of Γ."""
        kernel = ops.convert_to_tensor(self.kernel)
        if self.gamma is not None:
            kept = expand(ops.cast(self.gamma, "bool"), self._plane(), self.block, ops)
            kernel = ops.where(ops.transpose(kept) if self.swapped else kept, kernel, 0)
        return trainable_fake_quantize(kernel, self.kernel_threshold, half_even=True)

    def quantised_bias(self) -> Any:
        """The bias on the grid of its threshold."""
        return trainable_fake_quantize(ops.convert_to_tensor(self.bias), self.bias_threshold, half_even=True)

    def learn_thresholds(self, learned: bool) -> None:
        """Sets whether the thresholds train."""
        self.learned = learned
        self.kernel_threshold.trainable = self.bias_threshold.trainable = learned

    def save_own_variables(self, store: Any) -> None:
        """Stores all variables; the Keras layers would store kernel and bias alone."""
        keras.layers.Layer.save_own_variables(self, store)

    def load_own_variables(self, store: Any) -> None:
        """Reads what `save_own_variables` stored."""
        keras.layers.Layer.load_own_variables(self, store)

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {**super().get_config(), "learned": self.learned}


def _threshold(layer: keras.layers.Layer, name: str, position: int) -> keras.Variable:
    return layer.add_weight(
        name=name,
        shape=(),
        initializer=keras.initializers.Constant(threshold_of(position)),
        trainable=layer.learned,
        dtype="float32",
        autocast=False,
    )


@keras.saving.register_keras_serializable("bstf")
class TrainableConv2D(_TrainableWeights, FixedPointConv2D):
    """A `FixedPointConv2D` that trains: `kernel` and `bias` are float weights, put on their grids in every call.

    Args:
        *args: of `FixedPointConv2D`.
        learned: whether the thresholds of kernel and bias train.
        **kwargs: of `FixedPointConv2D`; the positions are those to start with.

    Example:
        >>> TrainableConv2D(16, 3, padding="same", kernel_position=8, bias_position=7)
    """


@keras.saving.register_keras_serializable("bstf")
class TrainableDepthwiseConv2D(_TrainableWeights, FixedPointDepthwiseConv2D):
    """A `FixedPointDepthwiseConv2D` that trains: `kernel` and `bias` are float weights, put on their grids in every
    call.

    Args:
        *args: of `FixedPointDepthwiseConv2D`.
        learned: whether the thresholds of kernel and bias train.
        **kwargs: of `FixedPointDepthwiseConv2D`; the positions are those to start with.

    Example:
        >>> TrainableDepthwiseConv2D(3, padding="same", kernel_position=8, bias_position=7)
    """


@keras.saving.register_keras_serializable("bstf")
class TrainableDense(_TrainableWeights, FixedPointDense):
    """A `FixedPointDense` that trains: `kernel` and `bias` are float weights, put on their grids in every call.

    Args:
        *args: of `FixedPointDense`.
        learned: whether the thresholds of kernel and bias train.
        **kwargs: of `FixedPointDense`; the positions are those to start with.

    Example:
        >>> TrainableDense(10, kernel_position=8, bias_position=7)
    """


@keras.saving.register_keras_serializable("bstf")
class TrainableConv2DTranspose(_TrainableWeights, FixedPointConv2DTranspose):
    """A `FixedPointConv2DTranspose` that trains: `kernel` and `bias` are float weights, put on their grids in every
    call.

    Args:
        *args: of `FixedPointConv2DTranspose`.
        learned: whether the thresholds of kernel and bias train.
        **kwargs: of `FixedPointConv2DTranspose`; the positions are those to start with.

    Example:
        >>> TrainableConv2DTranspose(16, 2, strides=2, kernel_position=8, bias_position=7)
    """

    swapped = True


class TrainableFunction(keras.layers.Layer):
    """A function of one value, computed on values of a grid; the fixed-point model has a table of it.

    Args:
        function: maps tensors element by element.
        **kwargs: of `keras.layers.Layer`; the layer computes in float32 under any dtype policy.
    """

    def __init__(self, function: Callable[[Any], Any], **kwargs: Any):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.function = function

    def call(self, inputs: Any) -> Any:
        """Returns the function's values, not yet on a grid."""
        return self.function(inputs)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Sequence[int | None]:
        """The shape stays."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """A function has none."""
        raise ValueError(f"layer {self.name!r} holds a function, which can't be stored; use model.save_weights.")
