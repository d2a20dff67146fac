"""Layers of the fixed-point model.

All values are integers times powers of two, so floating point can compute them exactly. A layer whose sums
stay below 2**24 units in magnitude is exact in float32 in whatever order it adds; beyond that it adds in
float64. Casting such a sum to float32 afterwards is harmless: at most 16 bits are cut when it is put on its
grid, so a sum that float32 can't hold lies far outside of the grid's range and saturates either way.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from bstf.blocks import BlockShape

EXACT_FLOAT32 = 1 << 24  # integers below it add exactly in float32
MAX_CUT = 16  # bits that one requantisation can cut exactly, and the largest shift of a bias
_WINDOW_FACTORS = {3: (7, 6), 5: (10, 8), 6: (7, 8), 7: (21, 10), 14: (21, 12)}  # full k x k: N, M


def fake_quantize(x: Any, position: int) -> Any:
    """Puts a float32 tensor on the grid of a position: clip(floor(x * 2**p + 1/2), -128, 127) * 2**-p.

    On the TensorFlow backend this is one FakeQuantWithMinMaxArgs operation, which other tools understand.

    Args:
        x: a float32 tensor.
        position: the position p.

    Returns:
        A float32 tensor of the same shape.
    """
    low, high = math.ldexp(-128.0, -position), math.ldexp(127.0, -position)
    if keras.backend.backend() == "tensorflow":
        return tf.quantization.fake_quant_with_min_max_args(x, min=low, max=high, num_bits=8)
    # The operations of the TensorFlow kernel, so that arbitrary inputs round alike too.
    steps = ops.floor((ops.clip(x, low, high) - low) * math.ldexp(1.0, position) + 0.5)
    return steps * math.ldexp(1.0, -position) + low


def accumulator_type(largest: int) -> str:
    """The float type that holds integers up to `largest` exactly: "float32" or "float64"."""
    return "float32" if largest < EXACT_FLOAT32 else "float64"


def average_factor(height: int, width: int, count: int) -> tuple[int, int]:
    """Factor N / 2**M that stands for 1 / count in an average pooling.

    Source: Vitis AI's average pooling, which tabulates full square windows of 3, 5, 6, 7 and 14; every other
    count gets the closest N / 2**M with 0 <= M < 7 + ceil(log2(count)), of equally close ones the one of
    smallest M. Powers of two are exact.

    Args:
        height: rows of the window.
        width: columns of the window.
        count: elements of the window that lie inside the image, 1 to `height * width`.

    Returns:
        N and M.

    Example:
        >>> average_factor(7, 7, 49), average_factor(3, 3, 6)
        ((21, 10), (85, 9))
    """
    if height == width and count == height * width and height in _WINDOW_FACTORS:
        return _WINDOW_FACTORS[height]
    return _closest_factor(count)


@functools.cache
def _closest_factor(count: int) -> tuple[int, int]:
    largest = 6 + (count - 1).bit_length()
    nearest = {bits: ((2 << bits) + count) // (2 * count) for bits in range(largest + 1)}
    # |N / 2**M - 1 / count| in units of 1 / (count * 2**largest), exactly; then M.
    _, bits = min((abs(n * count - (1 << bits)) << (largest - bits), bits) for bits, n in nearest.items() if n > 0)
    return nearest[bits], bits


@keras.saving.register_keras_serializable("bstf")
class FixedPoint(keras.layers.Layer):
    """Puts a tensor on its grid: y = clip(floor(x * 2**p + 1/2), -128, 127) * 2**-p, exactly.

    Args:
        position: the position p of the grid; negative for a grid coarser than the integers.
        **kwargs: of `keras.layers.Layer`; the layer computes in float32 under any dtype policy.

    Example:
        >>> FixedPoint(1)(np.array([0.25, -0.25, 100.0], "float32"))
        [0.5, 0.0, 63.5]
    """

    def __init__(self, position: int, **kwargs: Any):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.position = int(position)
        self.built = True

    def call(self, inputs: Any) -> Any:
        """Returns `inputs` on the grid."""
        return fake_quantize(inputs, self.position)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Sequence[int | None]:
        """The shape stays."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {**super().get_config(), "position": self.position}


