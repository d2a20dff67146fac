import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from bstf import datasets
from bstf.blocks import nonzero_blocks
from bstf.layers import MaskedConv2D, MaskedConv2DTranspose, MaskedDense
from bstf.quantization import convert, positions, prepare, quantize
from bstf.quantization.fixed_point import FixedPoint, fake_quantize
from bstf.quantization.positions import half_up, min_mse, to_grid
from bstf.quantization.trainable import TrainableGrid, position_of, threshold_of, trainable_fake_quantize
from bstf.training import accuracy, train

# --- the gradients


def gradients(x, log2_threshold, weights):
    """Values, and the gradients of sum(weights * q) by x and by log2 t."""
    x, threshold = tf.constant(x, tf.float32), tf.constant(log2_threshold, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch([x, threshold])
        quantised = trainable_fake_quantize(x, threshold)
        total = tf.reduce_sum(quantised * weights)
    return quantised.numpy(), *(gradient.numpy() for gradient in tape.gradient(total, [x, threshold]))


def samples(step, seed=0):
    """Values within the grid and beyond both ends, ties and ends themselves among them."""
    rng = np.random.default_rng(seed)
    ends = np.array([-300.0, -128.5, -128.49, -128.0, -0.5, 0.0, 0.5, 2.5, 127.0, 127.49, 127.5, 300.0])
    return (np.append(ends, rng.uniform(-200, 200, 50)) * step).astype(np.float32)


@pytest.mark.parametrize("log2_threshold", [-3.0, -0.3, 0.0, 0.2, 2.7])
def test_gradients_are_the_papers(log2_threshold):
    step = 2.0 ** (math.ceil(log2_threshold) - 7)
    x = samples(step)
    weights = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    quantised, by_x, by_threshold = gradients(x, log2_threshold, weights)
    r = np.floor(x.astype(np.float64) / step + 0.5)
    inside = (r >= -128) & (r <= 127)
    assert np.array_equal(quantised, np.clip(r, -128, 127) * step)
    assert np.array_equal(by_x, weights * inside)
    slope = step * math.log(2) * np.where(inside, r - x / step, np.clip(r, -128, 127))
    assert by_threshold == pytest.approx(np.sum(weights * slope), rel=1e-5)


def test_threshold_gradient_is_the_slope_of_the_smooth_surrogate():
    """The gradient takes the ceiling and the rounding as the identity plus what they add at this point."""
    log2_threshold, h = 1.0, 1e-6  # where the ceiling adds nothing
    x = samples(2.0**-6).astype(np.float64)
    r = np.floor(x * 2**6 + 0.5)
    weights = np.random.default_rng(1).normal(size=x.shape) * ~np.isin(r, (-128, 127))  # those have two slopes

    def surrogate(log2_threshold):
        step = 2.0 ** (log2_threshold - 7)
        return np.sum(weights * step * np.clip(x / step + (r - x * 2**6), -128, 127))

    expected = (surrogate(log2_threshold + h) - surrogate(log2_threshold - h)) / (2 * h)
    assert gradients(x, log2_threshold, weights)[2] == pytest.approx(expected, rel=1e-4)


@settings(max_examples=100, deadline=None)
@given(position=st.integers(-20, 32), seed=st.integers(0, 2**32 - 1))
def test_forward_is_that_of_the_fixed_point_layer(position, seed):
    x = (np.random.default_rng(seed).normal(size=500) * 2.0 ** (7 - position)).astype(np.float32)
    threshold = tf.constant(threshold_of(position))
    assert position_of(threshold) == position
    assert np.array_equal(trainable_fake_quantize(tf.constant(x), threshold), fake_quantize(x, position))
    x[:200] = np.ldexp(np.arange(-200, 200, 2) + 0.5, -position)  # ties
    even = trainable_fake_quantize(tf.constant(x), threshold, half_even=True)
    assert np.array_equal(even, to_grid(x, position, positions.half_even))


@pytest.mark.parametrize("start", [-4, 4])
def test_a_learned_threshold_finds_the_position_of_least_squared_error(start):
    x = np.random.default_rng(0).standard_t(3, size=4000).astype(np.float32)
    best = min_mse(x, half_up)
    grid = TrainableGrid("x", best + start)
    model = keras.Sequential([keras.Input((x.size,)), grid])
    model.compile(keras.optimizers.Adam(0.2), "mse", run_eagerly=True)
    model.fit(x[None], x[None], epochs=60, verbose=0)
    assert grid.initial_position == best + start
    assert abs(grid.position - best) <= 1  # it moves to and fro between two


# --- the models


def build():
    """Every kind of layer with weights; blocks of a masked convolution and dense layer are zero."""
    keras.utils.set_random_seed(0)
    entry = keras.Input((9, 9, 3), name="image")
    x = layers.Conv2D(16, 3, padding="same", use_bias=False, name="stem")(entry)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm")(x))
    y = MaskedConv2D(16, 3, padding="same", block=(4, 8), name="masked")(x)
    x = layers.MaxPooling2D(2, name="max")(layers.Add(name="add")([x, y]))
    x = layers.AveragePooling2D(3, 2, "same", name="mean")(x)
    x = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="depthwise")(x)
    x = layers.Conv2D(8, 1, groups=2, activation="relu6", name="grouped")(x)
    x = MaskedConv2DTranspose(6, 2, 2, block=(4, 2), name="transposed")(x)
    x = layers.Multiply(name="product")([x, layers.Activation("sigmoid", name="sigmoid")(x)])
    x = layers.Concatenate(name="concat")([x, layers.ReLU(name="more")(x)])
    x = layers.GlobalAveragePooling2D(keepdims=True, name="pool")(x)
    x = MaskedDense(12, name="dense")(layers.Flatten(name="flat")(x))
    model = keras.Model(entry, layers.Softmax(name="softmax")(layers.Dense(4, name="logits")(x)), name="net")
    model.get_layer("masked").set_gamma(np.array([[1, 0], [0, 0], [0, 1], [1, 1]]))
    model.get_layer("transposed").set_gamma(np.array([[1, 0, 1], [0, 0, 1]]))
    model.get_layer("dense").set_gamma(np.array([[1, 0], [0, 1]]))
    return model


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(64, 9, 9, 3)).astype(np.float32), rng.integers(0, 4, 64)


