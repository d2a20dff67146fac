"""Networks of every supported layer: quantised Keras model, its SavedModel, the integer graph and the simulated program
agree bit for bit.
"""

from collections import Counter

import keras
import numpy as np
import pytest
import tensorflow as tf

import bstf
import bstf_compiler
from bstf_compiler import integer

layers = keras.layers


def conv(filters=8, size=3, **options):
    return layers.Conv2D(filters, size, padding="same", **options)


def gate(x, activation="sigmoid"):
    """Squeeze and excitation."""
    pooled = layers.GlobalAveragePooling2D(keepdims=True)(x)
    return layers.Multiply()([layers.Conv2D(x.shape[-1], 1, activation=activation)(pooled), x])


def hard_swish_by_hand(x):
    return layers.Multiply()([x, layers.ReLU(6.0)(x + 3.0) * (1.0 / 6.0)])


def u_net(up):
    def network(x):
        outer = conv(8, activation="relu")(x)
        inner = conv(16, strides=2, activation="relu")(outer)
        deep = conv(16, strides=2, activation="relu")(inner)
        x = conv(12, activation="relu")(layers.Concatenate()([up(16)(deep), inner]))
        x = conv(8, activation="relu")(layers.Concatenate()([up(8)(x), outer]))
        return layers.Conv2D(2, 1, activation="sigmoid")(x)

    return network


def of_one_value(function):
    return lambda x: conv()(function(conv()(x)))


def preprocessed(x):
    """Red, green and blue to blue, green and red, less their means, as keras.applications does for ResNet50."""
    return keras.applications.resnet50.preprocess_input(layers.Rescaling(50.0, 100.0)(x)[..., :3])


IMAGE = np.random.default_rng(2).uniform(0.5, 1.5, (12, 8, 5)).astype(np.float32)
TRANSPOSED = (2, 2, "valid"), (4, 2, "same"), (3, 1, "same"), (2, 3, "same"), ((5, 2), (2, 1), "valid"), (5, 3, "same")
ACTIVATIONS = "swish", "hard_swish", "sigmoid", "hard_sigmoid", "tanh", "elu", "gelu", "leaky_relu", "softplus"
NETWORKS = {
    "u-net, transposed": (u_net(lambda n: layers.Conv2DTranspose(n, 3, strides=2, padding="same")), "lookup"),
    "u-net, nearest": (u_net(lambda n: layers.UpSampling2D(2)), "resize concat lookup"),
    "u-net, bilinear": (u_net(lambda n: layers.UpSampling2D(2, interpolation="bilinear")), "resize concat lookup"),
    "up-sampling 4x2": (of_one_value(layers.UpSampling2D((4, 2), interpolation="bilinear")), "resize"),
    "squeeze and excitation": (lambda x: gate(conv()(x)), "averagepool lookup product"),
    "hard squeeze": (lambda x: gate(conv()(x), "hard_sigmoid"), "lookup product"),
    "hard swish by hand": (of_one_value(hard_swish_by_hand), "conv lookup"),
    "preprocessing": (
        lambda x: conv()(
            layers.Normalization(mean=[0.1] * 5, variance=np.arange(1.0, 6))(layers.Rescaling(0.5, -1)(x))
        ),
        "affine conv",
    ),
    "mean image": (lambda x: conv()(layers.Rescaling(2.0)(x) - IMAGE), "affine conv"),
    "image and channels": (lambda x: conv()((layers.Rescaling(1.0, np.ones(5))(x) * IMAGE[:, :1]) * 0.5), "affine"),
    "norm of values": (
        lambda x: layers.Dense(3)(
            layers.Flatten()(
                layers.Normalization(None, 0.1, 2.0)(layers.Normalization((1, 2, 3), IMAGE, np.square(IMAGE))(x))
            )
        ),
        "affine conv",
    ),
    "reversed channels": (lambda x: conv()(preprocessed(x)), "affine conv"),
    "channels": (lambda x: layers.ReLU()(conv()(x)[..., 6:0:-2]), "conv"),
    "pixels": (lambda x: conv(8, 1)(conv()(x)[:, 1:-3, 2:]), "depthtospace"),
    "channels first": (
        lambda x: layers.Dense(3)(layers.Flatten()(layers.Permute((3, 1, 2))(conv(4, 3, strides=2)(x)))),
        "conv",
    ),
    "down-sampling": (of_one_value(layers.MaxPooling2D(1, 2)), "conv"),
    "norm of a sum": (lambda x: layers.ReLU()(layers.BatchNormalization()(layers.Add()([x, x]))), "add conv"),
    "norm of a vector": (
        lambda x: layers.BatchNormalization()(layers.Dense(6, "relu")(layers.Flatten()(x))),
        "conv",
    ),
    "norm before a convolution": (
        lambda x: layers.Conv2D(8, 3)(layers.BatchNormalization()(layers.MaxPooling2D()(x))),
        "maxpool conv",
    ),
    "crop": (of_one_value(layers.Cropping2D(((1, 2), (0, 1)))), "depthtospace"),
    "difference": (lambda x: conv()(layers.Subtract()([conv(5)(x), x])), "add"),
    "sum with one pixel": (
        lambda x: layers.ReLU()(layers.Add()([layers.GlobalAveragePooling2D(keepdims=True)(x), x])),
        "add",
    ),
    "constants": (lambda x: conv()((1.0 - conv()(x) * 0.5) / 3.0 + np.linspace(0, 1, 8)), "conv"),
    "large average": (lambda x: layers.GlobalAveragePooling2D()(layers.UpSampling2D((4, 8))(x)), "averagepool"),
    "transposed": (
        lambda x: [
            layers.Conv2DTranspose(7, *options, activation="relu")(y) for y in [conv()(x)] for options in TRANSPOSED
        ],
        "conv",
    ),
    "activations": (
        lambda x: [conv()(layers.Activation(name)(y)) for y in [conv()(x)] for name in ACTIVATIONS],
        "lookup",
    ),
}


