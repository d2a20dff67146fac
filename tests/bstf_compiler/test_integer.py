import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from bstf_compiler import graph_file, integer
from bstf_compiler.graph import Affine, DepthToSpace, Resize, Window
from tests.bstf_compiler.networks import Builder, random_images, random_network


@pytest.mark.parametrize("position", [-3, 0, 4, 7, 12])
def test_quantize_is_fake_quant_of_tensorflow(position):
    rng = np.random.default_rng(position % 100)
    x = rng.normal(scale=2.0 ** (6 - position), size=100_000).astype(np.float32)
    x = np.concatenate([x, np.ldexp(np.arange(-300, 300, 0.5, np.float32), -position)])
    low, high = -128 * 2.0**-position, 127 * 2.0**-position
    expected = tf.quantization.fake_quant_with_min_max_args(x, low, high)
    assert np.array_equal(integer.dequantize(integer.quantize(x, position), position), expected)


def test_requantize_rounds_half_up():
    values = np.array([-6, -5, -3, -2, -1, 1, 2, 3, 5, 6, 1023, -1025])
    expected = np.clip(np.floor(values / 4 + 0.5), -128, 127)
    assert np.array_equal(integer.requantize(values, 2, (-128, 127)), expected)
    assert np.array_equal(integer.requantize(np.array([-3, 3]), -2, (-128, 127)), [-12, 12])
    assert np.array_equal(integer.requantize(np.array([-3, 900]), 0, (0, 96)), [0, 96])


@pytest.mark.parametrize(("position", "top"), [(4, 96), (5, 127), (0, 6), (-1, 3), (-2, 2), (-3, 1)])
def test_relu6_ends_at_six_rounded_half_up(position, top):
    assert integer.activation_bounds("relu6", position) == (0, top)
    ceiling = tf.quantization.fake_quant_with_min_max_args(6.0, -128 * 2.0**-position, 127 * 2.0**-position)
    assert float(ceiling) == top * 2.0**-position


windows = st.builds(
    lambda kernel, strides, pads: Window(
        kernel, strides, tuple(min(p, k - 1) for p, k in zip(pads, np.repeat(kernel, 2)))
    ),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(*[st.integers(0, 4)] * 4),
)


