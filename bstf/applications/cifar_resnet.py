"""The residual networks of He et al. for CIFAR, and their published weights."""

from os import PathLike
from typing import Any

import keras
from keras import layers, ops

from bstf.applications import published

WIDTHS = (16, 32, 64)


def cifar_resnet(
    depth: int = 20, *, classes: int = 10, weights: str | PathLike | None = None, name: str | None = None
) -> keras.Model:
    """Builds ResNet-20, -32, -44, -56 or -110 for images of 32x32 (He et al. 2016, arXiv 1512.03385, section 4.2).

    A 3x3 convolution, then three stages of 16, 32 and 64 channels, (depth - 2) / 6 residual blocks of two 3x3
    convolutions in each. Where the shape changes the shortcut takes every other pixel and pads channels with
    zeros ("option A"), so it has no weights. Batch normalisation (epsilon 1e-5) follows every convolution;
    global average pooling and a dense layer end it. Convolutions of stride 2 pad one pixel at each side, as
    PyTorch does, for the published weights.

    Args:
        depth: layers with weights, 6 n + 2.
        classes: number of outputs.
        weights: a file with the weights of a PyTorch model of this shape, by its names
            (`layer1.0.conv1.weight`, `bn1.running_mean`, `linear.weight` ...), as `published.read` reads it; None
            for random ones.
        name: of the model; None for "resnet" and the depth.

    Returns:
        A functional model: images (batch, 32, 32, 3), RGB in [0, 1] less `published.MEAN` over
        `published.STD`, to logits (batch, classes).

    Raises:
        ValueError: there is no network of such a depth, or the file has other weights than this network.
        OSError: the file can't be read.

    Example:
        >>> model = cifar_resnet(20, weights="cifar_resnet20.npz")
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"A CIFAR ResNet has 6 n + 2 layers, such as 20 or 56; got depth={depth}.")
    image = keras.Input((32, 32, 3), name="image")
    x = _relu(_conv(image, WIDTHS[0], 1, "conv1", "bn1"), "relu1")
    for stage, width in enumerate(WIDTHS, 1):
        for block in range(blocks):
            strides = 2 if stage > 1 and not block else 1
            x = _block(x, width, strides, f"layer{stage}_{block}")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    model = keras.Model(image, layers.Dense(classes, name="linear")(x), name=name or f"resnet{depth}")
    if weights is not None:
        published.load(model, weights)
    return model


def _block(x: Any, width: int, strides: int, name: str) -> Any:
    """Two 3x3 convolutions and the shortcut of option A."""
    y = _relu(_conv(x, width, strides, f"{name}_conv1", f"{name}_bn1"), f"{name}_relu1")
    y = _conv(y, width, 1, f"{name}_conv2", f"{name}_bn2")
    if strides != 1:
        x = layers.MaxPooling2D(1, strides, name=f"{name}_every_other")(x)
        missing = width - x.shape[-1]
        x = ops.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))
    return _relu(layers.Add(name=f"{name}_add")([y, x]), f"{name}_relu2")


def _conv(x: Any, width: int, strides: int, conv: str, norm: str) -> Any:
    padding = "same"
    if strides != 1:
        x, padding = layers.ZeroPadding2D(1, name=f"{conv}_pad")(x), "valid"
    x = layers.Conv2D(width, 3, strides, padding=padding, use_bias=False, kernel_initializer="he_normal", name=conv)(x)
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=norm)(x)


def _relu(x: Any, name: str) -> Any:
    return layers.ReLU(name=name)(x)