def arrays(found):
    """Of all outputs, of one or several."""
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize("name", NETWORKS)
def test_one_set_of_numbers(name, tmp_path):
    network, kinds = NETWORKS[name]
    rng = np.random.default_rng(1)
    image = keras.Input((12, 8, 5))
    model = keras.Model(image, network(image))
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 1.5, value.shape) for value in layer.get_weights()])
    x = rng.normal(size=(4, 12, 8, 5)).astype(np.float32)
    quantised = bstf.quantize(model, x)
    expected = arrays(quantised.predict(x, verbose=0))
    bstf.export(quantised, tmp_path / "model")
    served = tf.saved_model.load(tmp_path / "model").signatures["serving_default"](tf.constant(x))
    graph = bstf_compiler.load(tmp_path / "model")
    program = bstf_compiler.compile(graph, "aie2_2x2")
    for found in (
        [value for _, value in sorted(served.items())],
        arrays(integer.run(graph, x)),
        arrays(bstf_compiler.Engine(graph)(x)),
    ):
        assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    simulated = arrays(program.simulate(x[:1]))
    assert all(np.array_equal(one, other[:1]) for one, other in zip(simulated, expected, strict=True))
    counts = Counter(node.op.kind for node in graph)
    assert all(counts[kind] for kind in kinds.split()), counts
    floats = arrays(model.predict(x, verbose=0))
    model.export(tmp_path / "float", verbose=False)
    found = arrays(bstf_compiler.Engine(tmp_path / "float")(x))
    for one, exact, fixed in zip(found, floats, expected, strict=True):
        assert np.abs(one - exact).max() <= 1e-5 * np.abs(exact).max()
        noise = np.square(exact - fixed).mean() / np.square(exact).mean()
        assert noise < 10 ** (-18 / 10), f"{-10 * np.log10(noise):.1f} dB"


def two_inputs(photo, depth):
    """Images of different sizes and channels, one rescaled, the other read twice."""
    first = layers.MaxPooling2D()(conv(activation="relu")(layers.Rescaling(1 / 127.5, -1)(photo)))
    second = layers.Add()([conv(5)(depth), depth])
    joined = layers.Concatenate()([first, second])
    gated = layers.Multiply()([conv(8)(joined), layers.GlobalAveragePooling2D(keepdims=True)(first)])
    return layers.Dense(4)(layers.Flatten()(layers.Add()([gated, conv(8, 1)(second)])))


