import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import bstf_compiler
from bstf_compiler import integer


def grid(x, position):
    return tf.quantization.fake_quant_with_min_max_args(x, -128 * 2.0**-position, 127 * 2.0**-position)


def save(path, function, shape=(None, 8, 8, 8)):
    module = tf.Module()
    module.serve = tf.function(function, input_signature=[tf.TensorSpec(shape, tf.float32, name="image")])
    tf.saved_model.save(module, str(path), signatures={"serving_default": module.serve})
    return path


KERNEL = np.round(np.random.default_rng(0).normal(size=(3, 3, 8, 16)) * 20).astype(np.float32) / 128
BIAS = np.arange(16, dtype=np.float32) / 64


def small_network(x):
    x = grid(x, 5)
    y = tf.nn.conv2d(x, grid(KERNEL, 7), 1, "SAME") + grid(BIAS, 6)
    return {"logits": grid(tf.nn.relu(y), 3)}


def test_any_savedmodel_of_fake_quant_graphs_compiles(tmp_path):
    graph = bstf_compiler.load(save(tmp_path / "model", small_network))
    (node,) = graph.nodes
    assert node.op.activation == "relu" and graph.tensors[node.output].position == 3
    x = np.random.default_rng(1).normal(size=(3, 8, 8, 8)).astype(np.float32)
    assert np.array_equal(integer.run(graph, x), small_network(x)["logits"])
    assert np.array_equal(bstf_compiler.compile(graph, "aie2_2x2").simulate(x), small_network(x)["logits"])


def test_ranges_in_tensors_are_read_too(tmp_path):
    def network(x):
        low, high = tf.constant(-4.0), tf.constant(127 / 32)
        return tf.quantization.fake_quant_with_min_max_vars(tf.nn.max_pool2d(grid(x, 5), 2, 2, "VALID"), low, high)

    graph = bstf_compiler.load(save(tmp_path / "model", network))
    assert [node.op.kind for node in graph] == ["maxpool"]


