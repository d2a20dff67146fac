"""Names of an exported model's layers are those of the loaded graph, so bstf.json is checked against every layer."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import bstf
import bstf_compiler

layers = keras.layers


def nested_and_shared():
    """Layers of default names, models in models, a layer and a model that are called twice."""
    keras.utils.clear_session()
    image = keras.Input((8, 8, 8))
    innermost = keras.Sequential([keras.Input((8, 8, 8)), layers.Conv2D(8, 1)])
    inner = keras.Sequential([keras.Input((8, 8, 8)), layers.Conv2D(8, 3, padding="same"), innermost])
    twice = layers.Conv2D(8, 3, padding="same")
    x = inner(layers.Conv2D(8, 3, padding="same")(image))
    x = inner(twice(layers.ReLU()(twice(x))))
    return keras.Model(image, layers.Dense(3)(layers.Flatten()(x)))


@pytest.mark.parametrize("fixed", [False, True])
def test_every_layer_of_bstf_json_is_checked(fixed, tmp_path):
    model = nested_and_shared()
    if fixed:
        model = bstf.quantize(model, np.random.default_rng(0).normal(size=(4, 8, 8, 8)).astype(np.float32))
    bstf.export(model, tmp_path)
    path = tmp_path / "assets.extra" / "bstf.json"
    text = path.read_text(encoding="utf-8")
    bstf_compiler.load(tmp_path)
    recorded = json.loads(text)
    assert len(recorded["layers"]) == (8 if fixed else 5)
    for name in recorded["layers"]:
        changed = json.loads(text)
        changed["layers"][name]["gamma"] = ["0" * len(row) for row in changed["layers"][name]["gamma"]]
        path.write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(ValueError, match=f"layer '{name}'.*other zero blocks"):
            bstf_compiler.load(tmp_path)
    for name in recorded["positions"]:
        path.write_text(json.dumps(recorded | {"positions": {name: 99}}), encoding="utf-8")
        with pytest.raises(ValueError, match=f"layer '{name}:grid'.*position 99"):
            bstf_compiler.load(tmp_path)


class Twice(layers.Layer):
    """Two convolutions in scopes of the layer's own; TensorFlow numbers the second."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(1, 1, shape[-1], shape[-1]), name="kernel")

    def call(self, x):
        for _ in range(2):
            with tf.name_scope("part"):
                x = tf.nn.conv2d(x, self.kernel, 1, "SAME")
        return x


def test_numbers_that_are_names_stay(tmp_path):
    image = x = keras.Input((4, 4, 3))
    names = ["c_1", "c", "c_1_1", "C", "c_2_7"]
    for name in names:
        x = layers.Conv2D(3, 1, name=name)(x)
    inner = keras.Sequential([keras.Input((4, 4, 3)), layers.Conv2D(3, 1, name="c_1")], name="inner_3")
    y = keras.ops.sigmoid(inner(Twice(name="twice_1")(x)))
    model = keras.Model(image, y, name="net_1")
    bstf.export(model, tmp_path)
    graph = bstf_compiler.load(tmp_path)
    assert [node.name for node in graph] == [*names, "twice_1", "twice_1:conv2d", "inner_3/c_1", "Sigmoid"]


def test_a_network_without_weights_has_the_names_of_its_layers(tmp_path):
    image = keras.Input((8, 8, 3))
    model = keras.Sequential([image, layers.MaxPooling2D(), layers.MaxPooling2D()], name="input")
    quantised = bstf.quantize(model, np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32))
    bstf.export(quantised, tmp_path)
    assert [node.name for node in bstf_compiler.load(tmp_path)] == [layer.name for layer in model.layers]


class Convolutions(tf.Module):
    """What Keras 2 exports: a layer's name is the name of its scope, and that of its variable's."""

    def __init__(self, variables):
        super().__init__()
        self.kernels = [tf.Variable(np.ones((1, 1, 3, 3), np.float32), name=name) for name in variables]

    @tf.function(input_signature=[tf.TensorSpec((None, 4, 4, 3), tf.float32, name="image")])
    def serve(self, x):
        for number, kernel in enumerate(self.kernels, start=3):
            with tf.name_scope(f"model_1/conv2d_{number}"):
                x = tf.nn.conv2d(x, kernel, 1, "SAME")
        return {"y": x}


@pytest.mark.parametrize("variables", [["conv2d_3/kernel", "conv2d_4/kernel"], ["kernel", "kernel"]])
def test_other_exports_keep_their_names(variables, tmp_path):
    module = Convolutions(variables)
    tf.saved_model.save(module, tmp_path, signatures=module.serve)
    assert [node.name for node in bstf_compiler.load(tmp_path)] == ["conv2d_3", "conv2d_4"]
