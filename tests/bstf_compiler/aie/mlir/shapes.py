"""Windows and channels of every convolution and pool of three networks of keras.applications."""

from __future__ import annotations

import keras

from bstf_compiler.graph import Window


def layer_shapes(name: str) -> tuple[set[tuple[Window, int, int]], set[tuple[str, Window, int]]]:
    """Convolutions (window, channels in, channels out), and pools (kind, window, channels)."""
    with keras.StatelessScope():  # no weights are made
        model = getattr(keras.applications, name)(weights=None)
    convolutions, pools = set(), set()
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D):
            window = _window(layer, layer.kernel_size)
            convolutions.add((window, layer.input.shape[-1], layer.filters))
        elif isinstance(layer, keras.layers.Dense):
            convolutions.add((Window((1, 1)), layer.input.shape[-1], layer.units))
        elif isinstance(layer, (keras.layers.MaxPooling2D, keras.layers.AveragePooling2D)):
            window = _window(layer, layer.pool_size)
            kind = "max" if isinstance(layer, keras.layers.MaxPooling2D) else "average"
            pools.add((kind, window, layer.input.shape[-1]))
        elif isinstance(layer, keras.layers.GlobalAveragePooling2D):
            pools.add(("average", Window(tuple(layer.input.shape[1:3])), layer.input.shape[-1]))
    return convolutions, pools


def _window(layer: keras.Layer, kernel: tuple[int, int]) -> Window:
    """A window as the compiler has it: with a padding layer before it, or the padding that TensorFlow gives to an image
    of this size.
    """
    before = layer.input._keras_history.operation
    if isinstance(before, keras.layers.ZeroPadding2D):
        (top, bottom), (left, right) = before.padding
        return Window(tuple(kernel), tuple(layer.strides), (top, bottom, left, right))
    ends = []
    for size, length, stride in zip(layer.input.shape[1:3], kernel, layer.strides):
        total = max(0, (-(-size // stride) - 1) * stride + length - size) if layer.padding == "same" else 0
        ends += [total // 2, total - total // 2]
    return Window(tuple(kernel), tuple(layer.strides), tuple(ends))
