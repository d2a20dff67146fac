import io
import json
import time

import numpy as np
import pytest
import rich.console
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bstf_compiler import Engine
from bstf_compiler.cpu import calibration
from bstf_compiler.cpu.kernels.winograd import Costs
from bstf_compiler.cpu.simd import host_isa
from bstf_compiler.graph import (
    Add,
    Affine,
    Average,
    BiasAdd,
    Concat,
    DepthToSpace,
    Function,
    MaxPool,
    Multiply,
    Product,
    Relu,
    Resize,
    Softmax,
    SumPool,
    Window,
)
from tests.bstf_compiler.cpu.network import Network, blocks

MEASURE = calibration.measure
pytestmark = pytest.mark.usefixtures("known_machine")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_convolution(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    rng = np.random.default_rng(draw(0, 999))
    kernel, strides, dilation = (draw(1, 7), draw(1, 7)), (draw(1, 3), draw(1, 3)), (draw(1, 2), draw(1, 3))
    padding = tuple(draw(0, 3) for _ in range(4))
    extent = [(size - 1) * step + 1 for size, step in zip(kernel, dilation)]
    height = max(1, extent[0] - padding[0] - padding[1]) + draw(0, 12)
    width = max(1, extent[1] - padding[2] - padding[3]) + draw(0, 30)
    cin, cout, groups, images = data.draw(st.sampled_from([1, 3]) | st.integers(1, 20)), draw(1, 20), 1, draw(1, 3)
    if data.draw(st.booleans()):  # depthwise layers and others
        groups, per_group = draw(1, 20), data.draw(st.sampled_from([(1, 1), (1, 2), (3, 2), (8, 8)]))
        cin, cout = groups * per_group[0], groups * per_group[1]
    network = Network((height, width, cin))
    bias = rng.normal(size=cout).astype(np.float32)
    activation = data.draw(st.sampled_from(["linear", "relu", "relu6"]))
    weights = blocks(rng, (*kernel, cin // groups, cout), 0.5)
    out = network.conv("x", weights, bias, strides, padding, activation, groups, dilation)
    # Something that needs zeros around it and may run over what the first one left there.
    last = network.conv(out, blocks(rng, (3, 3, cout, 8), 0.7), np.zeros(8, np.float32), padding=(1, 1, 1, 1))
    x = rng.normal(size=(images, height, width, cin)).astype(np.float32)
    network.check(x, out, last, threads=draw(1, 2))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_convolution_by_winograd(monkeypatch, data):
    monkeypatch.setattr(Engine, "_winograd_pays", lambda *_: True)

    def draw(low, high):
        return data.draw(st.integers(low, high))

    rng = np.random.default_rng(draw(0, 999))
    padding = tuple(draw(0, 6) for _ in range(4))
    height = max(1, 3 - padding[0] - padding[1]) + draw(0, 20)
    width = max(1, 3 - padding[2] - padding[3]) + data.draw(st.sampled_from([*range(30), 64, 231]))
    cin, cout, images = draw(8, 40), draw(8, 40), draw(1, 3)
    network = Network((height, width, cin))
    bias = rng.normal(size=cout).astype(np.float32)
    activation = data.draw(st.sampled_from(["linear", "relu"]))
    out = network.conv("x", blocks(rng, (3, 3, cin, cout), 0.5), bias, padding=padding, activation=activation)
    same = network.conv(out, blocks(rng, (3, 3, cout, cout), 0.5), bias, padding=(1, 1, 1, 1))
    total = network.add(Add("relu"), [out, same], lambda a, b: tf.nn.relu(a + b).numpy())
    # Something that needs zeros around it.
    last = network.conv(total, blocks(rng, (5, 1, cout, 8), 0.7), np.zeros(8, np.float32), padding=(2, 2, 0, 0))
    x = rng.normal(size=(images, height, width, cin)).astype(np.float32)
    # The numbers in between are larger than those of the direct way, and so are the errors.
    network.check(x, out, total, last, threads=draw(1, 2), tolerance=5e-5)


def test_a_machine_is_measured_in_about_a_second_and_its_choices_change_rounding_only(monkeypatch, tmp_path):
    rng, shape = np.random.default_rng(0), (20, 18, 32)
    network = Network(shape)
    out = network.conv("x", blocks(rng, (3, 3, 32, 32), 0.5), np.zeros(32, np.float32), padding=(1, 1, 1, 1))
    network.check(rng.normal(size=(1, *shape)).astype(np.float32), out)  # compiles
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "_known", {})
    monkeypatch.setattr(calibration, "measure", MEASURE)
    start = time.process_time()
    engine = Engine(network.graph, recalibrate=True)
    assert time.process_time() - start < 10  # of all threads, while others use the machine
    (found,) = json.loads(calibration.cache_file().read_text()).values()
    assert calibration.costs(host_isa()) == Costs(**found) and Costs(**found).are_positive
    x, results = rng.normal(size=(2, *shape)).astype(np.float32), [engine]
    for choice in (True, False):
        monkeypatch.setattr(Engine, "_winograd_pays", lambda *_, choice=choice: choice)
        results.append(Engine(network.graph))
    assert [len(one.profile(x, repeats=1).layers) for one in results[1:]] == [4, 2]
    first, *others = (one(x) for one in results)
    assert all(np.abs(first - other).max() < 1e-5 * np.abs(first).max() for other in others)


def test_winograd_where_it_pays():
    def kinds(side, channels, density, **window):
        rng = np.random.default_rng(0)
        network = Network((side, side, channels))
        bias = np.zeros(channels, np.float32)
        network.conv("x", blocks(rng, (3, 3, channels, channels), density), bias, padding=(1, 1, 1, 1), **window)
        network.graph.outputs, network.graph.output_shapes = ["n0"], [network.graph.tensors["n0"].shape[1:]]
        profile = Engine(network.graph).profile(np.ones((1, side, side, channels)), repeats=1)
        return [layer.kind for layer in profile.layers[1:]]

    assert kinds(28, 128, 1.0) == ["to tiles", "conv", "from tiles"]
    assert kinds(28, 128, 0.05) == ["conv"]  # the transforms would be most of the work
    assert kinds(4, 128, 1.0) == ["conv"]  # a single tile fills no vector
    assert kinds(28, 128, 1.0, strides=(2, 2)) == ["split", "conv"]
    assert kinds(28, 128, 1.0, dilation=(2, 2)) == ["conv"]


def test_pixels_that_only_strides_skip_are_not_computed():
    rng = np.random.default_rng(0)
    network = Network((9, 7, 16))
    bias = rng.normal(size=16).astype(np.float32)
    first = network.conv("x", blocks(rng, (1, 1, 16, 16), 0.6), bias)
    second = network.conv(first, blocks(rng, (3, 3, 16, 16), 0.6), bias, padding=(1, 1, 1, 1))
    total = network.add(Add("relu"), [first, second], lambda a, b: tf.nn.relu(a + b).numpy())
    one, other = (network.conv(total, blocks(rng, (1, 1, 16, 8), 0.6), bias[:8], strides=(2, 2)) for _ in range(2))
    network.check(rng.normal(size=(2, 9, 7, 16)).astype(np.float32), one, other)
    engine = Engine(network.graph)
    layers = engine.profile(np.ones((1, 9, 7, 16)), repeats=1).layers
    assert [(layer.name, layer.kind) for layer in layers[2:]] == [
        ("n0 picked 2x2", "split"), ("n1", "split"), ("n1", "conv"), ("n3", "conv"), ("n4", "conv"),
    ]  # fmt: skip
    assert layers[4].dense_operations == 2 * 5 * 4 * 9 * 16 * 16
    assert engine.graph.tensors["n2"].shape == (1, 9, 7, 16)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pools_and_elementwise_operations(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    rng = np.random.default_rng(draw(0, 999))
    height, width, channels, images = draw(3, 12), draw(3, 20), draw(1, 20), draw(1, 3)
    network = Network((height, width, channels))
    pool, strides = (draw(1, 3), draw(1, 3)), (draw(1, 3), draw(1, 3))
    same = [max(0, (-(-size // s) - 1) * s + k - size) for size, k, s in zip((height, width), pool, strides)]
    padding = same[0] // 2, same[0] - same[0] // 2, same[1] // 2, same[1] - same[1] // 2
    window = Window(pool, strides, padding)
    zeros = ((0, 0), padding[:2], padding[2:], (0, 0))
    outs = [
        network.add(MaxPool(window), ["x"], lambda x: tf.nn.max_pool2d(x, pool, strides, "SAME").numpy()),
        network.add(Average(window), ["x"], lambda x: tf.nn.avg_pool2d(x, pool, strides, "SAME").numpy()),
        network.add(MaxPool(window, zero_padding=True), ["x"],
                    lambda x: tf.nn.max_pool2d(tf.pad(x, zeros), pool, strides, "VALID").numpy()),
    ]  # fmt: skip
    total = network.add(Add("relu"), outs[:2], lambda a, b: tf.nn.relu(a + b).numpy())
    factor = rng.normal(size=(channels,)).astype(np.float32)
    scaled = network.add(Multiply(), [total], lambda a: a * factor, [factor])
    moved = network.add(BiasAdd(), [scaled], lambda a: a + factor, [factor])
    bounded = network.add(Relu("relu6"), [moved], lambda a: tf.nn.relu6(a).numpy())
    kernel = blocks(rng, (3, 3, channels, 9), 0.7)
    last = network.conv(bounded, kernel, np.ones(9, np.float32), padding=(1, 1, 1, 1))
    x = rng.normal(size=(images, height, width, channels)).astype(np.float32)
    network.check(x, *outs, total, bounded, last, threads=draw(1, 2))


FUNCTIONS = {
    "elu": tf.nn.elu,
    "erf": tf.math.erf,
    "exp": tf.exp,
    "gelu": tf.nn.gelu,
    "gelu_tanh": lambda x: tf.nn.gelu(x, approximate=True),
    "hard_sigmoid": lambda x: tf.nn.relu6(x + 3) / 6,
    "hard_swish": lambda x: x * tf.nn.relu6(x + 3) / 6,
    "leaky_relu": lambda x: tf.nn.leaky_relu(x, 0.3),
    "selu": tf.nn.selu,
    "sigmoid": tf.sigmoid,
    "softplus": tf.nn.softplus,
    "swish": tf.nn.silu,
    "tanh": tf.tanh,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_as_exact_as_float32_is(name):
    x = np.linspace(-100, 88, 40000)
    x = np.concatenate([x, x / 100, [0, -1e-30, 1e-20]]).astype(np.float32)
    network = Network((len(x),))
    network.graph.tensors["x"].shape = (1, 1, 1, len(x))
    out = network.add(Function(name, 0.3), ["x"], lambda x: x)
    network.graph.tensors[out].shape = (1, 1, 1, len(x))
    network.graph.outputs, network.graph.output_shapes = [out], [(len(x),)]
    expected = FUNCTIONS[name](x.astype(np.float64)).numpy()
    found = Engine(network.graph, threads=1)(x[None])[0]
    # A unit in the last place is 1.2e-7 of a value; the tail of gelu is a difference of numbers close to 1.
    smallest = np.where(x < -1, np.abs(x), 1e-9) if "gelu" in name else 1e-9
    assert (np.abs(found - expected) <= 6e-7 * np.maximum(np.abs(expected), smallest)).all()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_operations_on_pixels_in_their_places_and_larger_images(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    def conv(name, cout, size=(3, 3)):
        cin = network.graph.tensors[name].shape[3]
        padding = tuple(side // 2 for side in size for _ in range(2))
        kernel = rng.normal(size=(*size, cin, cout)).astype(np.float32) / np.float32(np.sqrt(cin * np.prod(size)))
        return network.conv(name, kernel, rng.normal(size=cout).astype(np.float32), padding=padding)

    def join(name, other):
        kind, activation = draw(0, 2), data.draw(st.sampled_from(["linear", "relu", "relu6"]))
        after = {"linear": tf.identity, "relu": tf.nn.relu, "relu6": tf.nn.relu6}[activation]
        if kind == 0:
            return network.add(Product(activation), [name, other], lambda a, b: after(a * b).numpy())
        if kind == 1:
            return network.add(Add(activation, subtract=True), [name, other], lambda a, b: after(a - b).numpy())
        return network.add(Add(activation), [name, other], lambda a, b: after(a + b).numpy())

    rng = np.random.default_rng(draw(0, 999))
    images = draw(1, 3)
    network = Network((draw(1, 6), draw(1, 20), draw(1, 12)))
    name, outs = "x", []
    for _ in range(draw(1, 4)):
        _, height, width, channels = network.graph.tensors[name].shape
        kind = draw(0, 6)
        if kind == 0:
            name = conv(name, draw(1, 20))
        elif kind == 1:
            function = data.draw(
                st.sampled_from(["elu", "gelu", "hard_swish", "leaky_relu", "sigmoid", "swish", "tanh"])
            )
            name = network.add(Function(function, 0.3), [name], lambda x, f=FUNCTIONS[function]: f(x).numpy())
        elif kind == 2:
            name = join(name, conv(name, channels))
        elif kind == 3:  # a squeeze
            window = Window((height, width))
            mean = network.add(Average(window), [name], lambda x: tf.reduce_mean(x, (1, 2), keepdims=True).numpy())
            name = join(name, conv(mean, channels, (1, 1)))
        elif kind == 4 and height * width < 200:
            factors, method = (draw(1, 3), draw(1, 3)), data.draw(st.sampled_from(["nearest", "bilinear"]))
            size = height * factors[0], width * factors[1]
            op = Resize(factors, method)
            name = network.add(op, [name], lambda x, s=size, m=method: tf.image.resize(x, s, m).numpy())
        elif kind == 5 and height * width < 200:
            block, channels = draw(2, 3), draw(1, 10)
            name = conv(name, block**2 * channels, (1, 1))
            name = network.add(
                DepthToSpace((block, block)), [name], lambda x, b=block: tf.nn.depth_to_space(x, b).numpy()
            )
        elif kind == 6 and min(height, width) > 2:
            top, left = draw(0, 1), draw(0, 1)
            op = DepthToSpace((1, 1), (top, 1, left, 0))
            name = network.add(op, [name], lambda x, t=top, e=left: x[:, t:-1, e:])
        outs.append(name)
    outs.append(conv(name, 8))  # needs zeros around
    outs = list(dict.fromkeys(one for one in outs if one != "x"))
    x = rng.normal(size=(images, *network.graph.inputs["x"])).astype(np.float32)
    network.check(x, *outs, threads=draw(1, 2))


def test_host_parts_of_float_networks():
    rng = np.random.default_rng(0)
    network = Network((5, 7, 3))
    scale, offset = (rng.normal(size=3).astype(np.float32) for _ in range(2))
    out = network.add(Affine(), ["x"], lambda x: x * scale + offset, [scale, offset])
    network.check(rng.normal(size=(2, 5, 7, 3)).astype(np.float32), out)


def test_a_constant_of_its_own_for_every_row_is_no_value_a_channel():
    network = Network((3, 4, 3))
    network.add(Multiply(), ["x"], lambda x: x, [np.ones((3, 1, 1), np.float32)], name="rows")
    network.graph.outputs, network.graph.output_shapes = ["rows"], [(3, 4, 3)]
    with pytest.raises(ValueError, match="layer 'rows': the CPU engine has no multiply like this"):
        Engine(network.graph)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_concatenation(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    rng = np.random.default_rng(draw(0, 999))
    height, width, images = draw(1, 9), draw(1, 12), draw(1, 2)
    network = Network((height, width, draw(1, 10)))
    tensors = ["x"]
    for _ in range(draw(2, 6)):  # parts of several wholes, twice in one, with ragged channels, of pools and of images
        names = [tensors[draw(0, len(tensors) - 1)] for _ in range(draw(1, 3))]
        name, cin = names[0], network.graph.tensors[names[0]].shape[-1]
        kind = draw(0, 2)
        if kind == 0:
            cout = data.draw(st.sampled_from([8, 16, 3, 9]))
            kernel = rng.normal(size=(3, 3, cin, cout)).astype(np.float32)
            name = network.conv(name, kernel, np.ones(cout, np.float32), padding=(1, 1, 1, 1))
        elif kind == 1:
            window = Window((3, 3), (1, 1), (1, 1, 1, 1))
            name = network.add(MaxPool(window), [name], lambda x: tf.nn.max_pool2d(x, 3, 1, "SAME").numpy())
        elif len(names) > 1:
            name = network.add(Concat(), names, lambda *parts: np.concatenate(parts, axis=3))
        tensors.append(name)
    parts = tensors[-2:]
    whole = network.add(Concat(), parts, lambda *parts: np.concatenate(parts, axis=3))
    cin = network.graph.tensors[whole].shape[-1]
    last = network.conv(whole, blocks(rng, (3, 3, cin, 8), 0.7), np.ones(8, np.float32), padding=(1, 1, 1, 1))
    x = rng.normal(size=(images, height, width, network.graph.inputs["x"][-1])).astype(np.float32)
    network.check(x, whole, last, threads=draw(1, 2))


def test_parts_of_whole_steps_are_written_in_their_places():
    rng = np.random.default_rng(0)
    network = Network((6, 6, 8))
    parts = [
        network.conv("x", rng.normal(size=(1, 1, 8, cout)).astype(np.float32), np.zeros(cout, np.float32))
        for cout in (8, 16, 10)
    ]
    whole = network.add(Concat(), parts, lambda *parts: np.concatenate(parts, axis=3))
    network.check(rng.normal(size=(2, 6, 6, 8)).astype(np.float32), whole)
    assert [one.kind for one in Engine(network.graph).profile(np.ones((1, 6, 6, 8))).layers] == [
        "load", "conv", "conv", "conv", "concat",
    ]  # fmt: skip


def test_residual_sums_are_part_of_the_convolution_and_softmax_comes_last():
    rng = np.random.default_rng(0)
    network = Network((6, 5, 16))
    bias = rng.normal(size=16).astype(np.float32)
    first = network.conv("x", blocks(rng, (1, 1, 16, 16), 0.6), bias)
    second = network.conv(first, blocks(rng, (3, 3, 16, 16), 0.6), bias, padding=(1, 1, 1, 1))
    total = network.add(Add("relu"), [first, second], lambda a, b: tf.nn.relu(a + b).numpy())
    mean = network.add(Average(Window((6, 5), (6, 5))), [total], lambda a: np.mean(a, axis=(1, 2), keepdims=True))
    last = network.add(Softmax(), [mean], lambda a: tf.nn.softmax(a).numpy())
    network.check(rng.normal(size=(11, 6, 5, 16)).astype(np.float32), last)
    engine = Engine(network.graph)
    assert [layer.name for layer in engine.profile(np.ones((1, 6, 5, 16))).layers] == ["x", "n0", "n1", "n3"]


def test_a_batch_norm_on_its_own_and_its_rectifier_are_one_operation():
    rng = np.random.default_rng(0)
    network = Network((6, 5, 11))
    factor, summand = rng.normal(size=(2, 11)).astype(np.float32)
    name = network.add(Multiply(), ["x"], lambda a: a * factor, [factor])
    name = network.add(BiasAdd(), [name], lambda a: a + summand, [summand])
    name = network.add(Relu("relu6"), [name], lambda a: tf.nn.relu6(a).numpy())
    twice = network.add(Multiply(), [name], lambda a: a * factor, [factor])
    shifted = network.add(BiasAdd(), [twice], lambda a: a + summand, [summand])
    total = network.add(Add("relu", subtract=True), [shifted, twice], lambda a, b: tf.nn.relu(a - b).numpy())
    last = network.add(Softmax(), [shifted], lambda a: tf.nn.softmax(a).numpy())
    network.check(rng.normal(size=(2, 6, 5, 11)).astype(np.float32), total, last)
    layers = Engine(network.graph).profile(np.ones((1, 6, 5, 11)), repeats=1).layers
    assert [layer.name for layer in layers] == ["x", name, twice, shifted, total]


def test_kept_blocks_only_are_stored_and_counted():
    rng = np.random.default_rng(0)
    network = Network((8, 8, 64))
    kernel = rng.normal(size=(3, 3, 64, 64)).astype(np.float32)
    network.conv("x", kernel, np.zeros(64, np.float32), padding=(1, 1, 1, 1))
    half = Network((8, 8, 64))
    kept = np.kron((np.indices((8, 8)).sum(0) % 2), np.ones((8, 8)))
    half.conv("x", (kernel * kept).astype(np.float32), np.zeros(64, np.float32), padding=(1, 1, 1, 1))
    for one in (network, half):
        one.graph.outputs, one.graph.output_shapes = ["n0"], [(8, 8, 64)]
    dense, sparse = Engine(network.graph), Engine(half.graph)
    assert sparse.weight_bytes <= 0.52 * dense.weight_bytes
    x = np.ones((2, 8, 8, 64), np.float32)
    (_, one), (_, other) = dense.profile(x, repeats=1).layers, sparse.profile(x, repeats=1).layers
    assert one.operations == one.dense_operations == other.dense_operations == 2 * other.operations
    assert one.operations == 2 * 2 * 64 * 9 * 64 * 64


def test_zero_blocks_of_a_dense_layer_after_an_image_are_not_stored():
    rng = np.random.default_rng(0)
    matrix = blocks(rng, (1, 1, 4 * 5 * 16, 24), 0.5)
    network = Network((4, 5, 16))
    out = network.conv("x", matrix.reshape(4, 5, 16, 24), np.zeros(24, np.float32))
    network.check(rng.normal(size=(2, 4, 5, 16)).astype(np.float32), out)
    (_, layer) = Engine(network.graph).profile(np.ones((1, 4, 5, 16)), repeats=1).layers
    assert layer.operations == 2 * np.count_nonzero(matrix)


def test_memory_is_shared_by_tensors_that_are_not_alive_together():
    rng = np.random.default_rng(0)
    network = Network((16, 16, 8))
    name = "x"
    for _ in range(10):
        name = network.conv(name, blocks(rng, (3, 3, 8, 8), 1), np.zeros(8, np.float32), padding=(1, 1, 1, 1))
    network.graph.outputs, network.graph.output_shapes = [name], [(16, 16, 8)]
    engine = Engine(network.graph)
    used, live = engine.memory_bytes()
    assert used == live < 3 * 4 * 8 * 500
    profile = engine.profile(np.ones((2, 16, 16, 8)), repeats=1)
    assert (profile.memory_bytes, profile.live_bytes) == engine.memory_bytes(2)
    layer, of_tensor = profile.layers[-1], 4 * 2 * 16 * 16 * 8
    assert layer.bytes == layer.weight_bytes + 2 * of_tensor and profile.layers[0].bytes == 2 * of_tensor
    console = rich.console.Console(width=200, file=io.StringIO())
    console.print(profile)
    assert f"activations take {profile.memory_bytes / 2**20:.2f} MiB" in console.file.getvalue()


def test_unknown_operations_are_refused_by_name():
    network = Network((4, 4, 3))
    network.add(SumPool(Window((2, 2))), ["x"], lambda x: x[:, 1:, 1:], name="strange")
    network.graph.outputs, network.graph.output_shapes = ["strange"], [(3, 3, 3)]
    with pytest.raises(ValueError, match="layer 'strange': the CPU engine has no sumpool"):
        Engine(network.graph)
