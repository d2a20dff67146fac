"""Bias correction: rounded weights shift the mean of a layer's outputs; the bias takes the shift back.

Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.2, with the means measured on images (appendix D): the bias
of output channel c gets E[y_c] - E[y~_c], y the float network's output before the activation and y~ the fixed-point
model's. Layers are corrected in order of computation: y~ comes from inputs that are corrected already, with the
rounding of the biases before, which later layers so take back too.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from bstf.quantization.calibrate import run
from bstf.quantization.network import Network, Weights
from bstf.quantization.positions import half_even, min_mse, to_grid
from bstf.quantization.walk import walk

_LARGEST_TENSOR = 1 << 29  # bytes


class FirstImages:
    """The first images of a calibration, as many as can be computed in one batch: no tensor takes more than 512 MiB.

    Args:
        network: that computes them.
    """

    def __init__(self, network: Network):
        largest = max(4 * math.prod(op.shape) for op in network.operations.values())
        self.most = max(1, _LARGEST_TENSOR // largest)
        self.batches: list[list[np.ndarray]] = []

    def add(self, batch: list[np.ndarray]) -> None:
        """Keeps those of a batch that are among the first."""
        missing = self.most - sum(len(kept[0]) for kept in self.batches)
        if missing > 0:
            self.batches.append([images[:missing] for images in batch])

    def all(self) -> list[np.ndarray]:
        """The images of every input, float32 (n, *shape of the input)."""
        return [np.concatenate(images) for images in zip(*self.batches)]


def corrected_biases(network: Network, model: keras.Model, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Finds the biases with which every layer's outputs keep their means.

    Args:
        network: the folded float network.
        model: the fixed-point model of it.
        images: of every input, float32 (n, *shape of the input), at least one; computed in one batch.

    Returns:
        The bias (cout,), float32 and on no grid, of every layer with weights, by name.
    """
    weights = {op.name for op in network.operations.values() if isinstance(op, Weights)}
    means = {name: _channel_means(values) for name, values in run(network, images) if name in weights}
    biases: dict[str, np.ndarray] = {}
    for _ in walk(model, images, functools.partial(_correct, means, biases)):
        pass
    return biases


def _correct(
    means: dict[str, np.ndarray], biases: dict[str, np.ndarray], layer: keras.layers.Layer, output: Any
) -> Any:
    """Finds the bias that gives a layer's output its mean in the float network; returns the output with it."""
    if layer.name not in means:
        return output
    bias = ops.convert_to_numpy(layer.bias)  # rounded, as the output holds it
    corrected = bias + (means[layer.name] - _channel_means(ops.convert_to_numpy(output))).astype(np.float32)
    biases[layer.name] = corrected
    return output + ops.convert_to_tensor(to_grid(corrected, min_mse(corrected, half_even), half_even) - bias)


def _channel_means(values: np.ndarray) -> np.ndarray:
    return values.mean(axis=tuple(range(values.ndim - 1)), dtype=np.float64)
