"""Quantisation-aware training: a float model to one that trains on its grids, and that to a fixed-point model."""

from dataclasses import replace
from typing import Any

import keras
import numpy as np
from keras import ops

from bstf.quantization.adjust import Positions, adjust
from bstf.quantization.network import Network, Unary, Weights
from bstf.quantization.quantize import Builder, prepared
from bstf.quantization.trainable import (
    TrainableConv2D,
    TrainableConv2DTranspose,
    TrainableDense,
    TrainableDepthwiseConv2D,
    TrainableFunction,
    TrainableGrid,
    position_of,
)


def prepare(
    model: keras.Model,
    calibration: Any,
    *,
    learn_thresholds: bool = True,
    activations: str = "min_mse",
    equalize: bool = False,
    correct_bias: bool = True,
) -> keras.Model:
    """Makes a model for quantisation-aware training, which starts as what `quantize` makes.

    Every call puts weights, biases and activations on their grids; the gradients pass straight through the
    rounding and stop where values are clipped. Batch normalisation is folded first: the folded weights train.
    Zero blocks stay exactly zero. Train it with `compile` and `fit` like any Keras model, with about a
    hundredth of the float training's learning rate, then `convert` it. Adam suits learned thresholds, whose
    gradients are sums over whole tensors (Jain et al. 2019, arXiv 1903.08066). An optimizer with weight decay
    should leave them out: `optimizer.exclude_from_weight_decay(var_names=["log2_threshold"])`.

    Args:
        model: as of `bstf.quantize`; it stays untouched.
        calibration: images, as of `bstf.quantize`.
        learn_thresholds: whether positions train too, through their thresholds; otherwise they stay as calibrated.
        activations: as of `bstf.quantize`.
        equalize: as of `bstf.quantize`.
        correct_bias: as of `bstf.quantize`.

    Returns:
        A functional model with the same inputs and outputs, not compiled. Store its progress with `save_weights`;
        to go on, `prepare` the same float model again and `load_weights`.

    Raises:
        TypeError: as `bstf.quantize`.
        ValueError: as `bstf.quantize`.

    Example:
        >>> trained = bstf.quantization.prepare(model, images[:64])
        >>> trained.compile("adam", "sparse_categorical_crossentropy")
        >>> trained.fit(images, labels)
        >>> quantised = bstf.quantization.convert(trained)
    """
    network, positions = prepared(model, calibration, activations, equalize, False, correct_bias)
    trainable = _TrainableBuilder(network, positions, learn_thresholds).model(model.name)
    trainable.network = network
    return trainable


def convert(model: keras.Model) -> keras.Model:
    """Turns a model from `prepare` into the fixed-point model with its weights and positions.

    Both compute the same numbers, bit for bit, as long as every sum of the trained model fits float32 (24 bits)
    and every shift is one that the hardware has. Where training moved thresholds beyond that, positions are
    lowered as `quantize` does.

    Args:
        model: from `prepare`, trained or not. It stays untouched.

    Returns:
        A model as `bstf.quantize` makes.

    Raises:
        ValueError: `model` isn't from `prepare`, or training diverged.
    """
    network = getattr(model, "network", None)
    if not isinstance(network, Network):
        raise ValueError(
            "convert needs a model from bstf.quantization.prepare; others are for bstf.quantize. One that was "
            "loaded from a file has lost the network that it came from: prepare the float model again and give that "
            "the weights."
        )
    for layer in model.layers:
        if not all(np.isfinite(ops.convert_to_numpy(weight)).all() for weight in layer.weights):
            raise ValueError(f"layer {layer.name!r} holds NaN or infinite values: the training diverged.")
    trained = {name: model.get_layer(name) for name, op in network.operations.items() if isinstance(op, Weights)}
    weights = {name: _with_weights(network.operations[name], layer) for name, layer in trained.items()}
    network = replace(network, operations=network.operations | weights)
    positions = Positions(
        activation={layer.tensor: layer.position for layer in model.layers if isinstance(layer, TrainableGrid)},
        kernel={name: position_of(layer.kernel_threshold) for name, layer in trained.items()},
        bias={name: position_of(layer.bias_threshold) for name, layer in trained.items()},
    )
    return Builder(network, adjust(network, positions)).model(model.name)


def _with_weights(op: Weights, layer: Any) -> Weights:
    """The operation with a trained layer's weights, on their grids."""
    kernel, bias = (ops.convert_to_numpy(weight) for weight in (layer.quantised_kernel(), layer.quantised_bias()))
    return replace(op, kernel=op.keras_order(kernel).reshape(op.kernel.shape), bias=bias)


class _TrainableBuilder(Builder):
    """Builds the same model of layers that train."""

    convolution, depthwise = TrainableConv2D, TrainableDepthwiseConv2D
    transposed, dense = TrainableConv2DTranspose, TrainableDense
    trainable = True

    def __init__(self, network: Network, positions: Positions, learned: bool):
        super().__init__(network, positions)
        self.learned = learned
        self.layers: dict[str, TrainableGrid] = {}

    def grid(self, name: str, tensor: Any) -> Any:
        """One layer for all tensors on a grid, so that they have one threshold."""
        owner = self.grids[name]
        if owner not in self.layers:
            position = self.positions.activation[owner]
            self.layers[owner] = TrainableGrid(owner, position, self.learned, name=self.free_name(f"{owner}_grid"))
        return self.layers[owner](tensor)

    def table(self, op: Unary, tensor: Any) -> Any:
        """The function itself, which has gradients."""
        return TrainableFunction(op.function, name=op.name)(tensor)

    def assign(self, layer: Any, op: Weights, kernel: np.ndarray, bias: np.ndarray) -> None:
        """Gives a layer the float weights."""
        super().assign(layer, op, op.kernel, op.bias)
        if layer.gamma is not None and op.gamma is not None:
            layer.gamma.assign(op.gamma)
        layer.learn_thresholds(self.learned)
