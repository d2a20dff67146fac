"""A float model to a fixed-point model: fold, find positions, adjust them, build."""

import functools
import math
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from bstf.quantization.adjust import Positions, adjust
from bstf.quantization.bias_correction import FirstImages, corrected_biases
from bstf.quantization.calibrate import calibrate
from bstf.quantization.equalize import equalize as equalize_channels
from bstf.quantization.fixed_point import (
    FixedPoint,
    FixedPointAveragePooling2D,
    FixedPointConv2D,
    FixedPointConv2DTranspose,
    FixedPointDense,
    FixedPointDepthwiseConv2D,
    FixedPointGlobalAveragePooling2D,
    FixedPointLookup,
    FixedPointUpSampling2D,
    HostAffine,
    accumulator_type,
)
from bstf.quantization.fold import flatten
from bstf.quantization.network import (
    REQUANTISED,
    Add,
    Affine,
    AveragePool,
    Concat,
    Convolution,
    Crop,
    GlobalAveragePool,
    GlobalMaxPool,
    Input,
    MaxPool,
    Multiply,
    Network,
    Operation,
    Relu,
    Reshape,
    Resize,
    Softmax,
    TransposedConvolution,
    Unary,
    Weights,
    ZeroPad,
)
from bstf.quantization.positions import (
    ACTIVATION_RULES,
    HIGHEST,
    LOWEST,
    half_even,
    half_up,
    min_mse,
    to_grid,
    to_integers,
)
from bstf.quantization.rounding import compensated_kernels


def quantize(
    model: keras.Model,
    calibration: Any,
    *,
    activations: str = "min_mse",
    equalize: bool = False,
    compensate: bool = True,
    correct_bias: bool = True,
) -> keras.Model:
    """Quantises a trained model to power-of-two INT8, after training.

    Weights, biases and activations lie on grids integer * 2**-position of 8 bits, one position a tensor;
    the model that comes back computes what integer hardware computes, exactly, in float arithmetic. Batch
    normalisation is folded, zero blocks of masked layers stay exactly zero. In float stay what is for the
    host: a last softmax, and scales and offsets of the input.

    Args:
        model: a built Sequential or functional model (nested ones included) with inputs of fixed size, of
            Conv2D (grouped and dilated too), Conv2DTranspose, DepthwiseConv2D, SeparableConv2D, Dense, the
            masked layers, BatchNormalization, Rescaling and Normalization, ReLU and relu6, any function of one
            value (which becomes a table), Add, Subtract and Multiply (by one pixel too), Concatenate of channels,
            max, average and global pooling, ZeroPadding2D, Cropping2D, UpSampling2D, Flatten (and Permute before
            it), slices, Dropout and a last Softmax. A mean image may be subtracted from an input. It stays untouched.
        calibration: images like those the model will see: an array (n, height, width, channels), a
            `tf.data.Dataset` or an iterable of batches `x` or `(x, y)`. For a model of several inputs x is a tuple or
            list of arrays in the order of `model.inputs`, or a dictionary by their names, also without batches. A few
            dozen images suffice. Read once.
        activations: the rule that finds the positions of activations, batch by batch; the most common one wins.
            "min_mse": least squared error of the non-overflow position and the four finer ones (Vitis AI).
            "non_overflow": the finest that clips nothing (Vitis AI for TensorFlow 2). "non_overflow_rounded": the
            finest that clips nothing once it is rounded (Vitis AI for ONNX). "percentile": the finest that clips
            0.01 % of the largest magnitudes. Inputs always take "non_overflow".
        equalize: whether to scale channels between layers first, so that one grid suits all channels
            (`bstf.quantization.equalize`). It helps where weights of channels differ much and no relu6 is between.
        compensate: whether every weight's rounding makes good for that of the weights before it, on the calibration
            images (`bstf.quantization.rounding`); or each is rounded to the nearest. On the first images, if they are
            so many that a tensor would take more than 512 MiB.
        correct_bias: whether to add to every bias what rounding changed in the mean of the layer's outputs on the
            calibration images (`bstf.quantization.bias_correction`): on all, or on the first if they are so many
            that a tensor would take more than 512 MiB. It takes up to twice the time.

    Returns:
        A Keras model with the same inputs and outputs, whose layers keep their names; each grid is a
        `FixedPoint` layer named after its layer, `<name>_grid`.

    Raises:
        TypeError: `model` or `calibration` isn't what is described above.
        ValueError: a layer that isn't supported, NaN weights, no or bad images. The sentence names what and
            the way out.

    Example:
        >>> quantised = bstf.quantize(model, images[:64])
        >>> bstf.export(quantised, "build/model")
    """
    network, positions = prepared(model, calibration, activations, equalize, compensate, correct_bias)
    return Builder(network, positions).model(model.name)


