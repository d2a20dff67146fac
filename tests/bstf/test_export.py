import json
from collections import Counter
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from bstf.blocks import nonzero_blocks
from bstf.conversion import densify
from bstf.export import export
from bstf.layers import MaskedConv2D, MaskedDense
from bstf.quantization import quantize
from bstf.quantization.fixed_point import FixedPoint


def build(**options):
    keras.utils.set_random_seed(3)
    entry = keras.Input((9, 9, 3), name="image", **options)
    x = layers.Conv2D(16, 3, name="stem")(entry)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU(name="relu")(x)
    y = MaskedConv2D(16, 3, padding="same", activation="relu6", block=(8, 4), name="conv")(x)
    x = layers.Add(name="add")([x, y])
    x = layers.AveragePooling2D(3, 2, "same", name="average")(layers.MaxPooling2D(2, name="max")(x))
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    x = MaskedDense(12, activation="softmax", name="logits")(x)
    model = keras.Model(entry, x, name="net")
    rng = np.random.default_rng(3)
    model.get_layer("norm").set_weights([rng.uniform(0.5, 1.5, 16) for _ in range(4)])
    model.get_layer("conv").set_gamma(rng.integers(0, 2, (2, 4)))
    model.get_layer("logits").set_gamma(np.array([[1, 0], [0, 1]]))
    return model


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(5, 9, 9, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def exported(images, tmp_path_factory):
    """The float and the fixed-point model and their folders."""
    folder = tmp_path_factory.mktemp("exported")
    model = build()
    quantised = quantize(model, images)
    export(model, folder / "float")
    export(quantised, folder / "fixed")
    return model, quantised, folder


def serve(path, x):
    (result,) = tf.saved_model.load(path).signatures["serving_default"](image=x).values()
    return result.numpy()


def graph(path):
    loaded = tf.saved_model.load(path)
    return convert_variables_to_constants_v2(loaded.signatures["serving_default"]).graph.as_graph_def()


def description(path):
    return json.loads((path / "assets.extra" / "bstf.json").read_text(encoding="utf-8"))


def test_float_outputs(exported, images):
    model, _, folder = exported
    np.testing.assert_allclose(serve(folder / "float", images), model(images), atol=1e-6)


def test_every_weight_is_written_once(exported):
    model, _, folder = exported
    written = dict(tf.train.list_variables(str(folder / "float/variables/variables")))
    assert written.pop("_CHECKPOINTABLE_OBJECT_GRAPH") == []
    assert sorted(written.values()) == sorted(list(weight.shape) for weight in densify(model).get_weights())


def test_keras_serves_it(exported, images):
    model, _, folder = exported
    layer = keras.layers.TFSMLayer(folder / "float", call_endpoint="serve")
    np.testing.assert_allclose(layer(images), model(images), atol=1e-6)
    assert len(layer.weights) == len(densify(model).weights)


def test_fixed_point_outputs_are_equal_for_any_batch(exported, images):
    _, quantised, folder = exported
    for batch in (images, images[:1], 4 * images[:2]):
        assert np.array_equal(serve(folder / "fixed", batch), quantised(batch))


def test_operations_of_the_fixed_point_graph(exported):
    folder = exported[2]
    kinds = Counter(node.op for node in graph(folder / "fixed").node)
    for kind in ("Placeholder", "Const", "Identity", "NoOp"):
        kinds.pop(kind)
    assert kinds == {
        "FakeQuantWithMinMaxArgs": 13,  # 7 tensors, 3 kernels, 3 biases
        "Conv2D": 2,
        "MatMul": 1,
        "AddV2": 4,
        "Relu": 1,
        "Relu6": 1,
        "MaxPool": 1,
        "DepthwiseConv2dNative": 1,
        "Sum": 1,
        "Mul": 2,
        "Softmax": 1,
    }


def test_carriers_are_symmetric_powers_of_two(exported):
    folder = exported[2]
    positions = []
    for node in graph(folder / "fixed").node:
        if node.op == "FakeQuantWithMinMaxArgs":
            low, high = node.attr["min"].f, node.attr["max"].f
            position = 7 - np.log2(-low)
            assert position == int(position)
            assert high == 127 * 2.0**-position
            assert (node.attr["num_bits"].i, node.attr["narrow_range"].b) == (8, False)
            positions.append(int(position))
    named = description(folder / "fixed")
    expected = list(named["positions"].values())
    for layer in named["layers"].values():
        expected += [layer["kernel_position"], layer["bias_position"]]
    assert sorted(positions) == sorted(expected)


def test_no_gamma_in_the_float_graph(exported):
    constants = [node for node in graph(exported[2] / "float").node if node.op == "Const"]
    kernels = [tf.make_ndarray(node.attr["value"].tensor) for node in constants]
    conv = next(kernel for kernel in kernels if kernel.shape == (3, 3, 16, 16))
    gamma = np.asarray(exported[0].get_layer("conv").gamma)
    assert np.array_equal(nonzero_blocks(conv, exported[0].get_layer("conv").block), gamma == 1)
    assert not any(kernel.shape == gamma.shape for kernel in kernels)


def test_description_of_the_float_model(exported):
    model, _, folder = exported
    got = description(folder / "float")
    assert (got["format"], got["version"], got["fixed_point"]) == ("bstf", 1, False)
    assert got["positions"] == got["input_positions"] == {}
    assert "rounding" not in got
    gamma = np.asarray(model.get_layer("conv").gamma).astype(int)
    assert got["layers"] == {
        "stem": {"kind": "conv2d", "block": [8, 8], "kernel_shape": [3, 3, 3, 16], "gamma": ["11"]},
        "conv": {
            "kind": "conv2d",
            "block": [8, 4],
            "kernel_shape": [3, 3, 16, 16],
            "gamma": ["".join(map(str, row)) for row in gamma],
        },
        "logits": {"kind": "dense", "block": [8, 8], "kernel_shape": [16, 12], "gamma": ["10", "01"]},
    }


def test_description_of_the_fixed_point_model(exported):
    _, quantised, folder = exported
    got = description(folder / "fixed")
    assert got["fixed_point"] is True
    assert got["rounding"] == {"activations": "half_up", "weights": "half_even", "biases": "half_even"}
    assert got["positions"] == {
        layer.name: layer.position for layer in quantised.layers if isinstance(layer, FixedPoint)
    }
    assert got["input_positions"] == {"image": got["positions"]["image_grid"]}
    for name in ("stem", "conv", "logits"):
        layer, entry = quantised.get_layer(name), got["layers"][name]
        assert entry["kernel_position"] == layer.kernel_position
        assert entry["bias_position"] == layer.bias_position
        assert entry["block"] == list(layer.block)
        gamma = nonzero_blocks(np.asarray(layer.kernel), layer.block).astype(int)
        assert entry["gamma"] == ["".join(map(str, row)) for row in gamma]


def test_weights_and_activations_round_as_the_description_says(tmp_path):
    model = keras.Sequential([keras.Input((2,), name="x"), layers.Dense(2, use_bias=False, name="d")])
    model.get_layer("d").kernel.assign([[127 / 128, 0.5 / 128], [1.5 / 128, -2.5 / 128]])
    images = np.array([[127 / 128, -1.0]], np.float32)
    quantised = quantize(model, images, compensate=False, correct_bias=False)
    assert np.array_equal(quantised.get_layer("d").kernel, np.array([[127, 0], [2, -2]]) / 128)  # ties to even
    export(quantised, tmp_path / "model")
    ties = np.array([[0.5, -0.5], [1.5, -1.5]], np.float32) / 128
    assert np.array_equal(quantised.get_layer("x_grid")(ties), np.array([[1, 0], [2, -1]]) / 128)  # ties up
    x = np.concatenate([ties, ties + np.float32(1 / 128)])
    (served,) = tf.saved_model.load(tmp_path / "model").signatures["serving_default"](x=x).values()
    assert np.array_equal(served, quantised(x))


def test_models_built_for_one_batch_size_take_any(images, tmp_path):
    model = build(batch_size=2)
    export(model, tmp_path / "model")
    assert serve(tmp_path / "model", images).shape == (5, 12)


def test_sequential_and_nested_models(images, tmp_path):
    inner = keras.Sequential([keras.Input((9, 9, 3)), MaskedConv2D(8, 3, block=4, name="conv")], name="inner")
    model = keras.Sequential([keras.Input((9, 9, 3), name="image"), inner, layers.Flatten(), layers.Dense(3, name="d")])
    export(model, tmp_path / "float")
    np.testing.assert_allclose(serve(tmp_path / "float", images), model(images), rtol=1e-4, atol=1e-5)
    assert description(tmp_path / "float")["layers"].keys() == {"inner/conv", "d"}
    quantised = quantize(model, images)
    export(quantised, tmp_path / "fixed")
    assert np.array_equal(serve(tmp_path / "fixed", images), quantised(images))
    assert description(tmp_path / "fixed")["layers"]["conv"]["block"] == [4, 4]


def test_grouped_kernels_have_no_blocks(tmp_path):
    model = keras.Sequential([keras.Input((4, 4, 4), name="image"), layers.Conv2D(4, 3, groups=2, name="grouped")])
    export(model, tmp_path / "model")
    assert description(tmp_path / "model")["layers"] == {}


def test_the_original_stays_untouched(images, tmp_path):
    model = build()
    before = [np.array(w) for w in model.get_weights()]
    config = model.get_config()
    export(model, tmp_path / "model")
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights()))
    assert model.get_config() == config