def test_float_networks_load_with_batch_norm_folded(tmp_path):
    gamma, beta, mean, variance = (np.random.default_rng(i).uniform(0.5, 2, 16).astype(np.float32) for i in range(4))

    def network(x):
        y = tf.nn.conv2d(x, KERNEL, 2, "SAME") + BIAS
        return tf.nn.relu(tf.nn.batch_normalization(y, mean, variance, beta, gamma, 1e-3))

    graph = bstf_compiler.load(save(tmp_path / "model", network))
    (node,) = graph.nodes
    scale = gamma / np.sqrt(variance + 1e-3)
    kernel, bias = (graph.tensors[name].data for name in node.inputs[1:])
    np.testing.assert_allclose(kernel, KERNEL * scale, rtol=1e-5)
    np.testing.assert_allclose(bias, (BIAS - mean) * scale + beta, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no fixed-point grid; quantise"):
        bstf_compiler.compile(graph)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (tf.math.sin, ["operation 'Sin' is not supported", "replace the layer"]),
        (lambda x: tf.concat([x, x], 1), ["concatenation over another axis"]),
        (lambda x: tf.concat([x, np.ones((1, 8, 8, 2), np.float32)], -1), ["concatenation with a constant"]),
        (
            lambda x: tf.batch_to_space(tf.nn.relu(tf.space_to_batch(x, [2, 2], [[0, 0]] * 2)), [2, 2], [[0, 0]] * 2),
            ["right after a convolution"],
        ),
        (lambda x: tf.image.resize(x, (12, 12)), ["a resize from (8, 8) to (12, 12)"]),
        (lambda x: tf.image.resize(x, (24, 24)), ["interpolation by (3, 3)"]),
        (lambda x: x[:, 1::2], ["such a choice of pixels"]),
        (lambda x: x[:, ::-1], ["such a choice of pixels"]),
        (lambda x: x[:, :5:2], ["such a choice of pixels"]),
        (lambda x: x[:, ::2, 1:], ["such a choice of pixels"]),
        (lambda x: x[:, 3:2], ["an empty slice"]),
        (lambda x: x[:, 1:, :, ::-1], ["a slice of pixels and channels at once"]),
        (lambda x: x[:, 2], ["a slice other than of rows, columns and channels"]),
        (lambda x: x[..., 1] + 1.0, ["AddV2 of a channel on its own is not supported"]),
        (lambda x: tf.stack([x[:, 1:, 1:, 1], x[:, :-1, 1:, 2]], -1), ["a channel of some rows and columns"]),
        (lambda x: tf.stack([x[..., 1], x[..., 2]], 1), ["a stack of other tensors"]),
        (lambda x: tf.reverse(x, [1]), ["a reversal of the axes [1]"]),
        (lambda x: tf.transpose(x, (1, 0, 2, 3)), ["a transposition of the batch"]),
        (
            lambda x: tf.reshape(tf.tile(tf.expand_dims(x, 1), [1, 2, 1, 1, 1]), [-1, 16, 8, 8]),
            ["a tensor tiled and reshaped"],
        ),
        (lambda x: tf.gather(np.ones(256, np.float32), tf.cast(x * -16 + 128, tf.int32)), ["a table other than"]),
        (lambda x: grid(tf.nn.conv2d(x, KERNEL, 1, "SAME"), 2), ["has a fixed-point grid, but the network's input"]),
        (lambda x: grid((x - 127) / 51, 4), ["has a fixed-point grid, but the network's input"]),
        (lambda x: tf.nn.relu(tf.nn.softmax(x)), ["reads its softmax"]),
        (lambda x: tf.gather([1.0, 2.0], tf.cast(x, tf.int32)), ["a table other than"]),
        (lambda x: 1.0 / x, ["division by an activation"]),
        (lambda x: x * tf.reduce_max(x, -1, keepdims=True), ["Max over axes [3]"]),
        (lambda x: tf.quantization.fake_quant_with_min_max_args(x, -1, 1), ["not an 8-bit power-of-two grid"]),
        (lambda x: tf.nn.conv2d(x, KERNEL * np.nan, 1, "SAME"), ["NaN"]),
    ],
)
def test_what_is_not_supported_is_refused_in_a_sentence(tmp_path, function, words):
    with tf.name_scope("outer"):
        path = save(tmp_path / "model", lambda x: function(x))
    with pytest.raises(ValueError) as refusal:
        bstf_compiler.load(path)
    for word in words:
        assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("function", "kinds"),
    [
        (lambda x: x[:, ::2, ::3], ["maxpool"]),
        (lambda x: tf.nn.conv2d(x[:, ::2, ::3], KERNEL, 1, "SAME"), ["conv"]),
        (lambda x: x[:, 1:-1, 2:], ["depthtospace"]),
        (lambda x: x[..., ::-1], ["conv"]),
        (lambda x: x[:, :, :, 1:], ["conv"]),
        (lambda x: tf.reverse(x, [-1]), ["conv"]),
        (lambda x: tf.stack([x[..., place] for place in (2, 0, 7, 1, 1, -1)], -1), ["conv"]),
        (lambda x: tf.nn.relu(tf.stack([x[..., place] for place in range(8)], 3)), ["relu"]),
        (lambda x: tf.reduce_max(x, (1, 2))[:, ::2], ["maxpool", "conv"]),
        (lambda x: tf.nn.relu(tf.transpose(x, (0, 1, 2, 3))), ["relu"]),
        (lambda x: tf.reshape(tf.transpose(x, (0, 3, 1, 2)), (-1, 512)) @ MATRIX, ["conv"]),
    ],
)
def test_parts_and_orders_of_a_tensor(tmp_path, function, kinds):
    graph = bstf_compiler.load(save(tmp_path / "model", lambda x: function(x)))
    assert [node.op.kind for node in graph] == kinds
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(bstf_compiler.Engine(graph)(x), function(x), rtol=1e-4, atol=1e-5)


IMAGE = (None, 4, 4, 8)
MATRIX = np.random.default_rng(1).normal(size=(512, 5)).astype(np.float32)
ONES = np.ones((3, 3, 8, 1), np.float32)


def conv(x):
    return tf.nn.conv2d(x, grid(KERNEL, 7), 1, "SAME")


def depthwise(x, kernel, dilation=1):
    return tf.nn.depthwise_conv2d(x, kernel, [1] * 4, "SAME", dilations=[dilation, dilation])


