"""One set of numbers: Keras, the SavedModel, the integer reference and the simulated program agree bit for bit."""

import keras
import numpy as np
import tensorflow as tf
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import bstf
import bstf_compiler
from bstf_compiler import integer

layers = keras.layers


def random_keras_network(seed, plain=True):
    """Channels 1 to 40, kernels 1 to 7, strides 1 to 3, both paddings, odd sizes; ends in dense layers.

    With convolutions in groups, dilated convolutions and concatenations unless `plain`.
    """
    rng = np.random.default_rng(seed)

    def channels():
        return int(rng.integers(1, 41))

    def window(x, most=7):
        return [int(rng.integers(1, min(most, size) + 1)) for size in x.shape[1:3]]

    def strides():
        return [int(rng.integers(1, 4)) for _ in range(2)]

    def padding():
        return str(rng.choice(["same", "valid"]))

    def activation(x):
        return [lambda y: y, layers.ReLU(), layers.ReLU(max_value=6.0)][rng.integers(3)](x)

    def conv(x):
        bias = bool(rng.integers(2))
        y = layers.Conv2D(channels(), window(x), strides(), padding(), use_bias=bias)(x)
        return activation(layers.BatchNormalization()(y) if rng.integers(2) else y)

    def residual(x):
        y = layers.Conv2D(x.shape[-1], window(x, 3), padding="same", activation="relu")(x)
        return activation(layers.Add()([x, layers.Conv2D(x.shape[-1], window(x, 5), padding="same")(y)]))

    def pad(x):
        amounts = [[int(n) for n in rng.integers(0, 3, 2)] for _ in range(2)]
        return layers.ZeroPadding2D(amounts)(x)

    def max_pool(x):
        return layers.MaxPooling2D(window(x, 3), strides(), padding())(x)

    def average_pool(x):
        size = int(min(rng.integers(1, 4), *x.shape[1:3]))
        return layers.AveragePooling2D(size, int(rng.integers(1, 3)), padding())(x)

    def steps(x, kernel):
        """Strides and dilation, one of which is 1, and a padding that leaves something."""
        stride, dilation = ((int(rng.integers(1, 4)), 1), (1, int(rng.integers(1, 4))))[rng.integers(2)]
        fits = all((size - 1) * dilation < extent for size, extent in zip(kernel, x.shape[1:3]))
        return {"strides": stride, "dilation_rate": dilation, "padding": padding() if fits else "same"}

    def dilated(x):
        kernel = window(x, 4)
        return activation(layers.Conv2D(channels(), kernel, **steps(x, kernel))(x))

    def grouped(x):
        groups = int(rng.choice([n for n in range(1, x.shape[-1] + 1) if x.shape[-1] % n == 0]))
        kernel, filters = window(x, 4), groups * -(-channels() // groups)
        return activation(layers.Conv2D(filters, kernel, groups=groups, **steps(x, kernel))(x))

    def depthwise(x):
        kernel, multiplier = window(x, 4), int(rng.integers(1, 3)) if x.shape[-1] < 40 else 1
        y = layers.DepthwiseConv2D(kernel, depth_multiplier=multiplier, **steps(x, kernel))(x)
        return activation(layers.BatchNormalization()(y))

    def separable(x):
        kernel = window(x, 4)
        return activation(layers.SeparableConv2D(channels(), kernel, **steps(x, kernel))(x))

    def join(x):
        parts = [x, activation(layers.Conv2D(channels(), 1)(x)), layers.MaxPooling2D(3, 1, "same")(x)]
        whole = layers.Concatenate()([parts[i] for i in rng.permutation(3)[: rng.integers(2, 4)]])
        return activation(layers.Conv2D(channels(), 1)(whole) if whole.shape[-1] > 60 else whole)

    x = image = keras.Input((*(int(n) for n in rng.integers(1, 16, 2)), channels()), name="image")
    made = [conv, conv, residual, residual, pad, max_pool, average_pool]
    for _ in range(5):
        x = rng.choice(made if plain else [*made[1:3], dilated, grouped, depthwise, separable, join, join])(x)
    x = layers.Flatten()(x) if x.shape[1] * x.shape[2] * x.shape[3] < 700 else layers.GlobalAveragePooling2D()(x)
    if rng.integers(2):
        x = layers.Dense(channels(), activation="relu")(x)
    return keras.Model(image, layers.Dense(channels(), name="logits")(x))


def randomize_batch_norm(model, rng):
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 1.5, value.shape) for value in layer.get_weights()])


def quantised_graph(model, images, ratio, folder):
    """The fixed-point model, its outputs, and the graph, which must have the same outputs, as TensorFlow does."""
    sparse = bstf.sparsify(model, ratio=ratio) if ratio else model
    fixed = bstf.quantize(sparse, images)
    bstf.export(fixed, folder)
    expected = fixed.predict(images, verbose=0)
    reloaded = tf.saved_model.load(str(folder)).signatures["serving_default"](tf.constant(images))
    assert np.array_equal(next(iter(reloaded.values())), expected)
    graph = bstf_compiler.load(folder)
    assert np.array_equal(integer.run(graph, images), expected)
    return fixed, expected, graph


def check_one_set_of_numbers(model, images, ratio, folder, device):
    """The whole road; returns the program."""
    fixed, expected, graph = quantised_graph(model, images, ratio, folder)
    program = bstf_compiler.compile(graph, device)
    assert np.array_equal(program.simulate(images), expected)
    check_layers(fixed, images, graph, program.trace(images))
    return program


def check_layers(fixed, images, graph, traced):
    """Compares every layer that Keras has a grid for."""
    grids = {
        layer.name.removesuffix("_grid"): layer.output
        for layer in fixed.layers
        if layer.name.endswith("_grid") and layer.name.removesuffix("_grid") in traced
    }
    assert grids
    keras_values = keras.Model(fixed.input, grids).predict(images, verbose=0)
    for name, value in keras_values.items():
        simulated = integer.dequantize(traced[name], graph.tensors[name].position)
        assert np.array_equal(simulated.reshape(value.shape), value), name


# An example takes seconds: a failing one is reported as found, without shrinking.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)


@settings(max_examples=12, deadline=None, phases=PHASES, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), ratio=st.floats(0, 0.9), mesh=st.integers(1, 8))
def test_one_set_of_numbers_on_random_networks(tmp_path_factory, seed, ratio, mesh):
    model = random_keras_network(seed)
    rng = np.random.default_rng(seed)
    randomize_batch_norm(model, rng)
    images = rng.normal(size=(2, *model.input_shape[1:])).astype(np.float32)
    check_one_set_of_numbers(model, images, ratio, tmp_path_factory.mktemp("road") / "saved", f"aie2_{mesh}x{mesh}")


@settings(max_examples=12, deadline=None, phases=PHASES, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), ratio=st.sampled_from([0, 0.5]), mesh=st.integers(1, 5))
def test_one_set_of_numbers_with_groups_dilation_and_concatenations(tmp_path_factory, seed, ratio, mesh):
    model = random_keras_network(seed, plain=False)
    rng = np.random.default_rng(seed)
    randomize_batch_norm(model, rng)
    images = rng.normal(size=(2, *model.input_shape[1:])).astype(np.float32)
    check_one_set_of_numbers(model, images, ratio, tmp_path_factory.mktemp("road") / "saved", f"aie2_{mesh}x{mesh}")