def test_replaces_a_saved_model_and_nothing_else_stays(exported, images, tmp_path):
    model, quantised, _ = exported
    path = tmp_path / "deep" / "er" / "model"
    export(model, str(path))
    (path / "assets.extra" / "old").write_text("old")
    export(quantised, path)
    assert np.array_equal(serve(path, images), quantised(images))
    assert not (path / "assets.extra" / "old").exists()
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]


def test_writes_into_an_empty_folder(exported, tmp_path):
    (tmp_path / "empty").mkdir()
    export(exported[1], tmp_path / "empty")
    assert (tmp_path / "empty" / "saved_model.pb").is_file()


def test_folders_of_users_are_never_replaced(exported, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "me.jpg").write_text("me")
    with pytest.raises(FileExistsError, match=r"photos exists and isn't a SavedModel; give another path"):
        export(exported[0], folder)
    (folder / "saved_model.pb").write_text("")
    with pytest.raises(FileExistsError, match=r"photos holds 'me.jpg', which.*would be lost"):
        export(exported[0], folder)
    with pytest.raises(FileExistsError, match=r"me.jpg exists and isn't a folder"):
        export(exported[0], folder / "me.jpg")
    with pytest.raises(FileExistsError, match=r"me.jpg isn't a folder"):
        export(exported[0], folder / "me.jpg" / "model")
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(FileExistsError, match=r"link exists and isn't a folder"):
        export(exported[0], tmp_path / "link")
    assert (folder / "me.jpg").read_text() == "me"


