"""Quantisation-aware training: a float model to one that trains on its grids, and that to a fixed-point model."""

from typing import Any

import keras
import numpy as np
from keras import ops

from bstf.blocks import nonzero_blocks
from bstf.layers import MaskedConv2D, MaskedDense
from bstf.quantization.adjust import Positions, adjust
from bstf.quantization.fixed_point import FixedPointAveragePooling2D, FixedPointGlobalAveragePooling2D
from bstf.quantization.fold import flatten
from bstf.quantization.network import Network, Weights
from bstf.quantization.quantize import Builder, prepared
from bstf.quantization.trainable import (
    TrainableConv2D,
    TrainableDense,
    TrainableDepthwiseConv2D,
    TrainableGrid,
    position_of,
)

_TRAINABLE = (TrainableConv2D, TrainableDepthwiseConv2D, TrainableDense)


def prepare(
    model: keras.Model,
    calibration: Any,
    *,
    learn_thresholds: bool = True,
    activations: str = "min_mse",
    equalize: bool = False,
    correct_bias: bool = False,
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
        A functional model with the same inputs and outputs, not compiled.

    Raises:
        TypeError: as `bstf.quantize`.
        ValueError: as `bstf.quantize`.

    Example:
        >>> trained = bstf.quantization.prepare(model, images[:64])
        >>> trained.compile("adam", "sparse_categorical_crossentropy")
        >>> trained.fit(images, labels)
        >>> quantised = bstf.quantization.convert(trained)
    """
    network, positions = prepared(model, calibration, activations, equalize, correct_bias)
    return _TrainableBuilder(network, positions, learn_thresholds).model(model.name)


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
    if not any(isinstance(layer, TrainableGrid) for layer in getattr(model, "layers", ())):
        raise ValueError("convert needs a model from bstf.quantization.prepare; to quantise others use bstf.quantize.")
    for layer in model.layers:
        if not all(np.isfinite(ops.convert_to_numpy(weight)).all() for weight in layer.weights):
            raise ValueError(f"layer {layer.name!r} holds NaN or infinite values: the training diverged.")
    network = flatten(_float_model(model))
    trained = [layer for layer in model.layers if isinstance(layer, _TRAINABLE)]
    positions = Positions(
        activation={layer.tensor: layer.position for layer in model.layers if isinstance(layer, TrainableGrid)},
        kernel={layer.name: position_of(layer.kernel_threshold) for layer in trained},
        bias={layer.name: position_of(layer.bias_threshold) for layer in trained},
    )
    return Builder(network, adjust(network, positions)).model(model.name)


class _TrainableBuilder(Builder):
    """Builds the same model of layers that train."""

    convolution, depthwise, dense = TrainableConv2D, TrainableDepthwiseConv2D, TrainableDense
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

    def assign(self, layer: Any, op: Weights, kernel: np.ndarray, bias: np.ndarray) -> None:
        """Gives a layer the float weights."""
        super().assign(layer, op, op.kernel, op.bias)
        if layer.gamma is not None:
            layer.gamma.assign(nonzero_blocks(op.kernel, op.block))
        layer.learn_thresholds(self.learned)


def _float_model(model: keras.Model) -> keras.Model:
    """The model in plain and masked layers, their weights on the grids."""
    clone = keras.models.clone_model(model, clone_function=_float_layer)
    for layer in model.layers:
        if isinstance(layer, _TRAINABLE):
            plain = clone.get_layer(layer.name)
            if layer.gamma is not None:
                plain.set_gamma(ops.convert_to_numpy(layer.gamma))
            plain.kernel.assign(layer.quantised_kernel())
            plain.bias.assign(layer.quantised_bias())
    return clone


def _float_layer(layer: keras.layers.Layer) -> keras.layers.Layer:
    if isinstance(layer, TrainableGrid):
        return keras.layers.Identity(name=layer.name)
    if isinstance(layer, TrainableDepthwiseConv2D):
        kind = keras.layers.DepthwiseConv2D
    elif isinstance(layer, TrainableConv2D):
        kind = MaskedConv2D if layer.gamma is not None else keras.layers.Conv2D
    elif isinstance(layer, TrainableDense):
        kind = MaskedDense
    elif isinstance(layer, FixedPointAveragePooling2D):
        kind = keras.layers.AveragePooling2D
    elif isinstance(layer, FixedPointGlobalAveragePooling2D):
        kind = keras.layers.GlobalAveragePooling2D
    else:
        return layer.__class__.from_config(layer.get_config())
    config = layer.get_config()
    masked = kind in (MaskedConv2D, MaskedDense)
    own = ("kernel_position", "bias_position", "accumulator", "learned", *(() if masked else ("block",)))
    return kind.from_config({key: value for key, value in config.items() if key not in own})