@pytest.fixture(scope="module")
def trained(data):
    model = prepare(build(), data[0])
    optimizer = keras.optimizers.AdamW(0.2, weight_decay=0.01)
    model.compile(optimizer, "sparse_categorical_crossentropy", run_eagerly=True)
    model.fit(*data, batch_size=16, epochs=2, verbose=0)
    return model


def test_it_starts_as_the_quantised_model(data):
    model = build()
    before = [np.array(weight) for weight in model.get_weights()]
    for options in ({}, {"activations": "non_overflow", "equalize": True, "correct_bias": True}):
        start, quantised = prepare(model, data[0], **options), quantize(model, data[0], compensate=False, **options)
        assert np.array_equal(start(data[0]), quantised(data[0]))
        assert start.name == quantised.name
    for old, new in zip(before, model.get_weights()):
        assert np.array_equal(old, new)


def test_the_trained_model_and_its_fixed_point_model_are_equal_bit_by_bit(trained, data):
    fixed = convert(trained)
    x = np.concatenate([data[0], 5 * data[0]])
    assert np.array_equal(trained(x), fixed(x))
    assert np.array_equal(trained.predict(x, verbose=0), fixed.predict(x, verbose=0))
    start = quantize(build(), data[0], compensate=False)
    assert [layer.name for layer in fixed.layers] == [layer.name for layer in start.layers]
    assert not np.array_equal(trained(x), start(x))
    assert not fixed.trainable_weights
    found = {layer.name: layer.position for layer in fixed.layers if isinstance(layer, FixedPoint)}
    grids = [layer for layer in trained.layers if isinstance(layer, TrainableGrid)]
    assert {grid.name: grid.position for grid in grids}.items() <= found.items()
    assert any(grid.position != grid.initial_position for grid in grids)  # the thresholds did train


def test_zero_blocks_stay_zero_in_kernels_slots_and_fixed_point_model(trained, data):
    fixed, start = convert(trained), build()
    for name in ("masked", "transposed", "dense"):
        gamma = np.asarray(start.get_layer(name).gamma)
        layer = trained.get_layer(name)
        assert layer.block == fixed.get_layer(name).block == start.get_layer(name).block
        assert not np.array_equal(layer.kernel, start.get_layer(name).kernel)
        slots = [slot for slot in trained.optimizer.variables if slot.shape == layer.kernel.shape]
        assert len([slot for slot in slots if f"{name}_kernel" in slot.path.replace("/", "_")]) == 2
        own = [slot for slot in slots if f"{name}_kernel" in slot.path.replace("/", "_")]
        for kernel in (layer.kernel, layer.quantised_kernel(), fixed.get_layer(name).kernel, *own):
            kernel = np.asarray(kernel)
            kernel = np.swapaxes(kernel, 2, 3) if name == "transposed" else kernel
            assert np.array_equal(nonzero_blocks(kernel, layer.block)[gamma == 0], np.zeros(np.sum(gamma == 0)))