def prepared(
    model: keras.Model, calibration: Any, activations: str, equalize: bool, compensate: bool, correct_bias: bool
) -> tuple[Network, Positions]:
    """The folded network with the weights to put on grids, and its adjusted positions; arguments as of `quantize`."""
    if activations not in ACTIVATION_RULES:
        raise ValueError(f"activations must be one of {', '.join(ACTIVATION_RULES)}; got {activations!r}.")
    network = flatten(model)
    if equalize:
        equalize_channels(network)
    images = FirstImages(network)
    sampled = correct_bias or compensate
    weights = [op for op in network.operations.values() if isinstance(op, Weights)]
    positions = Positions(
        activation=calibrate(network, calibration, activations, images.add if sampled else None),
        kernel={op.name: min_mse(op.kernel, half_even) for op in weights},
        bias={op.name: min_mse(op.bias, half_even) for op in weights},
    )
    positions = adjust(network, positions)
    rounded = network
    if compensate:
        kernels = compensated_kernels(network, positions, images.all())
        made = {name: replace(op, kernel=kernels[name]) for name, op in network.operations.items() if name in kernels}
        rounded = replace(network, operations=network.operations | made)
    if correct_bias:
        biases = corrected_biases(network, Builder(rounded, positions).model(model.name), images.all())
        for op in (op for op in rounded.operations.values() if isinstance(op, Weights)):
            op.bias = biases[op.name]
            positions.bias[op.name] = min_mse(op.bias, half_even)
        positions = adjust(rounded, positions)
    return rounded, positions


