"""A small residual network for small images."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import layers


def small_resnet(
    input_shape: Sequence[int] = (28, 28, 1),
    classes: int = 10,
    widths: Sequence[int] = (16, 32, 64),
    depth: int = 2,
) -> keras.Model:
    """Builds a residual network in the manner of He et al. 2016 (arXiv 1512.03385), section 4.2.

    A 3x3 convolution, then stages of residual blocks of two 3x3 convolutions; every stage but the first
    halves the image in its first block, where a 1x1 convolution brings the shortcut to the stage's width.
    Batch normalisation follows every convolution. Global average pooling, dense layer and softmax end it.

    Args:
        input_shape: (height, width, channels) of an image.
        classes: number of outputs.
        widths: channels of each stage, multiples of 8 so that they are whole 8x8 blocks.
        depth: residual blocks of each stage.

    Returns:
        A functional model, not trained: float images (batch, height, width, channels) to class probabilities
        (batch, classes).

    Raises:
        ValueError: a width isn't a positive multiple of 8, or there is no stage, block or class.

    Example:
        >>> model = small_resnet((32, 32, 3), classes=10, widths=(16, 32), depth=1)
    """
    if not widths or any(width < 8 or width % 8 for width in widths):
        raise ValueError(f"widths of small_resnet must be positive multiples of 8; got {tuple(widths)}.")
    if depth < 1 or classes < 1:
        raise ValueError(f"small_resnet needs depth and classes of at least 1; got {depth} and {classes}.")
    inputs = keras.Input(input_shape, name="image")
    x = layers.ReLU(name="stem_relu")(_conv(inputs, widths[0], 3, 1, "stem"))
    for stage, width in enumerate(widths):
        for index in range(depth):
            strides = 2 if stage and not index else 1
            x = _block(x, width, strides, f"stage{stage + 1}_block{index + 1}")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    outputs = layers.Dense(classes, activation="softmax", name="predictions")(x)
    return keras.Model(inputs, outputs, name="small_resnet")


def _conv(x: Any, filters: int, size: int, strides: int, name: str) -> Any:
    """Convolution and batch normalisation."""
    x = layers.Conv2D(
        filters,
        size,
        strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        name=f"{name}_conv",
    )(x)
    return layers.BatchNormalization(momentum=0.9, name=f"{name}_bn")(x)


def _block(x: Any, width: int, strides: int, name: str) -> Any:
    """Two 3x3 convolutions and a shortcut, of 1x1 convolution where the shape changes."""
    shortcut = x
    if strides != 1 or x.shape[-1] != width:
        shortcut = _conv(x, width, 1, strides, f"{name}_shortcut")
    x = layers.ReLU(name=f"{name}_1_relu")(_conv(x, width, 3, strides, f"{name}_1"))
    x = layers.Add(name=f"{name}_add")([_conv(x, width, 3, 1, f"{name}_2"), shortcut])
    return layers.ReLU(name=f"{name}_relu")(x)