def test_one_threshold_for_all_tensors_on_a_grid(trained):
    grids = [layer for layer in trained.layers if isinstance(layer, TrainableGrid)]
    assert len({grid.tensor for grid in grids}) == len(grids)
    assert len(trained.get_layer("add_grid")._inbound_nodes) == 2  # the sum, and its average pooling


def test_fixed_thresholds_stay(data):
    model = prepare(build(), data[0], learn_thresholds=False)
    plain = 2 * sum(hasattr(layer, "kernel") for layer in model.layers)
    assert len(model.trainable_weights) == plain
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    before = np.asarray(model.get_layer("stem").kernel)
    model.train_on_batch(data[0][:16], data[1][:16])
    assert not np.array_equal(before, model.get_layer("stem").kernel)
    fixed, start = convert(model), quantize(build(), data[0], compensate=False)
    for layer in start.layers:
        for position in ("position", "kernel_position", "bias_position"):
            assert getattr(fixed.get_layer(layer.name), position, None) == getattr(layer, position, None)
    assert np.array_equal(model(data[0]), fixed(data[0]))


def test_weights_are_stored_and_read_in_the_middle_of_training(trained, data, tmp_path):
    trained.save_weights(tmp_path / "model.weights.h5")
    again = prepare(build(), data[0])
    assert not np.array_equal(again(data[0]), trained(data[0]))
    again.load_weights(tmp_path / "model.weights.h5")
    assert np.array_equal(again(data[0]), trained(data[0]))
    assert np.array_equal(convert(again)(data[0]), convert(trained)(data[0]))


def test_a_stored_model_goes_on_training_but_has_no_network(tmp_path):
    model = keras.Sequential([keras.Input((4, 4, 3)), MaskedConv2D(8, 3, block=(2, 4), name="conv")])
    model.get_layer("conv").set_gamma(np.array([[1, 0], [0, 1]]))
    x = np.random.default_rng(0).normal(size=(8, 4, 4, 3)).astype(np.float32)
    for learned in (False, True):
        trainable = prepare(model, x, learn_thresholds=learned)
        trainable.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert np.array_equal(loaded(x), trainable(x))
        assert len(loaded.trainable_weights) == len(trainable.trainable_weights) == 2 + 4 * learned
        with pytest.raises(ValueError, match="loaded from a file.*prepare the float model again"):
            convert(loaded)


def test_functions_are_stored_with_the_weights_only(trained, tmp_path):
    with pytest.raises(ValueError, match=r"'product' holds a function.*save_weights"):
        trained.save(tmp_path / "model.keras")


def test_thresholds_that_no_shift_allows_are_raised(data):
    model = prepare(build(), data[0])
    layer = model.get_layer("grouped")
    layer.bias_threshold.assign(threshold_of(layer.kernel_position + 40))
    layer.bias.assign(np.full(8, 2.0**-30))
    fixed = convert(model).get_layer("grouped")
    assert fixed.bias_position <= fixed.kernel_position + model.get_layer("add_grid").position + 40
    total = fixed.kernel_position + convert(model).get_layer("depthwise_grid").position
    assert 0 <= total - fixed.bias_position <= 16


def test_what_convert_refuses(data):
    with pytest.raises(ValueError, match=r"bstf.quantization.prepare.*bstf.quantize"):
        convert(build())
    model = prepare(build(), data[0][:2])
    model.get_layer("stem").kernel.assign(np.full((3, 3, 3, 16), np.nan))
    with pytest.raises(ValueError, match="'stem' holds NaN.*diverged"):
        convert(model)


def test_training_on_grids_loses_nothing_against_quantisation_after_training():
    keras.utils.set_random_seed(0)
    digits = datasets.load(limit_per_class=60)
    normal = {"padding": "same", "activation": "relu"}
    model = keras.Sequential(
        [
            keras.Input(digits.input_shape, name="image"),
            layers.Conv2D(8, 5, 4, **normal),
            layers.DepthwiseConv2D(3, **normal),
            layers.Conv2D(16, 3, 2, **normal),
            layers.Flatten(),
            layers.Dense(10, activation="softmax"),
        ]
    )
    train(model, digits, epochs=6, learning_rate=5e-3, verbose=0)
    images = digits.images(64)
    after = quantize(model, images, compensate=False)
    learner = prepare(model, images)
    learner.compile(
        keras.optimizers.Adam(5e-4), "sparse_categorical_crossentropy", metrics=["accuracy"], jit_compile=False
    )
    learner.fit(digits.train, epochs=4, verbose=0)
    trained = convert(learner)
    assert accuracy(trained, digits) >= accuracy(after, digits) > 0.6