class Builder:
    """Builds the Keras model of fixed-point layers.

    Attributes:
        convolution, depthwise, transposed, dense: classes of the layers with weights.
        trainable: whether these train.
    """

    convolution, depthwise = FixedPointConv2D, FixedPointDepthwiseConv2D
    transposed, dense = FixedPointConv2DTranspose, FixedPointDense
    trainable = False

    def __init__(self, network: Network, positions: Positions):
        self.network, self.positions = network, positions
        self.grids, self.fused = network.grids(), network.fused()
        self.names = set(network.operations)

    def model(self, name: str) -> keras.Model:
        """The model, its outputs in the structure of the float model's."""
        entries, outputs = self.build()
        pack, network = keras.tree.pack_sequence_as, self.network
        return keras.Model(pack(network.entry, entries), pack(network.structure, outputs), name=name)

    def build(self) -> tuple[list[Any], list[Any]]:
        """Returns the Keras inputs and outputs."""
        tensors: dict[str, Any] = {}
        entries = []
        for name, operation in self.network.operations.items():
            if isinstance(operation, Input):
                entry = keras.Input(operation.shape, name=name, dtype="float32")
                entries.append(entry)
                tensors[name] = entry if name in self.network.prepared else self.grid(name, entry)
                continue
            inputs = [tensors[source] for source in operation.inputs]
            tensors[name] = self.layer(operation, inputs)
            requantised = isinstance(operation, (*REQUANTISED, Affine, Concat, Relu, Resize, Unary))
            if requantised and name not in self.fused:
                tensors[name] = self.grid(name, tensors[name])
        return entries, [tensors[name] for name in self.network.outputs]

    def grid(self, name: str, tensor: Any) -> Any:
        """Puts an operation's tensor on its grid."""
        owner = self.grids[name]
        base = f"{owner if self.fused.get(owner) == name else name}_grid"
        return FixedPoint(self.positions.activation[owner], name=self.free_name(base))(tensor)

    def free_name(self, name: str) -> str:
        """The name, with underscores if a layer has it."""
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name

    def layer(self, operation: Operation, inputs: list[Any]) -> Any:
        """Applies an operation."""
        if isinstance(operation, Weights):
            return self.weights(operation, inputs[0])
        if isinstance(operation, Unary):
            return self.table(operation, inputs[0])
        tensor = inputs if isinstance(operation, (Add, Multiply, Concat)) else inputs[0]
        for layer in _layers(operation, self.network.operations[operation.inputs[0]].shape):
            tensor = layer(tensor)
        return tensor

    def table(self, op: Unary, tensor: Any) -> Any:
        """The function's values at all integers of the input's grid, on its own."""
        position = self.positions.activation[self.grids[op.inputs[0]]]
        points = np.ldexp(np.arange(LOWEST, HIGHEST + 1, dtype=np.float32), -position)
        values = keras.ops.convert_to_numpy(op.function(keras.ops.convert_to_tensor(points)))
        if np.isnan(values).any():
            raise ValueError(
                f"layer {op.name!r} has no value at {points[np.isnan(values)][0]:g}, which its input can take; end the "
                "model before it."
            )
        layer = FixedPointLookup(position, trainable=False, name=op.name)
        result = layer(tensor)
        layer.table.assign(to_grid(values.astype(np.float64), self.positions.activation[op.name], half_up))
        return result

    def weights(self, op: Weights, tensor: Any) -> Any:
        """Applies an operation with weights, put on their grids."""
        kernel_position, bias_position = self.positions.kernel[op.name], self.positions.bias[op.name]
        input_position = self.positions.activation[self.grids[op.inputs[0]]]
        kernel = to_integers(op.kernel, kernel_position, half_even)
        bias = to_integers(op.bias, bias_position, half_even)
        shift = kernel_position + input_position - bias_position
        common = {
            "kernel_position": kernel_position,
            "bias_position": bias_position,
            "accumulator": accumulator_type(_largest_sum(kernel, bias, shift)),
            "trainable": self.trainable,
            "name": op.name,
        }
        if isinstance(op, TransposedConvolution):
            layer = self.transposed(
                kernel.shape[-1], kernel.shape[:2], strides=op.strides, padding=op.padding, block=op.block, **common
            )
        elif isinstance(op, Convolution):
            common |= {"strides": op.strides, "padding": op.padding, "dilation_rate": op.dilation}
            size, depthwise = kernel.shape[:2], op.depthwise_kernel
            if depthwise is None:
                layer = self.convolution(kernel.shape[-1], size, groups=op.groups, block=op.block, **common)
            else:
                layer = self.depthwise(size, depth_multiplier=depthwise.shape[-1], **common)
        else:
            layer = self.dense(kernel.shape[-1], block=op.block, **common)
        result = layer(tensor)
        self.assign(layer, op, np.ldexp(kernel, -kernel_position), np.ldexp(bias, -bias_position))
        return result

    def assign(self, layer: Any, op: Weights, kernel: np.ndarray, bias: np.ndarray) -> None:
        """Gives a layer its weights: those of the operation, or `kernel` and `bias`, the same on their grids."""
        layer.kernel.assign(op.keras_order(kernel).reshape(layer.kernel.shape))
        layer.bias.assign(bias)


