"""Rounding that makes good for itself: closer outputs than rounding to the nearest, on the grid, zero blocks kept."""

from dataclasses import replace

import keras
import numpy as np
import pytest
from keras import layers

import bstf
from bstf.quantization import quantize
from bstf.quantization.adjust import Positions
from bstf.quantization.calibrate import calibrate, run
from bstf.quantization.fold import flatten
from bstf.quantization.network import Weights
from bstf.quantization.positions import half_even, min_mse, to_grid
from bstf.quantization.rounding import compensated_kernels

LAYERS = {
    "conv": lambda: layers.Conv2D(16, 3, padding="same"),
    "strides": lambda: layers.Conv2D(16, (2, 3), strides=2),
    "dilated": lambda: layers.Conv2D(8, 3, dilation_rate=2, padding="same"),
    "groups": lambda: layers.Conv2D(12, 3, groups=4),
    "depthwise": lambda: layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2),
    "transposed": lambda: layers.Conv2DTranspose(6, 3, strides=2),
}


def smooth_images(count, *shape):
    """Neighbouring pixels are alike, as in photos."""
    coarse = np.random.default_rng(0).normal(size=(count, 3, 3, shape[-1])).astype(np.float32)
    return keras.ops.convert_to_numpy(keras.ops.image.resize(coarse, shape[:2], "bilinear"))


def rounded(model, images):
    """The float network, its kernels' positions and the kernels that rounding finds."""
    net = flatten(model)
    for op in net.operations.values():
        if isinstance(op, Weights):  # one channel as in networks with depthwise layers: many times as large
            op.kernel[..., 0] *= 20
    kernels = {op.name: min_mse(op.kernel, half_even) for op in net.operations.values() if isinstance(op, Weights)}
    positions = Positions(calibrate(net, images), kernels, {})
    return net, positions, compensated_kernels(net, positions, [images])


def output(net, images, kernels):
    changed = {name: replace(net.operations[name], kernel=kernel) for name, kernel in kernels.items()}
    *_, (_, values) = run(replace(net, operations=net.operations | changed), [images])
    return values


@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_are_closer_than_by_rounding_to_the_nearest(kind):
    keras.utils.set_random_seed(0)
    images = smooth_images(12, 10, 9, 8)
    net, positions, kernels = rounded(keras.Sequential([keras.Input((10, 9, 8)), LAYERS[kind]()]), images)
    nearest = {name: to_grid(net.operations[name].kernel, positions.kernel[name], half_even) for name in kernels}
    for name, kernel in kernels.items():
        assert np.array_equal(kernel, to_grid(kernel, positions.kernel[name], half_even))
    *_, (_, wanted) = run(net, [images])
    errors = [np.square(output(net, images, found) - wanted).mean() for found in (kernels, nearest)]
    if kind == "transposed":
        assert errors[0] == errors[1]
    else:
        assert errors[0] < 0.7 * errors[1]


def test_zero_blocks_stay_zero_and_dead_inputs_do_no_harm():
    keras.utils.set_random_seed(0)
    stack = [layers.Conv2D(24, 3, activation="relu"), layers.Conv2D(20, 3), layers.GlobalAveragePooling2D()]
    model = keras.Sequential([keras.Input((10, 9, 16)), *stack, layers.Dense(12)])
    sparse = bstf.sparsify(model, ratio=0.5)
    images = smooth_images(8, 10, 9, 16)
    images[..., 3] = 0
    net, _, kernels = rounded(sparse, images)
    for name, kernel in kernels.items():
        dead = ~bstf.blocks.nonzero_blocks(np.atleast_2d(net.operations[name].kernel), net.operations[name].block)
        found = ~bstf.blocks.nonzero_blocks(np.atleast_2d(kernel), net.operations[name].block)
        assert dead.any() and (found | ~dead).all() and np.isfinite(kernel).all()


def test_a_network_of_uneven_depthwise_layers_is_worth_quantising_again():
    keras.utils.set_random_seed(0)
    image = keras.Input((12, 12, 3))
    x = layers.Conv2D(24, 3, activation="relu6")(image)
    for _ in range(3):
        x = layers.Conv2D(24, 1)(layers.ReLU(6)(layers.DepthwiseConv2D(3, padding="same")(x)))
    model = keras.Model(image, layers.Dense(5)(layers.GlobalAveragePooling2D()(x)))
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, layers.DepthwiseConv2D):
            layer.kernel.assign(layer.kernel * np.exp(rng.normal(scale=1.5, size=(1, 1, 24, 1))))
    images = smooth_images(24, 12, 12, 3)
    wanted = model.predict(images, verbose=0)
    noise = [
        np.square(quantize(model, images, compensate=compensate).predict(images, verbose=0) - wanted).mean()
        for compensate in (True, False)
    ]
    assert noise[0] < 0.7 * noise[1]