@settings(max_examples=60, deadline=None)
@given(windows, st.integers(5, 12), st.integers(5, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_conv_is_convolution_of_tensorflow(window, height, width, cin, cout, seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 128, (2, height, width, cin)).astype(np.int8)
    kernel = rng.integers(-128, 128, (*window.kernel, cin, cout)).astype(np.int8)
    top, bottom, left, right = window.padding
    expected = tf.nn.conv2d(
        tf.cast(x, tf.float64),
        tf.cast(kernel, tf.float64),
        window.strides,
        [[0, 0], [top, bottom], [left, right], [0, 0]],
    )
    assert np.array_equal(integer.conv(x, kernel, window), expected.numpy().astype(np.int64))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_grouped_and_dilated_conv_is_that_of_tensorflow(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    kernel, dilation, strides = ((draw(1, most), draw(1, most)) for most in (4, 3, 3))
    pads = draw(0, 3), draw(0, 3), draw(0, 3), draw(0, 3)
    window = Window(kernel, strides, pads, dilation)
    groups, cin, cout, images = draw(1, 6), draw(1, 4), draw(1, 4), draw(1, 2)
    size = [extent + draw(0, 6) for extent in window.extent]
    rng = np.random.default_rng(draw(0, 999))
    x = rng.integers(-128, 128, (images, *size, groups * cin)).astype(np.int8)
    weights = rng.integers(-128, 128, (*kernel, cin, groups * cout)).astype(np.int8)
    padded = tf.cast(np.pad(x, ((0, 0), pads[:2], pads[2:], (0, 0))), tf.float64)
    every = tf.nn.conv2d(padded, tf.cast(weights, tf.float64), 1, "VALID", dilations=dilation)
    found = integer.conv(x, weights, window, groups)
    assert np.array_equal(found, every[:, :: strides[0], :: strides[1]])
    assert found.shape[1:3] == window.output_size(*size)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.sampled_from(["SAME", "VALID"]), st.integers(0, 99))
def test_depthwise_conv_is_that_of_tensorflow(channels, multiplier, dilation, padding, seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 128, (2, 9, 8, channels)).astype(np.int8)
    kernel = rng.integers(-128, 128, (3, 2, channels, multiplier)).astype(np.int8)
    pads = (dilation, dilation, dilation // 2, dilation - dilation // 2) if padding == "SAME" else (0, 0, 0, 0)
    wide = [tf.cast(value, tf.float64) for value in (x, kernel)]
    expected = tf.nn.depthwise_conv2d(*wide, [1, 1, 1, 1], padding, dilations=(dilation, dilation))
    grouped = kernel.reshape(3, 2, 1, channels * multiplier)
    window = Window((3, 2), padding=pads, dilation=(dilation, dilation))
    assert np.array_equal(integer.conv(x, grouped, window, channels), expected)


def test_concat_puts_every_part_on_the_grid_of_the_whole():
    build = Builder(np.random.default_rng(0))
    x = build.input(3, 4, 5, position=4)
    y = build.requantize(x, "linear")
    graph = build.finish(build.concat(x, y, x, position=2))
    images = random_images(0, graph, 3)
    parts = [
        integer.dequantize(value, graph.tensors[name].position) for name, value in integer.trace(graph, images).items()
    ]
    whole = np.concatenate([parts[0], parts[1], parts[0]], axis=-1)
    expected = tf.quantization.fake_quant_with_min_max_args(whole, -32.0, 127 / 4)
    assert np.array_equal(integer.run(graph, images), expected)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_max_pool_is_that_of_tensorflow(padding):
    rng = np.random.default_rng(0)
    build = Builder(rng)
    pads = (0, 1, 1, 1) if padding == "SAME" else (0, 0, 0, 0)
    graph = build.finish(build.max_pool(build.input(7, 6, 3, position=0), Window((2, 3), (2, 1), pads)))
    x = rng.integers(-128, 128, (2, 7, 6, 3)).astype(np.float32)
    assert np.array_equal(integer.run(graph, x), tf.nn.max_pool2d(x, (2, 3), (2, 1), padding))


def test_add_aligns_to_the_finer_grid():
    build = Builder(np.random.default_rng(0))
    x = build.input(2, 2, 1, position=3)
    y = build.requantize(x, "linear")
    graph = build.finish(build.add(x, y, "relu"))
    p, q, out = (graph.tensors[name].position for name in (x, y, graph.outputs[0]))
    images = random_images(0, graph, 5)
    first = integer.quantize(images, p)
    second = np.clip(np.floor(first * 2.0 ** (q - p) + 0.5), -128, 127)
    total = np.floor((first * 2.0**-p + second * 2.0**-q) * 2.0**out + 0.5)
    assert np.array_equal(integer.run(graph, images), np.clip(total, 0, 127) * 2.0**-out)


def test_softmax_ends_on_the_host():
    build = Builder(np.random.default_rng(0))
    graph = build.finish(build.conv(build.input(1, 1, 8), 10, Window((1, 1)), activation="linear"), softmax=True)
    x = random_images(0, graph, 4)
    values = integer.trace(graph, x)
    logits = integer.dequantize(values[graph.nodes[0].output], graph.tensors[graph.nodes[0].output].position)
    np.testing.assert_allclose(integer.run(graph, x), tf.nn.softmax(logits), rtol=1e-6)


def test_refuses_float_graphs_and_wrong_images():
    graph = random_network(1)
    with pytest.raises(ValueError, match="takes images of shape"):
        integer.run(graph, np.zeros((1, 99, 1, 1)))
    with pytest.raises(ValueError, match="NaN"):
        integer.run(graph, np.full((1, *graph.inputs["image"]), np.nan))
    graph.tensors[graph.outputs[0]].position = None
    with pytest.raises(ValueError, match="no fixed-point grid"):
        integer.run(graph, random_images(0, graph))


@pytest.mark.parametrize("factors", [(2, 2), (1, 4), (8, 2), (4, 1)])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 3)])
def test_bilinear_resize_is_that_of_tensorflow(factors, size):
    x = np.random.default_rng(0).integers(-128, 128, (2, *size, 3)).astype(np.int8)
    total, bits = integer.resize(x, Resize(factors, "bilinear"))
    wanted = tf.image.resize(x.astype(np.float32), (size[0] * factors[0], size[1] * factors[1]), "bilinear")
    assert np.array_equal(np.ldexp(total.astype(np.float64), -bits), wanted)


@pytest.mark.parametrize("factors", [(2, 2), (1, 3), (5, 2)])
def test_nearest_resize_is_that_of_tensorflow(factors):
    x = np.random.default_rng(0).integers(-128, 128, (2, 4, 3, 3)).astype(np.int8)
    total, bits = integer.resize(x, Resize(factors))
    wanted = tf.image.resize(x, (4 * factors[0], 3 * factors[1]), "nearest")
    assert bits == 0 and np.array_equal(total, wanted)