@pytest.mark.parametrize(
    ("function", "shape", "words"),
    [
        (
            lambda x: tf.nn.max_pool2d(tf.reshape(grid(x, 5), (-1, 2, 2, 2)), 2, 2, "VALID"),
            (None, 1, 1, 8),
            "a reshape",
        ),
        (lambda x: grid(tf.reshape(grid(x, 5), (-1, 8)) @ grid(KERNEL[0, 0], 7), 3), (None, 2, 2, 8), "a reshape"),
        (lambda x: grid(conv(grid(x, 5)) + grid(np.ones((4, 4, 1), np.float32), 5), 3), IMAGE, "no layer"),
        (lambda x: grid(x, 5)[..., :1] + grid(np.ones(8, np.float32), 5), IMAGE, "not supported"),
        (lambda x: grid(conv(tf.cast(tf.cast(grid(x, 5), tf.int32), tf.float32)), 3), IMAGE, "not supported"),
        (lambda x: tf.nn.max_pool(grid(x, 5), [1, 1, 1, 2], [1, 1, 1, 2], "VALID"), IMAGE, "window over channels"),
        (lambda x: tf.nn.relu6(grid(x, -2)), IMAGE, "6 is no point of the grid"),
        (lambda x: grid(conv(grid(x, 5)) + grid(tf.random.normal((16,)), 5), 3), IMAGE, "RandomStandardNormal"),
        (lambda x: grid(conv(grid(x, 5)), 62), IMAGE, "beyond 32-bit"),
        (lambda x: grid(grid(x, 0) + grid(grid(x, 0), 57), 0), IMAGE, "beyond 32-bit"),
        (lambda x: grid(grid(x, 62), -5), IMAGE, "beyond 32-bit"),
        (lambda x: grid(tf.concat([grid(x, 5), grid(grid(x, 5), 40)], -1), 4), IMAGE, "beyond 32-bit"),
        (lambda x: grid(depthwise(grid(x, 5), grid(KERNEL[..., :1], 7)), 62), IMAGE, "beyond 32-bit"),
        (
            lambda x: tf.concat([grid(x, 5), grid(grid(x, 5), 4)], -1),
            IMAGE,
            "positions 4, 5 and has no grid of its own",
        ),
        (lambda x: {"a": tf.constant([1.0]), "b": grid(x, 5)}, IMAGE, "output 'a'"),
        (lambda x: tf.argmax(grid(x, 5), -1), IMAGE, "output 'output_0'"),
        (lambda x: tf.nn.relu(grid(x, 5)), (None, 16, 4), "an image .* or a vector"),
        (
            lambda x: grid(tf.nn.depthwise_conv2d(grid(x, 5), ONES, [1] * 4, "VALID") * (np.arange(8) / 8.0), 5),
            IMAGE,
            "averaging factors have shape",
        ),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(tmp_path, function, shape, words):
    with pytest.raises(ValueError, match=words) as refusal:
        bstf_compiler.load(save(tmp_path / "model", function, shape))
    assert "\n" not in str(refusal.value)


def test_a_softmax_of_a_softmax_is_refused(tmp_path):
    with pytest.raises(ValueError, match="reads its softmax; a softmax is supported at the end"):
        bstf_compiler.load(save(tmp_path / "model", lambda x: tf.nn.softmax(tf.nn.softmax(grid(x, 5)))))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: tf.nn.relu(tf.nn.max_pool2d(grid(x, 5), 2, 2, "SAME")),
        lambda x: grid(conv(tf.nn.relu6(tf.pad(grid(x, 4), [[0, 0], [1, 1], [0, 2], [0, 0]]))), 2),
        lambda x: grid(tf.cast(tf.cast(conv(grid(x, 5)), tf.float64), tf.float32), 3),
        lambda x: grid(tf.nn.depthwise_conv2d(grid(x, 5), ONES, [1, 2, 2, 1], "SAME") * (7 / 64), 5),
        lambda x: {"first": grid(x, 5), "second": grid(grid(x, 5) + grid(x, 5), 4)},
        lambda x: grid(tf.nn.relu(tf.nn.conv2d(grid(x, 5), grid(KERNEL[:, :, :2], 7), [1, 2], "SAME")), 3),
        lambda x: grid(tf.nn.conv2d(grid(x, 5), grid(KERNEL, 7), 1, "SAME", dilations=[1, 2]), 3),
        lambda x: grid(tf.nn.convolution(grid(x, 5), grid(KERNEL, 7), 1, "SAME", dilations=[2, 3]), 3),
        lambda x: grid(tf.nn.convolution(grid(x, 5), grid(KERNEL[:2, :2], 7), 1, "VALID", dilations=[3, 1]), 3),
        lambda x: grid(depthwise(grid(x, 5), grid(KERNEL[..., :3], 7), 2) + grid(np.ones(24, np.float32), 5), 3),
        lambda x: grid(depthwise(grid(x, 5), grid(ONES, 5)), 2),
        lambda x: grid(tf.concat([grid(x, 5), grid(conv(grid(x, 5)), 2), grid(x, 5)], -1), 3),
        lambda x: tf.nn.relu(tf.concat([grid(x, 5), tf.nn.max_pool2d(grid(x, 5), 2, 1, "SAME")], -1)),
        lambda x: grid(tf.concat([tf.concat([grid(x, 5), grid(conv(grid(x, 5)), 2)], -1), grid(grid(x, 5), 4)], -1), 1),
        lambda x: grid(tf.concat([grid(tf.concat([grid(x, 5), grid(grid(x, 5), 4)], -1), 2), grid(x, 5)], -1), 4),
    ],
)
def test_legal_graphs_give_the_numbers_of_tensorflow(tmp_path, function):
    graph = bstf_compiler.load(save(tmp_path / "model", function, IMAGE))
    x = np.random.default_rng(2).normal(scale=3, size=(3, 4, 4, 8)).astype(np.float32)
    expected = function(tf.constant(x))
    expected = [value.numpy() for value in (expected.values() if isinstance(expected, dict) else [expected])]
    found = integer.run(graph, x)
    for one, two in zip(found if isinstance(found, list) else [found], expected, strict=True):
        assert np.array_equal(one, two)


