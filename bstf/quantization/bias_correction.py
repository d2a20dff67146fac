"""Bias correction: rounded weights shift the mean of a layer's outputs; the bias takes the shift back.

Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.2, with the means measured on images (appendix D): the bias
of output channel c gets E[y_c] - E[y~_c], y the float network's output before the activation and y~ the fixed-point
model's. Layers are corrected in order of computation, so y~ comes from inputs that are corrected already.
"""

import functools
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from bstf.quantization.calibrate import run
from bstf.quantization.network import Network, Weights
from bstf.quantization.walk import walk


def corrected_biases(network: Network, model: keras.Model, batches: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """Finds the biases with which every layer's outputs keep their means.

    Each batch corrects its own run through the fixed-point model; the biases take the mean of all corrections.
    So one batch is held at a time, and every layer is computed once.

    Args:
        network: the folded float network.
        model: the fixed-point model of it.
        batches: float32 (n, *shape of the input), at least one.

    Returns:
        The bias (cout,), float32 and on no grid, of every layer with weights, by name.
    """
    sums = {op.name: np.zeros(op.bias.shape) for op in network.operations.values() if isinstance(op, Weights)}
    images = 0
    for batch in batches:
        means = {name: _channel_means(values) for name, values in run(network, batch) if name in sums}
        corrections: dict[str, np.ndarray] = {}
        for _ in walk(model, batch, functools.partial(_correct, means, corrections)):
            pass
        for name, correction in corrections.items():
            sums[name] += correction * len(batch)
        images += len(batch)
    # The model's means hold its rounded biases, so the corrections start from those.
    rounded = {name: ops.convert_to_numpy(model.get_layer(name).bias) for name in sums}
    return {name: (rounded[name] + total / images).astype(np.float32) for name, total in sums.items()}


def _correct(
    means: dict[str, np.ndarray], corrections: dict[str, np.ndarray], layer: keras.layers.Layer, output: Any
) -> Any:
    """Gives a layer's output its mean in the float network; notes what that took."""
    if layer.name not in means:
        return output
    corrections[layer.name] = means[layer.name] - _channel_means(ops.convert_to_numpy(output))
    return output + ops.convert_to_tensor(corrections[layer.name], "float32")


def _channel_means(values: np.ndarray) -> np.ndarray:
    return values.mean(axis=tuple(range(values.ndim - 1)), dtype=np.float64)
