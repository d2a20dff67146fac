import keras
import numpy as np
import pytest
from keras import layers

from bstf.layers import MaskedConv2D
from bstf.quantization import bias_correction as room
from bstf.quantization import quantize
from bstf.quantization.bias_correction import corrected_biases
from bstf.quantization.calibrate import run
from bstf.quantization.fold import flatten
from bstf.quantization.positions import half_even, min_mse, to_grid


def rounded_down(shape, rng):
    """Weights that all round towards minus infinity on the grid of 1/128, most by nearly half a unit."""
    kernel = (rng.integers(-60, 60, shape) + 0.45) / 128
    kernel.flat[0] = 127 / 128  # fixes the grid
    return kernel.astype(np.float32)


def build():
    """Two convolutions with a relu between, whose weights all lose by rounding; inputs are positive."""
    rng = np.random.default_rng(0)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 4), name="image"),
            layers.Conv2D(8, 3, name="a"),
            layers.ReLU(name="relu"),
            layers.DepthwiseConv2D(3, name="b"),
            layers.Flatten(name="flat"),
            layers.Dense(5, name="c"),
        ]
    )
    for layer in model.layers:
        if hasattr(layer, "kernel"):
            layer.kernel.assign(rounded_down(layer.kernel.shape, rng))
    return model


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).uniform(0, 1, (48, 6, 6, 4)).astype(np.float32)


def mean_errors(model, quantised, images):
    """Mean of (quantised - float) of each channel, by layer."""
    exact = dict(run(flatten(model), [images]))
    found = {}
    for name in "abc":
        output = np.asarray(keras.Model(quantised.input, quantised.get_layer(name).output)(images))
        difference = output - exact[name]
        found[name] = difference.mean(axis=tuple(range(difference.ndim - 1)))
    return found


def test_means_of_all_channels_come_back(images):
    model = build()
    plain, corrected = (quantize(model, images, compensate=False, correct_bias=correct) for correct in (False, True))
    before, after = mean_errors(model, plain, images), mean_errors(model, corrected, images)
    for name in "abc":
        # The rest is the rounding of the bias, at most half a unit of its grid, and what the layers before leave.
        unit = 2.0 ** -corrected.get_layer(name).bias_position
        assert np.abs(after[name]).max() < np.abs(before[name]).max() / 4
        assert np.abs(after["a"]).max() <= unit / 2 + 1e-5 or name != "a"


def test_the_correction_has_the_right_sign(images):
    """Weights that lose by rounding lower the mean of a layer with positive inputs: its bias must rise by that."""
    model = build()
    network, quantised = flatten(model), quantize(model, images, compensate=False, correct_bias=False)
    biases = corrected_biases(network, quantised, [images])
    op = network.operations["a"]
    lost = op.kernel - to_grid(op.kernel, quantised.get_layer("a").kernel_position, half_even)
    lost[0, 0, 0, 0] = 0
    assert (lost >= 0).all()
    # By hand: the mean of what the lost weights would have added, with the image on its grid.
    inputs = np.asarray(quantised.get_layer("image_grid")(images))
    shift = keras.ops.conv(images, op.kernel, padding="valid") - keras.ops.conv(
        inputs, op.kernel - lost, padding="valid"
    )
    expected = np.asarray(shift).mean(axis=(0, 1, 2))
    assert (expected > 0).all()
    np.testing.assert_allclose(biases["a"], expected, atol=1e-5)


def test_later_layers_take_back_what_rounding_left_before_them(images):
    """With its own corrected bias, not on a grid, behind those on their grids, each layer has the float's means."""
    model = build()
    network, quantised = flatten(model), quantize(model, images, compensate=False, correct_bias=False)
    biases = corrected_biases(network, quantised, [images])
    for name in "abc":
        layer = quantised.get_layer(name)
        layer.quantised_bias = lambda name=name: keras.ops.convert_to_tensor(biases[name])
        np.testing.assert_allclose(mean_errors(model, quantised, images)[name], 0, atol=2e-5)
        rounded = to_grid(biases[name], min_mse(biases[name], half_even), half_even)
        layer.quantised_bias = lambda rounded=rounded: keras.ops.convert_to_tensor(rounded)


def test_the_first_images_are_kept_that_fit(images, monkeypatch):
    model = build()
    network = flatten(model)
    monkeypatch.setattr(room, "_LARGEST_TENSOR", 8 * 4 * 144)  # the image has 144 values, the first layer 128
    first = room.FirstImages(network)
    for start in range(0, 48, 6):
        first.add([images[start : start + 6]])
    assert np.array_equal(first.all(), [images[:8]])
    few = quantize(model, images, compensate=False, correct_bias=True)
    monkeypatch.undo()
    biases = corrected_biases(network, quantize(model, images, compensate=False, correct_bias=False), [images[:8]])
    layer = few.get_layer("a")
    assert np.array_equal(layer.bias, to_grid(biases["a"], layer.bias_position, half_even))
    assert not np.array_equal(
        layer.bias, quantize(model, images, compensate=False, correct_bias=True).get_layer("a").bias
    )


def test_an_iterator_of_images_is_enough(images):
    model = build()
    whole = quantize(model, [images[:24], images[24:]], compensate=False, correct_bias=True)
    once = quantize(model, iter([images[:24], images[24:]]), compensate=False, correct_bias=True)
    assert np.array_equal(whole(images), once(images))


def test_zero_blocks_and_kernels_stay(images):
    model = keras.Sequential([keras.Input((6, 6, 4), name="image"), MaskedConv2D(8, 3, block=(2, 4), name="conv")])
    model.get_layer("conv").set_gamma(np.array([[1, 0], [0, 0]]))
    plain, corrected = (quantize(model, images, compensate=False, correct_bias=correct) for correct in (False, True))
    layer = corrected.get_layer("conv")
    assert np.array_equal(layer.kernel, plain.get_layer("conv").kernel)
    assert not np.asarray(layer.kernel)[:, :, 2:].any()
    assert not np.asarray(layer.bias)[4:].any()  # a dead channel has no mean to correct
