"""Selections of channels and permutations before weights: the folded network computes what the model does."""

import keras
import numpy as np
import pytest

import bstf
from bstf.blocks import nonzero_blocks
from bstf.quantization import calibrate, fold

layers, ops = keras.layers, keras.ops
RNG = np.random.default_rng(0)
IMAGE = (4, 6, 20)


def shuffled(x):
    """BGR as keras.applications writes it, of 20 channels."""
    return ops.stack([x[..., place] for place in (5, 0, 19, 7)], axis=-1)


@pytest.mark.parametrize(
    ("network_of", "kinds"),
    [
        (lambda x: layers.Conv2D(3, 3)(shuffled(x)), ["Convolution"]),
        (lambda x: layers.Conv2D(3, 3)(shuffled(x) * np.arange(4.0) - 1.0), ["Affine", "Convolution"]),
        (lambda x: layers.Conv2D(3, 1)(ops.flip(x, axis=-1)), ["Convolution"]),
        (lambda x: layers.Conv2D(3, 1)(x[:, 1:, :-2, 3::4]), ["Crop", "Convolution"]),
        (lambda x: layers.Conv2D(3, 1)(ops.stack([x[..., 1]] * 2, axis=-1) * np.ones(2)), ["Convolution"] * 2),
        (lambda x: layers.DepthwiseConv2D(3)(x[..., :5]), ["Convolution"] * 2),
        (lambda x: ops.flip(x, axis=-1), ["Convolution"]),
        (lambda x: layers.Dense(3)(layers.GlobalAveragePooling2D()(x)[:, ::-1]), ["GlobalAveragePool", "Dense"]),
        (lambda x: layers.Dense(3)(layers.Flatten()(layers.Permute((2, 3, 1))(x))), ["Reshape", "Dense"]),
        (lambda x: layers.Dense(3)(layers.Flatten()(ops.transpose(x, (0, 3, 1, 2)))), ["Reshape", "Dense"]),
        (lambda x: layers.Conv2D(3, 1)(layers.Permute((1, 2, 3))(x[..., :])), ["Convolution"]),
    ],
)
def test_weights_take_in_what_is_before_them(network_of, kinds):
    image = keras.Input(IMAGE)
    model = keras.Model(image, network_of(image))
    network = fold.flatten(model)
    assert [type(op).__name__ for op in network.operations.values()] == ["Input", *kinds]
    x = RNG.normal(size=(2, *IMAGE)).astype(np.float32)
    *_, (name, values) = calibrate.run(network, [x])
    assert (name,) == network.outputs
    np.testing.assert_allclose(values, model(x), rtol=1e-4, atol=1e-5)


def test_gamma_is_that_of_the_weights_in_their_new_order():
    image = keras.Input(IMAGE)
    sparse = bstf.sparsify(keras.Model(image, layers.Conv2D(16, 1, name="conv")(ops.flip(image, axis=-1))), ratio=0.5)
    conv = fold.flatten(sparse).operations["conv"]
    assert np.array_equal(conv.gamma, nonzero_blocks(conv.kernel, conv.block))
    assert np.array_equal(conv.kernel[:, :, ::-1], sparse.get_layer("conv").kernel * np.float32(1))


@pytest.mark.parametrize(
    ("network_of", "message"),
    [
        (lambda x: layers.Permute((2, 1, 3), name="turn")(x), "'turn' moves axes.*before a Flatten"),
        (lambda x: layers.Reshape((1, 1, 480))(layers.Permute((2, 1, 3), name="turn")(x)), "'turn' moves axes"),
        (lambda x: ops.transpose(x, (1, 0, 2, 3)), "moves the axis of the batch"),
        (lambda x: x[..., 3], "output is channel 3 of .* on its own"),
        (lambda x: x[..., 3] + 1.0, "reads a channel on its own"),
        (lambda x: ops.stack([x, x], axis=-1), "other tensors than single channels"),
        (lambda x: ops.stack([x[..., 1], x[..., 2]], axis=1), "other tensors than single channels"),
        (lambda x: x[:, ::2], "other parts than rows and columns"),
        (lambda x: x[..., 5:5], "nothing is left"),
        (lambda x: ops.flip(x, axis=1), "flips axis 1"),
        (lambda x: layers.GlobalMaxPooling2D()(x)[:, ::-1], "only a dense layer may read"),
    ],
)
def test_other_orders_are_refused(network_of, message):
    image = keras.Input(IMAGE)
    with pytest.raises(ValueError, match=message):
        fold.flatten(keras.Model(image, network_of(image)))