def test_twelve_outputs_keep_their_order(tmp_path):
    def network(x):
        return {f"output_{i}": grid(conv(grid(x, 5)) + grid(np.full(16, i / 4, np.float32), 5), 3) for i in range(12)}

    graph = bstf_compiler.load(save(tmp_path / "model", network, IMAGE))
    x = np.random.default_rng(3).normal(size=(1, 4, 4, 8)).astype(np.float32)
    expected = [network(x)[f"output_{i}"] for i in range(12)]
    for one, two in zip(integer.run(graph, x), expected, strict=True):
        assert np.array_equal(one, two)
    for one, two in zip(bstf_compiler.compile(graph, "aie2_2x2").simulate(x), expected, strict=True):
        assert np.array_equal(one, two)


def test_names_of_scopes_are_kept(tmp_path):
    def network(x):
        with tf.name_scope("model"):
            for _ in range(3):
                with tf.name_scope("conv"):
                    x = grid(tf.nn.conv2d(grid(x, 5), grid(KERNEL[..., :8], 7), 1, "SAME"), 3)
        return x

    graph = bstf_compiler.load(save(tmp_path / "model", network, IMAGE))
    assert [node.name for node in graph if node.op.kind == "conv"] == ["conv", "conv_1", "conv_2"]


def test_unknown_operation_names_its_layer(tmp_path):
    def network(x):
        with tf.name_scope("model"), tf.name_scope("sine7"):
            return tf.math.sin(x)

    with pytest.raises(ValueError, match="layer 'sine7': operation 'Sin'"):
        bstf_compiler.load(save(tmp_path / "model", network))


def test_missing_and_damaged_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no saved_model.pb"):
        bstf_compiler.load(tmp_path / "nothing")
    path = save(tmp_path / "model", small_network)
    whole = (path / "saved_model.pb").read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 7):
        (path / "saved_model.pb").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged or incomplete|no signature"):
            bstf_compiler.load(path)


def test_open_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not fixed"):
        bstf_compiler.load(save(tmp_path / "open", lambda x: tf.nn.relu(x), shape=(None, None, None, 8)))