class _FixedPointWeights:
    """What the layers with weights share: grids of kernel and bias, type of the sum."""

    def __init__(
        self,
        *args: Any,
        kernel_position: int,
        bias_position: int,
        accumulator: str = "float32",
        **kwargs: Any,
    ):
        super().__init__(*args, **{**kwargs, "dtype": "float32"})
        if accumulator not in ("float32", "float64"):
            raise ValueError(f"accumulator of {self.name!r} must be 'float32' or 'float64'; got {accumulator!r}.")
        if not self.use_bias or self.activation is not keras.activations.linear:
            raise ValueError(
                f"{type(self).__name__} {self.name!r} needs a bias and a linear activation; put the "
                "activation into a layer of its own."
            )
        self.kernel_position = int(kernel_position)
        self.bias_position = int(bias_position)
        self.accumulator = accumulator

    def call(self, inputs: Any) -> Any:
        """Returns the exact sum with the bias, not yet on a grid of 8 bits."""
        inputs, kernel, bias = (
            ops.cast(x, self.accumulator) for x in (inputs, self.quantised_kernel(), self.quantised_bias())
        )
        return ops.cast(self._product(inputs, kernel) + bias, "float32")

    def quantised_kernel(self) -> Any:
        """The kernel on its grid, as the layer computes with it."""
        return fake_quantize(self.kernel, self.kernel_position)

    def quantised_bias(self) -> Any:
        """The bias on its grid, as the layer computes with it."""
        return fake_quantize(self.bias, self.bias_position)

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {
            **super().get_config(),
            "kernel_position": self.kernel_position,
            "bias_position": self.bias_position,
            "accumulator": self.accumulator,
        }


class _FixedPointBlocks(_FixedPointWeights):
    """What those whose kernels have blocks share."""

    def __init__(self, *args: Any, block: int | Sequence[int] = 8, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.block = BlockShape.of(block)

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {**super().get_config(), "block": list(self.block)}


@keras.saving.register_keras_serializable("bstf")
class FixedPointConv2D(_FixedPointBlocks, keras.layers.Conv2D):
    """A convolution whose kernel, bias and input lie on grids; its exact sums go to the `FixedPoint` that
    follows.

    Kernel (h, w, cin / groups, cout) and bias (cout,) are stored as float32 values on their grids.

    Args:
        *args: of `keras.layers.Conv2D`: filters, kernel_size, strides, padding. Activation linear, with a
            bias, channels last.
        kernel_position: position of the kernel.
        bias_position: position of the bias.
        block: block shape of the kernel's zeros, an int or (bi, bo).
        accumulator: "float32", or "float64" where the sums can reach 2**24 units.
        **kwargs: of `keras.layers.Conv2D`; the layer computes in float32 under any dtype policy.

    Raises:
        ValueError: an argument is out of the ranges above.

    Example:
        >>> FixedPointConv2D(16, 3, padding="same", kernel_position=8, bias_position=7)
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "data_format": "channels_last"})

    def _product(self, inputs: Any, kernel: Any) -> Any:
        return ops.conv(
            inputs,
            kernel,
            strides=list(self.strides),
            padding=self.padding,
            data_format="channels_last",
            dilation_rate=self.dilation_rate,
        )


@keras.saving.register_keras_serializable("bstf")
class FixedPointDepthwiseConv2D(_FixedPointWeights, keras.layers.DepthwiseConv2D):
    """A depthwise convolution whose kernel, bias and input lie on grids; its exact sums go to the `FixedPoint`
    that follows.

    Kernel (h, w, cin, depth_multiplier) and bias (cin * depth_multiplier,) are stored as float32 values on
    their grids.

    Args:
        *args: of `keras.layers.DepthwiseConv2D`: kernel_size, strides, padding. Activation linear, with a bias,
            channels last.
        kernel_position: position of the kernel.
        bias_position: position of the bias.
        accumulator: "float32", or "float64" where the sums can reach 2**24 units.
        **kwargs: of `keras.layers.DepthwiseConv2D`; the layer computes in float32 under any dtype policy.

    Raises:
        ValueError: an argument is out of the ranges above.

    Example:
        >>> FixedPointDepthwiseConv2D(3, padding="same", kernel_position=8, bias_position=7)
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "data_format": "channels_last"})

    def _product(self, inputs: Any, kernel: Any) -> Any:
        return ops.depthwise_conv(
            inputs,
            kernel,
            strides=self.strides[0],
            padding=self.padding,
            data_format="channels_last",
            dilation_rate=self.dilation_rate,
        )


