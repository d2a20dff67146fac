"""Float networks of many kinds of layers: what they are lowered to, and that it computes what Keras does."""

from collections import Counter

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.applications.densenet import DenseNet
from keras.src.applications.efficientnet import DEFAULT_BLOCKS_ARGS, EfficientNet

import bstf
import bstf_compiler
from bstf_compiler.graph import Add, Average, BiasAdd, Concat, Conv, Graph, MaxPool, Multiply, Node, Relu, Softmax

layers, applications = keras.layers, keras.applications

ACTIVATIONS = {"linear": tf.identity, "relu": tf.nn.relu, "relu6": tf.nn.relu6}


def pixels(padding):
    top, bottom, left, right = padding
    return [[0, 0], [top, bottom], [left, right], [0, 0]]


def node_of_tensorflow(graph: Graph, node: Node, x: list[tf.Tensor]) -> tf.Tensor:
    """What a node of a float graph computes, by TensorFlow's operations."""
    op = node.op
    if isinstance(op, Conv):
        assert op.groups * x[1].shape[2] == x[0].shape[-1]
        down, across = op.window.strides
        # With strides larger than a small kernel TensorFlow's sums differ at every call.
        every = tf.nn.conv2d(x[0], x[1], 1, pixels(op.window.padding), dilations=op.window.dilation)
        return ACTIVATIONS[op.activation](every[:, ::down, ::across] + (x[2] if len(x) == 3 else 0.0))
    if isinstance(op, Add):
        return ACTIVATIONS[op.activation](x[0] + x[1])
    if isinstance(op, Relu):
        return ACTIVATIONS[op.activation](x[0])
    if isinstance(op, (BiasAdd, Multiply)):
        return x[0] + x[1] if isinstance(op, BiasAdd) else x[0] * x[1]
    if isinstance(op, Concat):
        return tf.concat(x, -1)
    if isinstance(op, Softmax):
        return tf.nn.softmax(x[0])
    padding = pixels(op.window.padding)
    if isinstance(op, MaxPool):
        padded = tf.pad(x[0], padding, constant_values=0.0 if op.zero_padding else -np.inf)
        return tf.nn.max_pool2d(padded, op.window.kernel, op.window.strides, "VALID")
    assert isinstance(op, Average)
    sums, counts = (
        tf.nn.avg_pool2d(tf.pad(one, padding), op.window.kernel, op.window.strides, "VALID")
        for one in (x[0], tf.ones_like(x[0]))
    )
    return sums / counts


def run(graph: Graph, x: np.ndarray) -> np.ndarray:
    values = {name: tensor.data for name, tensor in graph.tensors.items() if tensor.is_constant}
    (name,) = graph.inputs
    values[name] = tf.reshape(x, (-1, *graph.tensors[name].shape[1:]))
    for node in graph:
        value = node_of_tensorflow(graph, node, [values[name] for name in node.inputs])
        assert value.shape[1:] == graph.tensors[node.output].shape[1:], node.name
        values[node.output] = value
    return values[graph.outputs[0]].numpy().reshape(-1, *graph.output_shapes[0])