def test_inputs_come_in_the_order_of_their_names(tmp_path):
    module = tf.Module()
    specs = [tf.TensorSpec((None, 4, 4, 8), tf.float32, name) for name in ("x_10", "x_9")]
    module.serve = tf.function(lambda x_10, x_9: x_10 - tf.nn.relu(x_9), input_signature=specs)
    tf.saved_model.save(module, str(tmp_path / "two"), signatures={"serving_default": module.serve})
    graph = bstf_compiler.load(tmp_path / "two")
    assert graph.inputs == {"x_9": (4, 4, 8), "x_10": (4, 4, 8)} and list(graph.inputs) == ["x_9", "x_10"]
    x = np.random.default_rng(0).normal(size=(2, 2, 4, 4, 8)).astype(np.float32)
    expected = x[0] - np.maximum(x[1], 0)
    engine = bstf_compiler.Engine(graph)
    np.testing.assert_array_equal(engine([x[1], x[0]]), expected)
    np.testing.assert_array_equal(engine({"x_10": x[0], "x_9": x[1]}), expected)
    for wrong, sentence in (
        (x[0], "give a list of their images.*got a ndarray"),
        ([x[0]], "got 1 arrays"),
        ({"x_9": x[0]}, "inputs are 'x_9', 'x_10'; got images of 'x_9'"),
        ([x[0], x[1, :1]], "'x_10' has 1 images and 'x_9' has 2"),
        ([x[0], x[1, ..., :3]], "'x_10' takes images of shape"),
    ):
        with pytest.raises(ValueError, match=sentence):
            engine(wrong)


def test_sidecar_is_checked_and_not_needed(tmp_path):
    def network(x):
        with tf.name_scope("model"), tf.name_scope("conv7"):
            y = tf.nn.conv2d(grid(x, 5), grid(KERNEL, 7), 1, "SAME")
        return grid(y, 3)

    path = save(tmp_path / "model", network)
    (path / "assets.extra").mkdir()
    sidecar = path / "assets.extra" / "bstf.json"
    record = {"block": [8, 8], "gamma": ["11"], "kernel_position": 7}
    sidecar.write_text(json.dumps({"layers": {"conv7": record}}))
    bstf_compiler.load(path)
    for wrong, words in (({"gamma": ["10"]}, "other zero blocks"), ({"kernel_position": 6}, "position 6")):
        sidecar.write_text(json.dumps({"layers": {"conv7": record | wrong}}))
        with pytest.raises(ValueError, match=words):
            bstf_compiler.load(path)
    damages = ["{", "[]", "{}", '{"layers": {"conv7": {"block": [8, 8]}}}', '{"layers": {"conv7": 3}}']
    damages += [json.dumps({"layers": {"conv7": record | {"block": block}}}) for block in ([0, 8], [8], [-8, -8])]
    damages.append(json.dumps({"layers": {"conv7": record | {"gamma": ["1", "11"]}}}))
    for damaged in damages:
        sidecar.write_text(damaged)
        with pytest.raises(ValueError, match="damaged"):
            bstf_compiler.load(path)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, -20:, 1:3],
        lambda x: x[:, 1:-1],
        lambda x: tf.repeat(x[:, :, :1], 3, 2),
        lambda x: tf.repeat(tf.reduce_mean(x, [1, 2], keepdims=True), 4, 2),
        lambda x: tf.repeat(tf.repeat(x, 1, 1), 3, 2),
    ],
)
def test_slices_and_repeats_are_those_of_tensorflow(tmp_path, function):
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 8)).astype(np.float32)
    engine = bstf_compiler.Engine(bstf_compiler.load(save(tmp_path / "model", function)))
    np.testing.assert_allclose(engine(x), function(tf.constant(x)), rtol=1e-5, atol=1e-6)


def test_pixels_may_come_as_bytes(tmp_path):
    image = keras.Input((8, 8, 3), dtype="uint8")
    model = keras.Model(image, keras.layers.Conv2D(4, 3)(keras.layers.Rescaling(1 / 127.5, -1)(image)))
    model.export(tmp_path / "model", verbose=False)
    x = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    found = bstf_compiler.Engine(bstf_compiler.load(tmp_path / "model"))(x)
    np.testing.assert_allclose(found, model(x), rtol=1e-4, atol=1e-5)