@keras.saving.register_keras_serializable("bstf")
class FixedPointConv2DTranspose(_FixedPointBlocks, keras.layers.Conv2DTranspose):
    """A transposed convolution whose kernel, bias and input lie on grids; its exact sums go to the `FixedPoint`
    that follows.

    Kernel (h, w, cout, cin) and bias (cout,) are stored as float32 values on their grids.

    Args:
        *args: of `keras.layers.Conv2DTranspose`: filters, kernel_size, strides, padding. Activation linear, with a
            bias, channels last.
        kernel_position: position of the kernel.
        bias_position: position of the bias.
        block: block shape of the kernel's zeros, an int or (bi, bo).
        accumulator: "float32", or "float64" where the sums can reach 2**24 units.
        **kwargs: of `keras.layers.Conv2DTranspose`; the layer computes in float32 under any dtype policy.

    Raises:
        ValueError: an argument is out of the ranges above.

    Example:
        >>> FixedPointConv2DTranspose(16, 2, strides=2, kernel_position=8, bias_position=7)
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "data_format": "channels_last"})

    def _product(self, inputs: Any, kernel: Any) -> Any:
        return ops.conv_transpose(inputs, kernel, list(self.strides), padding=self.padding, data_format="channels_last")


@keras.saving.register_keras_serializable("bstf")
class FixedPointDense(_FixedPointBlocks, keras.layers.Dense):
    """A dense layer on vectors whose kernel, bias and input lie on grids; the `FixedPoint` that follows
    takes its sums.

    Kernel (cin, cout) and bias (cout,) are stored as float32 values on their grids.

    Args:
        *args: of `keras.layers.Dense`: units. Activation linear, with a bias.
        kernel_position: position of the kernel.
        bias_position: position of the bias.
        block: block shape of the kernel's zeros, an int or (bi, bo).
        accumulator: "float32", or "float64" where the sums can reach 2**24 units.
        **kwargs: of `keras.layers.Dense`; the layer computes in float32 under any dtype policy.

    Raises:
        ValueError: an argument is out of the ranges above.

    Example:
        >>> FixedPointDense(10, kernel_position=8, bias_position=7)
    """

    def _product(self, inputs: Any, kernel: Any) -> Any:
        return ops.matmul(inputs, kernel)


@keras.saving.register_keras_serializable("bstf")
class FixedPointLookup(keras.layers.Layer):
    """Any function of one value by a table: 256 float32 values, from that of -128 * 2**-position on.

    The values lie on the grid of the `FixedPoint` that follows.

    Args:
        position: position of the input.
        **kwargs: of `keras.layers.Layer`; the layer computes in float32 under any dtype policy.

    Example:
        >>> lookup = FixedPointLookup(4)
    """

    def __init__(self, position: int, **kwargs: Any):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.position = int(position)

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates the table."""
        self.table = self.add_weight(name="table", shape=(256,), initializer="zeros")

    def call(self, inputs: Any) -> Any:
        """Returns the table's entries."""
        indices = ops.cast(inputs * math.ldexp(1.0, self.position) + 128.0, "int32")
        if keras.backend.backend() == "tensorflow":
            return tf.gather(self.table, indices)  # keras.ops.take first wraps negative indices around
        return ops.take(self.table, indices)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Sequence[int | None]:
        """The shape stays."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {**super().get_config(), "position": self.position}


@keras.saving.register_keras_serializable("bstf")
class HostAffine(keras.layers.Layer):
    """x * scale + offset in float32: what the host does to images before they are put on their grid.

    Args:
        scale: numbers that fit an image: one for all, one a channel, or (height, width, channels).
        offset: the same.
        **kwargs: of `keras.layers.Layer`; the layer computes in float32 under any dtype policy.

    Example:
        >>> HostAffine([1 / 127.5], [-1.0])
    """

    def __init__(self, scale: Any, offset: Any, **kwargs: Any):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.scale, self.offset = np.array(scale, np.float32), np.array(offset, np.float32)
        self.built = True

    def call(self, inputs: Any) -> Any:
        """Returns x * scale + offset."""
        scale, offset = (ops.convert_to_tensor(values) for values in (self.scale, self.offset))
        return inputs * scale + offset

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Sequence[int | None]:
        """The shape stays."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {**super().get_config(), "scale": self.scale.tolist(), "offset": self.offset.tolist()}