def lowered(model: keras.Model, folder) -> Counter:
    """Exports and loads; the graph must compute what the model does. Returns how often it has which operation."""
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 1.5, value.shape) for value in layer.get_weights()])
    bstf.export(model, folder / "model")
    graph = bstf_compiler.load(folder / "model")
    x = rng.normal(size=(2, *model.input_shape[1:])).astype(np.float32)
    expected = model(x, training=False).numpy()
    assert np.ptp(expected) > 1e-6
    np.testing.assert_allclose(run(graph, x), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    return Counter("depthwise" if getattr(node.op, "groups", 1) > 1 else node.op.kind for node in graph)


def efficientnet_lite():
    """EfficientNet-B0 without squeeze and excitation, its activation relu6; rescaled and normalised images."""
    blocks = [{**block, "se_ratio": 0} for block in DEFAULT_BLOCKS_ARGS]
    return EfficientNet(
        1.0, 1.0, 64, activation="relu6", blocks_args=blocks, name="lite", weights=None, weights_name="",
        input_shape=(64, 64, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (lambda: applications.MobileNetV2((64, 64, 3), alpha=0.35, weights=None),
         {"conv": 36, "depthwise": 17, "add": 10, "average": 1, "softmax": 1}),
        (efficientnet_lite,
         {"multiply": 1, "biasadd": 1, "conv": 34, "depthwise": 16, "add": 9, "average": 1, "softmax": 1}),
        (lambda: applications.InceptionV3(weights=None, input_shape=(75, 75, 3)),
         {"conv": 95, "maxpool": 4, "average": 10, "concat": 11, "softmax": 1}),
        (lambda: applications.Xception(weights=None, input_shape=(71, 71, 3)),
         {"conv": 41, "depthwise": 34, "maxpool": 4, "add": 12, "relu": 11, "average": 1, "softmax": 1}),
        # The norm before a dense layer's first convolution, of a concatenation, has no layer to go into.
        (lambda: DenseNet([1, 2, 1, 1], weights=None, input_shape=(32, 32, 3), name="dense"),
         {"conv": 15, "multiply": 9, "biasadd": 9, "relu": 9, "concat": 5, "maxpool": 1, "average": 4, "softmax": 1}),
    ],
    ids=["MobileNetV2", "EfficientNet-Lite0", "InceptionV3", "Xception", "DenseNet"],
)  # fmt: skip
def test_networks_lower_to_what_they_are_made_of(network, expected, tmp_path):
    assert lowered(network(), tmp_path) == expected


def norm():
    return layers.BatchNormalization(), layers.ReLU(max_value=6.0)


def joined(x):
    parts = [layers.Conv2D(3, 3, padding="same")(x), layers.MaxPooling2D(3, 1, "same")(x), x]
    return layers.Concatenate()([layers.Concatenate()(parts[:2]), parts[2]])


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda: [layers.Conv2D(6, 3, dilation_rate=(1, 3), padding="same"), *norm()], "conv"),
        (lambda: [layers.Conv2D(6, (3, 2), dilation_rate=2), *norm()], "conv"),
        (lambda: [layers.Conv2D(6, 3, groups=2, strides=2), *norm()], "depthwise"),
        (lambda: [layers.Conv2D(6, 3, groups=2, dilation_rate=3, padding="same"), *norm()], "depthwise"),
        (lambda: [layers.DepthwiseConv2D(3, strides=2, depth_multiplier=2), *norm()], "depthwise"),
        (lambda: [layers.DepthwiseConv2D((2, 3), dilation_rate=(3, 2), padding="same"), *norm()], "depthwise"),
        (lambda: [layers.DepthwiseConv2D(3, depthwise_initializer="ones", use_bias=False), *norm()], "depthwise"),
        (lambda: [layers.ZeroPadding2D(((0, 1), (2, 1))), layers.DepthwiseConv2D(3, 2)], "depthwise"),
        (lambda: [layers.SeparableConv2D(7, 3, padding="same", dilation_rate=2), *norm()], "depthwise conv"),
        (lambda: [layers.Rescaling(1 / 127.5, -1), layers.Conv2D(3, 3)], "multiply biasadd conv"),
        (lambda: [layers.Normalization(mean=[1, 2, 3, 4.0], variance=[1, 2, 3, 4.0])], "multiply biasadd"),
        (lambda: [layers.AveragePooling2D(3, 2, "same"), layers.Dropout(0.5)], "average"),
        (lambda: [layers.GlobalAveragePooling2D(keepdims=True), layers.Conv2D(3, 1), layers.Flatten()], "average conv"),
        (lambda: [joined, *norm(), layers.Conv2D(5, 1)], "conv maxpool concat multiply biasadd relu conv"),
    ],
)
def test_layers_lower_to_what_computes_the_same(made, expected, tmp_path):
    x = image = keras.Input((9, 11, 4))
    for layer in made():
        x = layer(x)
    assert lowered(keras.Model(image, x), tmp_path) == Counter(expected.split())