@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_what_was_there(exported, images, tmp_path, monkeypatch, there):
    model, quantised, _ = exported
    path = tmp_path / "model"
    if there:
        export(quantised, path)

    def fail(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", fail)  # after the SavedModel, before its description
    with pytest.raises(KeyboardInterrupt):
        export(model, path)
    assert [entry.name for entry in tmp_path.iterdir()] == (["model"] if there else [])
    if there:
        assert np.array_equal(serve(path, images), quantised(images))


class Subclassed(keras.Model):
    def call(self, x):
        return x


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: "model", TypeError, "needs a Keras model; got str"),
        (lambda: layers.Dense(3), TypeError, "needs a Keras model; got Dense"),
        (lambda: keras.Sequential([layers.Dense(3)], name="net"), ValueError, "'net' isn't built.*keras.Input"),
        (
            lambda: keras.Sequential([keras.Input((3,)), layers.Dense(3, name="a[b]")], name="net"),
            ValueError,
            r"layer 'a\[b\]' has a name",
        ),
        (lambda: Subclassed(name="net"), ValueError, "'net' is a subclassed Subclassed.*functional"),
    ],
)
def test_models_that_cannot_be_exported(make, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export(make(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_outputs_inside_others_are_refused(tmp_path):
    entry = keras.Input((4,))
    a, b = (keras.layers.Dense(2)(entry) for _ in range(2))
    with pytest.raises(ValueError, match="inside others"):
        export(keras.Model(entry, {"a": a, "more": [a, b]}), tmp_path / "model")
    assert not any(tmp_path.iterdir())