def test_depth_to_space_is_that_of_tensorflow():
    x = np.random.default_rng(0).integers(-128, 128, (2, 4, 3, 36)).astype(np.int8)
    wanted = tf.nn.depth_to_space(x, 3).numpy()
    assert np.array_equal(integer.depth_to_space(x, DepthToSpace((3, 3))), wanted)
    assert np.array_equal(integer.depth_to_space(x, DepthToSpace((3, 3), (1, 2, 0, 3))), wanted[:, 1:-2, :-3])


def _evaluated(build, output, seed=0):
    graph = build.finish(output)
    values = integer.trace(graph, random_images(seed, graph, 2))
    node = graph.producer(output)
    inputs = [graph.tensors[name] for name in node.inputs]
    return values[output].astype(float), [np.ldexp(values[t.name].astype(float), -t.position) for t in inputs]


@pytest.mark.parametrize("broadcast", [False, True])
@pytest.mark.parametrize("kind", ["add", "subtract", "product"])
def test_elementwise_operations_of_two_tensors(kind, broadcast):
    build = Builder(np.random.default_rng(3))
    x = build.input(6, 5, 11)
    a = build.conv(x, 13, Window((1, 1)), activation="linear")
    b = build.conv(x, 13, Window((6, 5) if broadcast else (1, 1)), activation="linear")
    y = build.product(a, b) if kind == "product" else build.add(a, b, "relu", kind == "subtract")
    result, (first, second) = _evaluated(build, y)
    exact = {"add": np.add, "subtract": np.subtract, "product": np.multiply}[kind](first, second)
    grid = np.floor(np.ldexp(exact, build.graph.tensors[y].position) + 0.5)
    assert np.array_equal(result, np.clip(grid, -128 if kind == "product" else 0, 127))
    assert len(np.unique(result)) > 5


def test_lookup_takes_the_entry_of_each_integer():
    build = Builder(np.random.default_rng(3))
    x = build.input(6, 5, 11)
    y = build.lookup(x)
    graph = build.finish(y)
    values = integer.trace(graph, random_images(0, graph))
    table = dict(zip(range(-128, 128), graph.tensors[graph.nodes[0].inputs[1]].data))
    assert np.array_equal(values[y], np.vectorize(table.get)(values[x]))


def test_affine_is_multiplied_and_added_in_float32_as_tensorflow_does():
    build = Builder(np.random.default_rng(3))
    x = build.input(9, 8, 3)
    y = build.affine(x)
    graph = build.finish(y)
    images = random_images(0, graph, 4)
    scale, offset = (graph.tensors[name].data for name in graph.nodes[0].inputs[1:])
    wanted = tf.quantization.fake_quant_with_min_max_args(tf.constant(images) * scale + offset, -8.0, 127 / 16)
    assert np.array_equal(integer.run(graph, images), wanted)


def _every_operation() -> tuple[Builder, str]:
    build = Builder(np.random.default_rng(5))
    x = build.affine(build.input(6, 5, 12), image=True)
    gate = build.lookup(build.average_pool(x, Window((6, 5))))
    x = build.product(x, gate)
    x = build.add(x, gate, subtract=True)
    x = build.resize(build.resize(x, (2, 1)), (1, 2), "bilinear")
    x = build.depth_to_space(x, (2, 2), (1, 0, 0, 2))
    return build, x


def test_a_file_keeps_every_operation(tmp_path):
    build, x = _every_operation()
    graph = build.finish(x)
    graph_file.write(graph, tmp_path / "graph.npz")
    loaded = graph_file.read(tmp_path / "graph.npz")
    images = random_images(1, graph, 2)
    assert loaded.is_fixed_point and [node.op for node in loaded] == [node.op for node in graph]
    assert isinstance(loaded.nodes[0].op, Affine)
    assert np.array_equal(integer.run(loaded, images), integer.run(graph, images))


@pytest.mark.parametrize(
    ("images", "made", "outputs", "fixed"),
    [
        (4, 3, ["y"], True),
        (None, 3, ["y"], True),  # the host makes it
        (None, None, ["y"], False),
        (4, 3, ["image"], True),
        (None, 3, ["image", "y"], False),  # an output without a grid
    ],
)
def test_a_network_of_integers_is_known_by_its_inputs(images, made, outputs, fixed):
    build = Builder(np.random.default_rng(0))
    build.input(4, 4, 3, name="nobody reads it")
    made_by_host = build.affine(build.input(4, 4, 3))
    graph = build.finish(made_by_host)
    graph.tensors["nobody reads it"].position, graph.tensors["image"].position = None, images
    graph.tensors[made_by_host].position = made
    graph.outputs = [made_by_host if name == "y" else name for name in outputs]
    assert graph.is_fixed_point == fixed