@keras.saving.register_keras_serializable("bstf")
class FixedPointUpSampling2D(keras.layers.UpSampling2D):
    """Up-sampling as one operation. Interpolated values are exact; the `FixedPoint` that follows takes them.

    Bilinear weights are whole multiples of 1 / (4 * rows * columns) for factors that are powers of two, so the sums
    are exact in float32.

    Args:
        *args: of `keras.layers.UpSampling2D`: size; interpolation "nearest" or "bilinear" (powers of two).
        **kwargs: of `keras.layers.UpSampling2D`; the layer computes in float32 under any dtype policy.

    Example:
        >>> FixedPointUpSampling2D(2, interpolation="bilinear")
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "data_format": "channels_last", "dtype": "float32"})

    def call(self, inputs: Any) -> Any:
        """Returns the larger images."""
        size = [extent * factor for extent, factor in zip(inputs.shape[1:3], self.size)]
        return ops.image.resize(inputs, size, self.interpolation, data_format="channels_last")


@keras.saving.register_keras_serializable("bstf")
class FixedPointAveragePooling2D(keras.layers.AveragePooling2D):
    """Average pooling with the division as in hardware: sum of the window's valid elements times N / 2**M.

    `average_factor` gives N and M, by the number of elements of a window that lie inside the image. The
    exact products go to the `FixedPoint` that follows.

    Args:
        *args: of `keras.layers.AveragePooling2D`: pool_size, strides (equal in both directions), padding.
        **kwargs: of `keras.layers.AveragePooling2D`; the layer computes in float32 under any dtype policy.

    Raises:
        ValueError: strides differ, or a window is so large that its factor needs more than 16 bits.

    Example:
        >>> FixedPointAveragePooling2D(3, strides=2, padding="same")
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "data_format": "channels_last", "dtype": "float32"})
        if len(set(self.strides)) > 1:
            raise ValueError(
                f"average pooling {self.name!r} has strides {tuple(self.strides)}; only equal strides are supported."
            )

    def call(self, inputs: Any) -> Any:
        """Returns the exact products, not yet on a grid of 8 bits."""
        height, width = self.pool_size
        counts = self._counts(inputs.shape[1:3])
        factors = {count: _factor(self.name, height, width, count) for count in np.unique(counts).tolist()}
        sums = ops.depthwise_conv(
            inputs,
            ops.convert_to_tensor(np.ones((height, width, inputs.shape[-1], 1), "float32")),
            strides=self.strides[0],
            padding=self.padding,
            data_format="channels_last",
        )
        if len(factors) == 1:
            (factor,) = factors.values()
        else:
            factor = np.vectorize(factors.get, otypes=["float32"])(counts)[None, :, :, None]
        return sums * ops.convert_to_tensor(factor, "float32")

    def _counts(self, size: tuple[int, int]) -> np.ndarray:
        """Elements of every window that lie inside an image of `size`: (output height, output width)."""
        rows, columns = (
            _valid_elements(extent, pool, stride, self.padding)
            for extent, pool, stride in zip(size, self.pool_size, self.strides)
        )
        return np.outer(rows, columns)


@keras.saving.register_keras_serializable("bstf")
class FixedPointGlobalAveragePooling2D(keras.layers.GlobalAveragePooling2D):
    """Global average pooling with the division as in hardware: sum times N / 2**M (`average_factor`).

    The exact products go to the `FixedPoint` that follows.

    Args:
        **kwargs: of `keras.layers.GlobalAveragePooling2D`; the layer computes in float32 under any dtype
            policy.

    Raises:
        ValueError: the image is so large that its factor needs more than 16 bits.

    Example:
        >>> FixedPointGlobalAveragePooling2D(keepdims=True)
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**{**kwargs, "data_format": "channels_last", "dtype": "float32"})

    def call(self, inputs: Any) -> Any:
        """Returns the exact products, not yet on a grid of 8 bits."""
        height, width = inputs.shape[1:3]
        factor = _factor(self.name, height, width, height * width)
        return ops.sum(inputs, axis=(1, 2), keepdims=self.keepdims) * ops.convert_to_tensor(factor, "float32")


def _factor(name: str, height: int, width: int, count: int) -> float:
    """N / 2**M of a window's `count` valid elements. With M <= 16 every product with a sum of them fits
    float32.
    """
    n, bits = average_factor(height, width, count)
    if bits > MAX_CUT:
        raise ValueError(
            f"average pooling {name!r} averages {count} elements, whose factor needs {bits} bits, more than "
            f"{MAX_CUT}; average at most 1024 elements or a power of two, for instance in two poolings."
        )
    return math.ldexp(n, -bits)


def _valid_elements(extent: int, pool: int, stride: int, padding: str) -> np.ndarray:
    """Elements of each window along one axis that are not padding."""
    if padding == "valid":
        return np.full((extent - pool) // stride + 1, pool)
    windows = -(-extent // stride)
    before = max((windows - 1) * stride + pool - extent, 0) // 2
    first = np.arange(windows) * stride - before
    return np.minimum(first + pool, extent) - np.maximum(first, 0)
