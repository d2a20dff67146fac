"""The fixed-point model against integer arithmetic written out independently, and what goes in and out of it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers

from bstf import batches as batches_room
from bstf.layers import MaskedConv2D, MaskedDense
from bstf.quantization import quantize
from bstf.quantization.fixed_point import (
    FixedPoint,
    FixedPointAveragePooling2D,
    FixedPointConv2D,
    FixedPointDense,
    FixedPointDepthwiseConv2D,
    FixedPointGlobalAveragePooling2D,
    average_factor,
)

# --- the integer model: every tensor is int64 with a position


def padded(x, size, strides, padding, fill):
    if padding == "valid":
        return x
    widths = [(0, 0)]
    for extent, window, stride in zip(x.shape[1:3], size, strides):
        total = max((-(-extent // stride) - 1) * stride + window - extent, 0)
        widths.append((total // 2, total - total // 2))
    return np.pad(x, [*widths, (0, 0)], constant_values=fill)


def windows(x, size, strides):
    """All windows, (n, oh, ow, c, kh, kw)."""
    view = np.lib.stride_tricks.sliding_window_view(x, size, axis=(1, 2))
    return view[:, :: strides[0], :: strides[1]]


def convolution(x, kernel, layer):
    """Grouped and dilated; the kernel of a depthwise layer is one of as many groups as channels."""
    groups, (down, across) = getattr(layer, "groups", x.shape[-1]), layer.dilation_rate
    if isinstance(layer, FixedPointDepthwiseConv2D):
        kernel = kernel.reshape(*kernel.shape[:2], 1, -1)
    spread = np.zeros([(size - 1) * step + 1 for size, step in zip(kernel.shape, (down, across, 1, 1))], np.int64)
    spread[::down, ::across] = kernel
    size = spread.shape[:2]
    view = windows(padded(x, size, layer.strides, layer.padding, 0), size, layer.strides)
    parts = zip(np.split(view, groups, axis=3), np.split(spread, groups, axis=3))
    return np.concatenate([np.einsum("nyxchw,hwco->nyxo", *part, optimize=True) for part in parts], axis=-1)


def integers_of(values, position):
    integers = np.ldexp(np.asarray(values, np.float64), position)
    assert np.array_equal(integers, np.rint(integers))
    assert integers.min(initial=0) >= -128
    assert integers.max(initial=0) <= 127
    return integers.astype(np.int64)


def compute(layer, inputs):
    """One layer: integers and position of its output. Each input is a pair (integers, position)."""
    x, position = inputs[0]
    if isinstance(layer, FixedPoint):
        cut = position - layer.position
        assert cut <= 16
        x = (2 * x + (1 << cut)) >> (cut + 1) if cut >= 0 else x << -cut
        return np.clip(x, -128, 127), layer.position
    if isinstance(layer, (FixedPointConv2D, FixedPointDense, FixedPointDepthwiseConv2D)):
        kernel = integers_of(layer.kernel, layer.kernel_position)
        shift = layer.kernel_position + position - layer.bias_position
        assert 0 <= shift <= 16
        bias = integers_of(layer.bias, layer.bias_position) << shift
        y = x @ kernel if isinstance(layer, FixedPointDense) else convolution(x, kernel, layer)
        return y + bias, position + layer.kernel_position
    if isinstance(layer, layers.ReLU):
        y = np.maximum(x, 0)
        if layer.max_value is not None:
            assert position >= -1
            y = np.minimum(y, int(6 * 2.0**position))
        return y, position
    if isinstance(layer, layers.Add):
        finest = max(p for _, p in inputs)
        return sum(values << (finest - p) for values, p in inputs), finest
    if isinstance(layer, layers.Concatenate):
        finest = max(p for _, p in inputs)
        return np.concatenate([values << (finest - p) for values, p in inputs], axis=-1), finest
    if isinstance(layer, layers.MaxPooling2D):
        lowest = np.iinfo(np.int64).min
        view = windows(padded(x, layer.pool_size, layer.strides, layer.padding, lowest), layer.pool_size, layer.strides)
        return view.max(axis=(-2, -1)), position
    if isinstance(layer, FixedPointAveragePooling2D):
        size, strides = layer.pool_size, layer.strides
        sums = windows(padded(x, size, strides, layer.padding, 0), size, strides).sum(axis=(-2, -1))
        counts = windows(padded(np.ones_like(x), size, strides, layer.padding, 0), size, strides).sum(axis=(-2, -1))
        factors = {count: average_factor(*size, count) for count in np.unique(counts).tolist()}
        most = max(bits for _, bits in factors.values())
        scale = np.vectorize(lambda count: factors[count][0] << (most - factors[count][1]))(counts)
        return sums * scale, position + most
    if isinstance(layer, FixedPointGlobalAveragePooling2D):
        n, bits = average_factor(*x.shape[1:3], x.shape[1] * x.shape[2])
        return x.sum(axis=(1, 2), keepdims=layer.keepdims) * n, position + bits
    if isinstance(layer, layers.ZeroPadding2D):
        return np.pad(x, [(0, 0), *layer.padding, (0, 0)]), position
    if isinstance(layer, layers.Reshape):
        return x.reshape(len(x), *layer.target_shape), position
    raise AssertionError(layer)


def integer_outputs(model, x):
    """Outputs of a fixed-point model by integer arithmetic, as floats; a softmax is left out."""
    tensors = {}
    for layer in model.layers:
        node = layer._inbound_nodes[0]
        if isinstance(layer, layers.InputLayer):
            position = node.output_tensors[0]._keras_history.operation._outbound_nodes[0].operation.position
            fine = np.ldexp(np.asarray(x, np.float64), position + 16)
            assert np.array_equal(fine, np.rint(fine)), "inputs of the tests have few bits"
            tensors[id(node.output_tensors[0])] = fine.astype(np.int64), position + 16
        elif isinstance(layer, layers.Softmax):
            tensors[id(node.output_tensors[0])] = tensors[id(node.input_tensors[0])]
        else:
            tensors[id(node.output_tensors[0])] = compute(layer, [tensors[id(t)] for t in node.input_tensors])
    return [np.ldexp(tensors[id(t)][0].astype(np.float64), -tensors[id(t)][1]) for t in model.outputs]


def images(rng, shape):
    """Images of few bits, beyond the grid too."""
    return (np.rint(rng.normal(size=shape) * 256) / 256).astype(np.float32)


def randomize(model, rng):
    for layer in model._flatten_layers():
        if isinstance(layer, layers.BatchNormalization):
            size = layer.gamma.shape[0]
            layer.gamma.assign(rng.uniform(-1.5, 1.5, size))
            layer.beta.assign(rng.normal(size=size))
            layer.moving_mean.assign(rng.normal(size=size))
            layer.moving_variance.assign(rng.uniform(0.2, 2, size))
        elif isinstance(layer, (MaskedConv2D, MaskedDense)):
            layer.set_gamma((rng.random(layer.gamma.shape) < rng.uniform(0.1, 1)).astype("float32"))
    return model


def assert_integer(quantised, x):
    got = keras.tree.flatten(quantised(x))
    for ours, expected in zip(got, integer_outputs(quantised, x)):
        assert np.array_equal(keras.ops.convert_to_numpy(ours), expected)


# --- random networks


def random_network(draw):
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)
    size, channels = draw(st.tuples(st.integers(3, 11), st.integers(3, 11))), draw(st.integers(1, 20))
    x = entry = keras.Input((*size, channels), name="image")
    number = 0

    def name(kind):
        nonlocal number
        number += 1
        return f"{kind}{number}"

    def conv(x, filters, kernel, strides, padding):
        block = draw(st.sampled_from([8, (4, 8), 3]))
        x = MaskedConv2D(
            filters, kernel, strides, padding, block=block, use_bias=draw(st.booleans()), name=name("conv"),
            bias_initializer="random_normal", kernel_initializer=draw(st.sampled_from(["glorot_uniform", "he_normal"])),
        )(x)  # fmt: skip
        if draw(st.booleans()):
            x = layers.BatchNormalization(name=name("norm"))(x)
        kind = draw(st.sampled_from(["none", "relu", "relu6"]))
        return x if kind == "none" else layers.Activation(kind, name=name(kind))(x)

    for _ in range(draw(st.integers(1, 4))):
        h, w, c = x.shape[1:]
        kinds = [
            "conv",
            "conv",
            "residual",
            "max",
            "average",
            "pad",
            "relu",
            "grouped",
            "depthwise",
            "separable",
            "concat",
        ]
        kind = draw(st.sampled_from(kinds))
        padding = draw(st.sampled_from(["same", "valid"]))
        limit = min(h, w) if padding == "valid" else 7
        kernel, stride = draw(st.integers(1, max(1, min(limit, 7)))), draw(st.integers(1, 3))
        dilation = draw(st.integers(1, 2)) if stride == 1 and (padding == "same" or 2 * kernel - 1 <= limit) else 1
        options = {"padding": padding, "dilation_rate": dilation, "bias_initializer": "random_normal"}
        if kind == "conv":
            x = conv(x, draw(st.integers(1, 24)), kernel, stride, padding)
        elif kind == "grouped":
            groups = draw(st.sampled_from([n for n in range(1, c + 1) if c % n == 0]))
            filters = groups * draw(st.integers(1, 4))
            x = layers.Conv2D(filters, kernel, stride, groups=groups, name=name("grouped"), **options)(x)
        elif kind == "depthwise":
            x = layers.DepthwiseConv2D(
                kernel, stride, depth_multiplier=draw(st.integers(1, 2)), name=name("dw"), **options
            )(x)
            x = layers.ReLU(6.0, name=name("relu"))(layers.BatchNormalization(name=name("norm"))(x))
        elif kind == "separable":
            x = layers.SeparableConv2D(draw(st.integers(1, 9)), kernel, stride, name=name("separable"), **options)(x)
        elif kind == "concat":
            parts = [x, conv(x, draw(st.integers(1, 9)), kernel, 1, "same"), layers.ReLU(name=name("relu"))(x)]
            x = layers.Concatenate(name=name("concat"))(parts[: draw(st.integers(2, 3))])
        elif kind == "residual":
            x = layers.Add(name=name("add"))([x, conv(x, c, kernel, 1, "same")])
        elif kind == "max":
            x = layers.MaxPooling2D(kernel, stride, padding, name=name("max"))(x)
        elif kind == "average":
            x = layers.AveragePooling2D(kernel, stride, padding, name=name("average"))(x)
        elif kind == "pad":
            x = layers.ZeroPadding2D(((1, 0), (2, 1)), name=name("pad"))(x)
        else:
            x = layers.ReLU(name=name("relu"))(x)
    head = draw(st.sampled_from(["none", "mean", "max", "flatten"]))
    if head != "none":
        x = {
            "mean": layers.GlobalAveragePooling2D(),
            "max": layers.GlobalMaxPooling2D(),
            "flatten": layers.Flatten(),
        }[head](x)
        x = MaskedDense(draw(st.integers(1, 12)), bias_initializer="random_normal", name="logits")(x)
    return randomize(keras.Model(entry, x), rng), rng


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_networks(data):
    model, rng = random_network(data.draw)
    x = images(rng, (3, *model.input_shape[1:]))
    before = [np.array(w) for w in model.get_weights()]
    quantised = quantize(model, x)

    assert_integer(quantised, x)
    assert_integer(quantised, 3 * x)  # beyond the range of the calibration
    for old, new in zip(before, model.get_weights()):
        assert np.array_equal(old, new)
    for layer in model.layers:
        if isinstance(layer, (MaskedConv2D, MaskedDense)):
            new = quantised.get_layer(layer.name)
            dead = np.asarray(new.kernel)[np.asarray(layer.masked_kernel()) == 0]
            assert not dead.view(np.uint32).any()  # zeros without a sign
            assert new.block == layer.block


# --- one network of everything


@pytest.fixture(scope="module")
def everything():
    rng = np.random.default_rng(7)
    keras.utils.set_random_seed(7)
    entry = keras.Input((15, 13, 8), name="image")
    x = layers.Conv2D(64, 5, 2, "same", activation="relu6", name="stem")(entry)
    x = layers.ZeroPadding2D(((1, 0), (0, 2)), name="pad")(x)
    y = MaskedConv2D(64, 3, use_bias=False, name="first")(x)
    y = layers.BatchNormalization(name="norm")(y)
    x = layers.MaxPooling2D(3, 1, name="max")(x)
    x = layers.Add(name="three")([x, y, y])
    a = layers.AveragePooling2D(3, 2, "same", name="average")(layers.ReLU(name="relu")(x))
    a = MaskedDense(16, activation="relu", name="dense")(layers.Flatten(name="flat")(a))
    b = layers.Conv2D(600, 3, padding="same", name="wide")(x)
    b = layers.Conv2D(16, 3, padding="same", name="deep", kernel_initializer=keras.initializers.RandomUniform())(b)
    b = layers.GlobalAveragePooling2D(keepdims=True, name="mean")(b)
    b = layers.Reshape((16,), name="vector")(layers.Conv2D(16, 1, name="point")(b))
    c = layers.Dense(16, name="other")(layers.GlobalMaxPooling2D(name="gmp")(x))
    x = layers.Dropout(0.2)(layers.Add(name="sum")([layers.Add(name="two")([a, b]), c]))
    out = layers.Dense(5, activation="softmax", name="logits")(x)
    model = randomize(keras.Model(entry, out, name="everything"), rng)
    x = images(rng, (40, 15, 13, 8))
    return model, x, quantize(model, x)


def logits(quantised):
    return keras.Model(quantised.input, quantised.get_layer("logits_grid").output)


def test_everything_is_integer_arithmetic(everything):
    _, x, quantised = everything
    assert_integer(logits(quantised), x)


def test_sums_beyond_float32_run_in_float64(everything):
    quantised = everything[2]
    accumulators = {layer.name: layer.accumulator for layer in quantised.layers if hasattr(layer, "accumulator")}
    assert {name for name, kind in accumulators.items() if kind == "float64"} == {"deep"}


def test_graph_and_xla_give_the_same_numbers(everything):
    _, x, quantised = everything
    model = logits(quantised)
    expected = np.asarray(model(x))
    assert np.array_equal(model.predict(x, batch_size=16, verbose=0), expected)
    assert np.array_equal(tf.function(model, jit_compile=True)(x), expected)


def test_quantised_is_close_to_float(everything):
    model, x, quantised = everything
    expected, got = np.asarray(model(x)), np.asarray(quantised(x))
    assert (expected.argmax(axis=1) == got.argmax(axis=1)).mean() > 0.85
    assert np.abs(expected - got).mean() < 0.05


def test_structure_and_names(everything):
    model, _, quantised = everything
    kept = {"image", "stem", "pad", "first", "max", "three", "relu", "average", "dense", "mean", "vector", "gmp", "sum"}
    names = {layer.name for layer in quantised.layers}
    assert kept <= names
    assert "norm" not in names
    assert {"image_grid", "stem_grid", "first_grid", "three_first2_grid", "three_grid", "relu_grid"} <= names
    assert "stem_relu_grid" not in names  # fused: the grid is the convolution's
    assert "max_grid" not in names
    assert quantised.get_layer("relu_grid").position == quantised.get_layer("three_grid").position
    assert quantised.get_layer("average_grid").position == quantised.get_layer("three_grid").position
    assert quantised.output_shape == model.output_shape
    assert quantised.name == model.name
    assert not quantised.trainable_weights


def test_save_and_load(everything, tmp_path):
    _, x, quantised = everything
    quantised.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert np.array_equal(loaded(x[:4]), quantised(x[:4]))


def small(**options):
    return keras.Sequential(
        [keras.Input((6, 6, 3), name="image", **options), layers.Conv2D(4, 3, name="conv"), layers.ReLU(name="relu")]
    )


def positions(model):
    return {layer.name: layer.position for layer in model.layers if isinstance(layer, FixedPoint)}


# --- calibration


class Batches(keras.utils.PyDataset):
    def __init__(self, x):
        super().__init__()
        self.x = x

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.x[4 * index : 4 * index + 4], np.zeros(4)


def test_every_form_of_calibration_gives_the_same():
    model, x = small(), images(np.random.default_rng(0), (8, 6, 6, 3))
    y = np.zeros(8)
    expected = positions(quantize(model, [x[:4], x[4:]]))
    for calibration in (
        iter([(x[:4], y[:4]), (x[4:], y[4:])]),
        tf.data.Dataset.from_tensor_slices((x, y)).batch(4),
        tf.data.Dataset.from_tensor_slices(x).batch(4).filter(lambda batch: True),
        Batches(x),
        [x[:4].astype(np.float64), keras.ops.convert_to_tensor(x[4:])],
    ):
        assert positions(quantize(model, calibration)) == expected
    whole = positions(quantize(model, x))
    assert positions(quantize(model, keras.ops.convert_to_tensor(x))) == whole
    assert positions(quantize(model, [x])) == whole


def test_large_arrays_are_taken_in_batches_and_the_most_common_position_wins(monkeypatch):
    monkeypatch.setattr(batches_room, "_BATCH", 2)
    model = small()
    x = np.full((6, 6, 6, 3), 0.9, np.float32)
    x[4:] = 100.0  # one batch of three
    assert positions(quantize(model, x))["image_grid"] == 7
    x[2:] = 100.0
    assert positions(quantize(model, x))["image_grid"] == 0


def test_pixels_need_no_clipping_at_the_input():
    x = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3)).astype(np.uint8)
    x[0, 0, 0, 0] = 255
    quantised = quantize(small(dtype="uint8"), x)
    assert positions(quantised)["image_grid"] == -2  # twos end at 254
    assert quantised.input.dtype == "float32"


def test_long_calibrations_show_progress(monkeypatch, capsys):
    monkeypatch.setattr(batches_room, "_QUIET_SECONDS", -1.0)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    x = images(np.random.default_rng(0), (4, 6, 6, 3))
    quantize(small(), x)
    assert "3/3" in capsys.readouterr().out
    quantize(small(), iter([x]))
    assert "operation" in capsys.readouterr().out


def test_long_calibrations_are_quiet_in_a_pipe(monkeypatch, capsys):
    monkeypatch.setattr(batches_room, "_QUIET_SECONDS", -1.0)
    quantize(small(), images(np.random.default_rng(0), (4, 6, 6, 3)))
    assert capsys.readouterr().out == ""


def test_short_calibrations_are_quiet(capsys):
    quantize(small(), images(np.random.default_rng(0), (4, 6, 6, 3)))
    assert capsys.readouterr().out == ""


def with_nan():
    x = np.zeros((4, 6, 6, 3), np.float32)
    x[2, 3] = np.nan
    return x


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        (np.zeros((0, 6, 6, 3)), ValueError, "no images"),
        ([], ValueError, "no images"),
        ([np.zeros((0, 6, 6, 3))], ValueError, "no images"),
        (tf.data.Dataset.from_tensor_slices(np.zeros((0, 1, 6, 6, 3))), ValueError, "no images"),
        (tf.data.Dataset.from_tensors(np.zeros((1, 6, 6, 3))).repeat(), ValueError, r"endless.*take\(8\)"),
        (with_nan(), ValueError, "NaN or infinite"),
        ([with_nan()], ValueError, "NaN or infinite"),
        (np.zeros((6, 6, 3)), ValueError, r"\(6, 6, 3\).*'image' needs batches \(n, 6, 6, 3\)"),
        (np.zeros((4, 5, 6, 3)), ValueError, r"\(4, 5, 6, 3\).*\(n, 6, 6, 3\)"),
        (np.float32(1), TypeError, "float32.*array"),
        (np.array(1.0), TypeError, "ndarray.*array"),
        (tf.data.Dataset.from_tensor_slices(np.zeros((4, 6, 6, 3))), ValueError, r"\(6, 6, 3\)"),
        (None, TypeError, "NoneType.*array"),
        ("images/", TypeError, "str.*array"),
        ({"image": np.zeros((4, 6, 6, 3))}, TypeError, "dict.*array"),
        ([{"image": np.zeros((4, 6, 6, 3))}], TypeError, "dictionaries"),
        ([["a", "b"]], TypeError, "isn't an array of images"),
    ],
)
def test_bad_calibration_is_refused(calibration, error, message):
    with pytest.raises(error, match=message):
        quantize(small(), calibration)


def test_overflow_inside_the_network_names_the_layer():
    model = keras.Sequential([keras.Input((4,), name="x")] + [layers.Dense(4, name=f"d{i}") for i in range(3)])
    for layer in model.layers:
        layer.kernel.assign(np.full((4, 4), 1e18))
    with pytest.raises(ValueError, match=r"'d2' computes NaN or infinite"):
        quantize(model, np.ones((2, 4), np.float32))


# --- options


def test_the_rule_of_activations_is_chosen_by_name():
    model = keras.Sequential([keras.Input((6, 6, 1), name="image"), layers.Conv2D(1, 1, name="conv")])
    model.get_layer("conv").kernel.assign([[[[1.0]]]])
    x = np.linspace(-0.49, 0.49, 36 * 4000, dtype=np.float32).reshape(4000, 6, 6, 1)
    x[0, 0, 0] = 127.4 / 128
    found = {
        rule: positions(quantize(model, [x], activations=rule))
        for rule in ("min_mse", "non_overflow", "non_overflow_rounded", "percentile")
    }
    assert {rule: grids["conv_grid"] for rule, grids in found.items()} == {
        "min_mse": 8,
        "non_overflow": 6,
        "non_overflow_rounded": 7,
        "percentile": 8,
    }
    assert {grids["image_grid"] for grids in found.values()} == {6}
    assert positions(quantize(model, [x])) == found["min_mse"]


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match=r"one of min_mse, non_overflow.*'minmax'"):
        quantize(small(), np.zeros((1, 6, 6, 3), np.float32), activations="minmax")


def test_equalised_channels_lose_less():
    rng = np.random.default_rng(0)
    stack = [layers.Conv2D(8, 3, name="a"), layers.ReLU(), layers.Conv2D(4, 3, name="b")]
    model = keras.Sequential([keras.Input((6, 6, 3), name="image"), *stack])
    scale = 4.0 ** np.arange(-4, 4)
    model.get_layer("a").kernel.assign(rng.normal(size=(3, 3, 3, 8)) * scale)
    model.get_layer("b").kernel.assign(rng.normal(size=(3, 3, 8, 4)) / scale[:, None])
    x = images(rng, (16, 6, 6, 3))
    errors = []
    for equalize in (False, True):
        quantised = quantize(model, x, equalize=equalize)
        assert_integer(quantised, x)
        errors.append(np.abs(np.asarray(model(x)) - quantised(x)).mean())
    assert errors[1] < errors[0] / 4


# --- corners


def test_dead_layers_and_zero_weights():
    model = keras.Sequential(
        [
            keras.Input((6, 6, 8), name="image"),
            MaskedConv2D(8, 3, bias_initializer=keras.initializers.Constant(-9), name="dead"),
            layers.ReLU(),
            MaskedConv2D(8, 3, name="zero"),
            layers.Flatten(),
            layers.Dense(3, name="d", bias_initializer="ones"),
        ]
    )
    model.get_layer("zero").set_gamma(np.zeros((1, 1)))
    x = images(np.random.default_rng(0), (4, 6, 6, 8)) / 8
    quantised = quantize(model, x)
    assert_integer(quantised, x)
    assert np.array_equal(quantised(x), np.ones((4, 3)))


def test_outputs_keep_their_structure():
    entry = keras.Input((6, 6, 3), name="image")
    a = layers.Conv2D(4, 3, name="a")(entry)
    x = images(np.random.default_rng(0), (4, 6, 6, 3))
    quantised = quantize(keras.Model(entry, {"raw": a, "relu": layers.ReLU(name="b")(a)}), x)
    result = quantised(x)
    assert np.array_equal(np.maximum(result["raw"], 0), result["relu"])
    listed = quantize(keras.Model(entry, [a, a]), x)(x)
    assert isinstance(listed, list)
    assert np.array_equal(listed[0], result["raw"])


def test_mixed_precision_and_global_settings_do_not_matter():
    x = images(np.random.default_rng(0), (4, 6, 6, 3))
    plain = small()
    expected = np.asarray(quantize(plain, x)(x))
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mixed = small()
        mixed.set_weights(plain.get_weights())
        keras.config.set_image_data_format("channels_first")
        got = quantize(mixed, x)(x)
    finally:
        keras.config.set_dtype_policy("float32")
        keras.config.set_image_data_format("channels_last")
    assert np.array_equal(got, expected)


def test_names_that_would_clash():
    entry = keras.Input((6, 6, 3), name="image")
    x = layers.Conv2D(3, 3, padding="same", name="c")(entry)
    x = layers.Conv2D(3, 3, padding="same", name="c_grid")(x)
    x = layers.Conv2D(3, 3, padding="same", name="image_grid")(x)
    data = images(np.random.default_rng(0), (2, 6, 6, 3))
    quantised = quantize(keras.Model(entry, x), data)
    assert isinstance(quantised.get_layer("c_grid"), FixedPointConv2D)
    assert_integer(quantised, data)


def test_a_quantised_model_is_not_quantised_again():
    x = images(np.random.default_rng(0), (2, 6, 6, 3))
    with pytest.raises(ValueError, match="quantised already"):
        quantize(quantize(small(), x), x)
