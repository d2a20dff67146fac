"""Functions of one value, from TensorFlow's and Keras' operations to one operation of the graph."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import activations, layers

import bstf_compiler
from bstf_compiler import graph_file
from bstf_compiler.graph import Function, Graph, Multiply, Node, Product, Relu, Tensor
from bstf_compiler.passes import apply
from bstf_compiler.passes.functions import FormFunction


def load(folder, function, shape=(5, 7, 3)):
    """The graph of a function of an image, and its images and results."""
    module = tf.Module()
    module.serve = tf.function(function, [tf.TensorSpec((None, *shape))])
    tf.saved_model.save(module, str(folder), signatures=module.serve.get_concrete_function())
    x = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32) * 3
    return bstf_compiler.load(folder), x, function(tf.constant(x)).numpy()


@pytest.mark.parametrize(
    ("function", "operations"),
    [
        (tf.sigmoid, [Function("sigmoid")]),
        (tf.tanh, [Function("tanh")]),
        (tf.nn.elu, [Function("elu")]),
        (tf.nn.selu, [Function("selu")]),
        (tf.nn.softplus, [Function("softplus")]),
        (tf.exp, [Function("exp")]),
        (tf.math.erf, [Function("erf")]),
        (lambda x: tf.nn.leaky_relu(x, 0.25), [Function("leaky_relu", 0.25)]),
        (activations.silu, [Function("swish")]),
        (activations.gelu, [Function("gelu")]),
        (lambda x: activations.gelu(x, approximate=True), [Function("gelu_tanh")]),
        (activations.hard_sigmoid, [Function("hard_sigmoid")]),
        (activations.hard_silu, [Function("hard_swish")]),
        (lambda x: x * tf.nn.relu6(x + 3) * (1 / 6), [Function("hard_swish")]),
        (lambda x: x * (tf.nn.relu6(x + 3) * (1 / 6)), [Function("hard_swish")]),
        (lambda x: x * x, [Product()]),
        (lambda x: x**3, [Product(), Product()]),
        (lambda x: x * tf.reduce_mean(x, (1, 2), keepdims=True), None),
        (lambda x: tf.reduce_mean(x, (1, 2), keepdims=True) * x, None),
        (lambda x: x * tf.nn.relu6(x + 2) * (1 / 6), None),
        (lambda x: tf.nn.relu(x) * tf.sigmoid(x), None),
    ],
)
def test_functions_are_read_and_found(tmp_path, function, operations):
    graph, x, expected = load(tmp_path / "model", function)
    if operations is not None:
        assert [node.op for node in graph] == operations
    found = bstf_compiler.Engine(graph, threads=1)(x)
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def test_what_others_read_too_stays():
    graph = Graph("g", [], {"x": Tensor("x", (1, 4, 4, 2))}, {"x": (4, 4, 2)}, ["y", "s"], [(4, 4, 2)] * 2)
    graph.nodes = [Node("s", Function("sigmoid"), ["x"]), Node("y", Product(), ["x", "s"])]
    graph.tensors |= {name: Tensor(name, (1, 4, 4, 2)) for name in "sy"}
    assert apply(FormFunction(), graph) == 0
    graph.outputs, graph.output_shapes = ["y"], [(4, 4, 2)]
    assert apply(FormFunction(), graph) == 1
    assert [(node.op, node.inputs) for node in graph] == [(Function("swish"), ["x"])]
    assert set(graph.tensors) == {"x", "y"}


def test_numbers_of_their_own_for_channels_are_no_function_of_a_value():
    graph = Graph("g", [], {"x": Tensor("x", (1, 4, 4, 2))}, {"x": (4, 4, 2)}, ["y"], [(4, 4, 2)])
    graph.tensors |= {name: Tensor(name, (1, 4, 4, 2)) for name in "rsy"}
    graph.add_constant("c", np.array([1, 1], np.float32))
    graph.nodes = [
        Node("r", Multiply(), ["x", "c"]), Node("s", Function("sigmoid"), ["r"]), Node("y", Product(), ["x", "s"]),
    ]  # fmt: skip
    assert apply(FormFunction(), graph) == 0
    graph.nodes[1].op = Relu("relu6")
    assert apply(FormFunction(), graph) == 0


def test_a_product_of_other_shapes_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"Mul of \(5, 7, 3\) and \(5, 7, 1\) is not supported"):
        load(tmp_path / "model", lambda x: x * tf.nn.conv2d(x, tf.ones((1, 1, 3, 1)), 1, "SAME"))


def test_powers_other_than_small_ones_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="a power other than 2 and 3 is not supported"):
        load(tmp_path / "model", lambda x: x**2.5)


def test_a_network_with_squeeze_and_excitation_runs(tmp_path):
    keras.utils.set_random_seed(0)
    image = keras.Input((17, 13, 3))
    x = layers.Conv2D(20, 3, 2, "same", activation="swish")(image)
    squeezed = layers.GlobalAveragePooling2D(keepdims=True)(x)
    squeezed = layers.Conv2D(20, 1, activation="sigmoid")(layers.Conv2D(5, 1, activation="swish")(squeezed))
    x = layers.Multiply()([x, squeezed])
    x = layers.DepthwiseConv2D(3, padding="same", activation="hard_silu")(x)
    x = layers.LeakyReLU(0.1)(layers.BatchNormalization()(x))
    vector = layers.Dense(12, activation="gelu")(layers.Flatten()(x))
    model = keras.Model(image, layers.Dense(4, activation="tanh")(layers.Dense(9, activation="elu")(vector)))
    model.export(tmp_path / "model", verbose=False)
    x = np.random.default_rng(0).normal(size=(11, 17, 13, 3)).astype(np.float32)
    expected = model.predict(x, verbose=0)
    engine = bstf_compiler.Engine(tmp_path / "model", threads=2)
    found = engine(x)
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()
    engine.save(tmp_path / "engine.npz")
    again = bstf_compiler.Engine(tmp_path / "engine.npz")
    assert [node.op for node in again.graph] == [node.op for node in engine.graph]
    assert np.array_equal(again(x), found)


def test_a_file_with_an_unknown_function_is_refused(tmp_path):
    graph = Graph("g", [], {"x": Tensor("x", (1, 4, 4, 2))}, {"x": (4, 4, 2)}, ["y"], [(4, 4, 2)])
    graph.nodes, graph.tensors["y"] = [Node("y", Function("sine"), ["x"])], Tensor("y", (1, 4, 4, 2))
    with pytest.raises(ValueError, match="layer 'y': the CPU engine has no function like this"):
        bstf_compiler.Engine(graph)
    graph_file.write(graph, tmp_path / "engine.npz")
    with pytest.raises(ValueError, match="damaged or no saved engine"):
        bstf_compiler.Engine(tmp_path / "engine.npz")