def _largest_sum(kernel: np.ndarray, bias: np.ndarray, shift: int) -> int:
    """Bound of the magnitude of any partial sum of an output, in units of the sum, for any input of 8
    bits.
    """
    weights = np.abs(kernel).reshape(-1, kernel.shape[-1]).sum(axis=0, dtype=np.float64)
    return math.ceil(np.max(weights * 128 + np.ldexp(np.abs(bias).astype(np.float64), shift)))


@functools.singledispatch
def _layers(op: Operation, shape: tuple[int, ...]) -> list[keras.layers.Layer]:
    """Keras layers of an operation without weights, for an input of `shape`."""
    raise TypeError(type(op).__name__)


def _options(op: Operation) -> dict[str, str]:
    return {"name": op.name, "dtype": "float32"}  # whatever the global policy


def _spatial_options(op: Operation) -> dict[str, str]:
    return {**_options(op), "data_format": "channels_last"}  # whatever the global format


@_layers.register
def _(op: Relu, shape: tuple[int, ...]) -> list[keras.layers.Layer]:
    return [keras.layers.ReLU(op.ceiling, **_options(op))]


@_layers.register
def _(op: Affine, shape: tuple[int, ...]) -> list[keras.layers.Layer]:
    return [HostAffine(op.scale.tolist(), op.offset.tolist(), name=op.name)]


@_layers.register
def _(op: Add, shape: tuple[int, ...]) -> list[keras.layers.Layer]:
    kind = keras.layers.Subtract if op.subtract else keras.layers.Add
    return [kind(**_options(op))]


@_layers.register
def _(op: Multiply, shape: tuple[int, ...]) -> list[keras.layers.Layer]:
    return [keras.layers.Multiply(**_options(op))]


@_layers.register
def _(op: Concat, shape: tuple[int, ...]) -> list[keras.layers.Layer]:
    return [keras.layers.Concatenate(**_options(op))]


@_layers.register
def _(op: MaxPool, shape: tuple[int, ...]) -> list[keras.layers.Layer]:
    return [keras.layers.MaxPooling2D(op.size, op.strides, op.padding, **_spatial_options(op))]


@_layers.register
def _(op: AveragePool, shape: tuple[int, ...]) -> list[keras.layers.Layer]:
    return [FixedPointAveragePooling2D(op.size, op.strides, op.padding, **_options(op))]


@_layers.register
def _(op: GlobalAveragePool, shape: tuple[int, ...]) -> list[keras.layers.Layer]:
    return [FixedPointGlobalAveragePooling2D(keepdims=op.keepdims, **_options(op))]


@_layers.register
def _(op: GlobalMaxPool, shape: tuple[int, ...]) -> list[keras.layers.Layer]:
    # As the pooling window that it is, which every reader of the graph knows.
    pool = keras.layers.MaxPooling2D(shape[:2], **_spatial_options(op))
    return [pool] if op.keepdims else [pool, keras.layers.Reshape(op.shape, name=f"{op.name}_vector", dtype="float32")]


@_layers.register
def _(op: ZeroPad, shape: tuple[int, ...]) -> list[keras.layers.Layer]:
    return [keras.layers.ZeroPadding2D(op.padding, **_spatial_options(op))]


@_layers.register
def _(op: Crop, shape: tuple[int, ...]) -> list[keras.layers.Layer]:
    return [keras.layers.Cropping2D(op.cropping, **_spatial_options(op))]


@_layers.register
def _(op: Resize, shape: tuple[int, ...]) -> list[keras.layers.Layer]:
    return [FixedPointUpSampling2D(op.factors, interpolation=op.method, **_options(op))]


@_layers.register
def _(op: Reshape, shape: tuple[int, ...]) -> list[keras.layers.Layer]:
    return [keras.layers.Reshape(op.shape, **_options(op))]


@_layers.register
def _(op: Softmax, shape: tuple[int, ...]) -> list[keras.layers.Layer]:
    return [keras.layers.Softmax(**_options(op))]