@pytest.mark.parametrize(
    "way, unused", [("list", False), ("list", True), ("dictionary", True), ("batches", True), ("labelled", False)]
)
def test_several_inputs(way, unused, tmp_path):
    rng = np.random.default_rng(1)
    photo, depth = keras.Input((12, 8, 3), name="photo"), keras.Input((6, 4, 5), name="depth")
    inputs = [photo, depth, *([keras.Input((7,), name="age")] if unused else ())]
    as_dictionary = way == "dictionary"
    model = keras.Model({one.name: one for one in inputs} if as_dictionary else inputs, two_inputs(photo, depth))
    x = {"photo": rng.uniform(0, 255, (4, 12, 8, 3)), "depth": rng.normal(size=(4, 6, 4, 5))}
    x = {name: images.astype(np.float32) for name, images in (x | ({"age": np.ones((4, 7))} if unused else {})).items()}
    given = x if as_dictionary else list(x.values())
    labels = np.zeros(4)
    calibration = {
        "list": given,
        "dictionary": given,
        "batches": [[images[:3] for images in x.values()], [images[3:] for images in x.values()]],
        "labelled": tf.data.Dataset.from_tensor_slices((tuple(x.values()), labels)).batch(2),
    }[way]
    quantised = bstf.quantize(model, calibration)
    assert [tensor.name for tensor in quantised.inputs] == [tensor.name for tensor in model.inputs]
    expected = quantised.predict(given, verbose=0)
    bstf.export(quantised, tmp_path / "model")
    served = tf.saved_model.load(tmp_path / "model").signatures["serving_default"](**x)
    assert np.array_equal(next(iter(served.values())), expected)
    graph = bstf_compiler.load(tmp_path / "model")
    assert list(graph.inputs) == sorted(x)
    assert np.array_equal(integer.run(graph, x), expected)
    program = bstf_compiler.compile(graph, "aie2_2x2")
    assert np.array_equal(program.simulate({name: images[:1] for name, images in x.items()}), expected[:1])
    program.write(tmp_path / "program")
    again = bstf_compiler.Program.load(tmp_path / "program")
    assert again.inputs == program.inputs and again.affines == program.affines
    engine = bstf_compiler.Engine(graph)
    assert np.array_equal(engine([x[name] for name in sorted(x)]), expected)
    engine.save(tmp_path / "engine")
    assert np.array_equal(bstf_compiler.Engine(tmp_path / "engine")(x), expected)
    bstf_compiler.draw(graph, tmp_path / "graph.svg")
    floats = model.predict(given, verbose=0)
    assert np.square(floats - expected).mean() < np.square(floats).mean() * 10 ** (-18 / 10)


def test_sparsify_keeps_several_inputs():
    photo, depth = keras.Input((12, 8, 3), name="photo"), keras.Input((6, 4, 5), name="depth")
    sparse = bstf.sparsify(keras.Model([photo, depth], two_inputs(photo, depth)))
    assert [tensor.name for tensor in sparse.inputs] == ["photo", "depth"]
    with pytest.raises(TypeError, match="images of the inputs 'photo', 'depth': a tuple of arrays in this order"):
        bstf.quantize(sparse, np.zeros((4, 12, 8, 3), np.float32))
    with pytest.raises(ValueError, match="all inputs need equally many"):
        bstf.quantize(sparse, [np.zeros((4, 12, 8, 3), np.float32), np.zeros((3, 6, 4, 5), np.float32)])


def test_a_function_without_a_value_somewhere_is_refused():
    image = keras.Input((4, 4, 3))
    model = keras.Model(image, keras.ops.sqrt(layers.Conv2D(3, 1, name="c")(image)))
    with pytest.raises(ValueError, match=r"has no value at -\d.*end the model before it|NaN or infinite"):
        bstf.quantize(model, np.random.default_rng(0).normal(size=(4, 4, 4, 3)).astype(np.float32))
