import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bstf.quantization.fixed_point import (
    FixedPoint,
    FixedPointAveragePooling2D,
    FixedPointConv2D,
    FixedPointDense,
    FixedPointDepthwiseConv2D,
    FixedPointGlobalAveragePooling2D,
    accumulator_type,
    average_factor,
    fake_quantize,
)


def requantise(integers, cut):
    """clip(floor(integers / 2**cut + 1/2), -128, 127), with integers only."""
    wide = integers.astype(object)
    shifted = (2 * wide + (1 << cut)) >> (cut + 1) if cut >= 0 else wide << -cut
    return np.clip(shifted, -128, 127).astype(np.int64)


def apply(layer, x):
    return keras.ops.convert_to_numpy(layer(x))


@settings(max_examples=200, deadline=None)
@given(
    position=st.integers(-8, 20),
    cut=st.integers(-8, 16),
    seed=st.integers(0, 2**32 - 1),
)
def test_fake_quantize_is_the_integer_requantisation(position, cut, seed):
    rng = np.random.default_rng(seed)
    bound = min(1 << (9 + max(cut, 0)), 1 << 24)
    integers = rng.integers(-bound, bound, size=200)
    if cut > 0:
        integers[:100] = (integers[:100] >> cut << cut) + (1 << cut - 1)  # ties
        integers[100:150] = integers[:50] - 1
    x = np.ldexp(integers.astype(np.float64), -(position + cut)).astype(np.float32)
    expected = np.ldexp(requantise(integers, cut).astype(np.float64), -position)
    assert np.array_equal(apply(FixedPoint(position), x), expected)


@pytest.mark.parametrize("position", range(-8, 21))
def test_fake_quantize_of_every_value_between_the_grid_points(position):
    integers = np.arange(-(1 << 15) - 300, (1 << 15) + 300)
    x = np.ldexp(integers.astype(np.float32), -(position + 8))
    expected = np.ldexp(requantise(integers, 8).astype(np.float64), -position)
    assert np.array_equal(apply(FixedPoint(position), x), expected)


def test_fake_quantize_of_other_backends_equals_the_operation(monkeypatch):
    x = np.random.default_rng(0).normal(size=20_000).astype(np.float32) * 4
    x = np.append(x, np.float32(0.499999970197678 * 2.0**-4))  # just below a tie
    expected = np.asarray(fake_quantize(x, 4))
    monkeypatch.setattr(keras.backend, "backend", lambda: "another")
    assert np.array_equal(np.asarray(fake_quantize(keras.ops.convert_to_tensor(x), 4)), expected)


def test_sums_that_float32_cannot_hold_saturate_alike():
    # What the cast of a float64 sum to float32 may round is far outside of the grid.
    sums = np.array([(1 << 24) + 1, (1 << 25) - 1, -(1 << 24) - 1, 255 * (1 << 15) - 1, 255 * (1 << 15)])
    x = np.ldexp(sums.astype(np.float64), -16).astype(np.float32)
    assert apply(FixedPoint(0), x).tolist() == requantise(sums, 16).tolist() == [127, 127, -128, 127, 127]


def test_accumulator_type_at_the_limit():
    assert accumulator_type((1 << 24) - 1) == "float32"
    assert accumulator_type(1 << 24) == "float64"


@pytest.mark.parametrize(
    ("window", "count", "expected"),
    [
        ((3, 3), 9, (7, 6)),
        ((5, 5), 25, (10, 8)),
        ((6, 6), 36, (7, 8)),
        ((7, 7), 49, (21, 10)),
        ((14, 14), 196, (21, 12)),
        ((2, 2), 4, (1, 2)),
        ((4, 4), 16, (1, 4)),
        ((8, 8), 64, (1, 6)),
        ((1, 1), 1, (1, 0)),
        ((1, 9), 9, (57, 9)),  # the rule, as not square
        ((3, 3), 6, (85, 9)),
    ],
)
def test_average_factor(window, count, expected):
    assert average_factor(*window, count) == expected


def test_average_factor_by_exhaustion():
    for count in (6, 10, 11, 12, 15, 21, 35, 63, 100, 1000):
        candidates = [
            (abs(n / 2**m - 1 / count), m, n)
            for m in range(7 + math.ceil(math.log2(count)))
            for n in range(1, 2**m // count + 2)
        ]
        _, m, n = min(candidates)
        assert average_factor(1, count, count) == (n, m)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(("size", "stride"), [((3, 3), 1), ((3, 3), 2), ((2, 5), 3), ((7, 7), 1), ((1, 1), 2)])
def test_average_pooling_counts_valid_elements(padding, size, stride):
    rng = np.random.default_rng(0)
    integers = rng.integers(-128, 128, size=(2, 9, 11, 3))
    layer = FixedPointAveragePooling2D(size, stride, padding)
    got = apply(layer, np.ldexp(integers.astype(np.float32), -5))
    ones = keras.layers.AveragePooling2D(size, stride, padding)
    assert (
        got.shape
        == tuple(ones.compute_output_shape(integers.shape))
        == tuple(layer.compute_output_shape(integers.shape))
    )
    before = [0, 0]
    if padding == "same":
        before = [max((o - 1) * stride + k - n, 0) // 2 for o, k, n in zip(got.shape[1:3], size, (9, 11))]
    for row in range(got.shape[1]):
        for column in range(got.shape[2]):
            top, left = row * stride - before[0], column * stride - before[1]
            window = integers[:, max(top, 0) : top + size[0], max(left, 0) : left + size[1]]
            n, m = average_factor(*size, window.shape[1] * window.shape[2])
            expected = np.ldexp(window.sum(axis=(1, 2)).astype(np.float64) * n, -5 - m)
            assert np.array_equal(got[:, row, column], expected)


@pytest.mark.parametrize("keepdims", [False, True])
def test_global_average_pooling(keepdims):
    integers = np.random.default_rng(0).integers(-128, 128, size=(2, 7, 7, 4))
    got = apply(FixedPointGlobalAveragePooling2D(keepdims=keepdims), np.ldexp(integers.astype(np.float32), -3))
    assert np.array_equal(got, integers.sum(axis=(1, 2), keepdims=keepdims) * 21 / 2**13)


def test_largest_exact_average():
    x = np.full((1, 32, 32, 1), -128, np.float32)
    x[0, 0, 0] = -127
    assert apply(FixedPointGlobalAveragePooling2D(), x).item() == -128 + 1 / 1024


def test_averages_of_too_many_elements_are_refused():
    with pytest.raises(ValueError, match=r"'wide'.*3600 elements.*two poolings"):
        FixedPointGlobalAveragePooling2D(name="wide")(np.zeros((1, 60, 60, 1), np.float32))
    FixedPointGlobalAveragePooling2D()(np.zeros((1, 64, 64, 1), np.float32))


def test_unequal_strides_are_refused():
    with pytest.raises(ValueError, match=r"'pool'.*\(2, 1\)"):
        FixedPointAveragePooling2D(2, (2, 1), name="pool")


def layers_of_every_kind():
    return [
        FixedPoint(-3, name="grid"),
        FixedPointConv2D(
            4,
            3,
            strides=2,
            padding="same",
            kernel_position=8,
            bias_position=9,
            block=(8, 4),
            accumulator="float64",
        ),
        FixedPointDense(4, kernel_position=3, bias_position=2),
        FixedPointDepthwiseConv2D(3, depth_multiplier=2, dilation_rate=2, kernel_position=3, bias_position=2),
        FixedPointAveragePooling2D(3, 2, "same"),
        FixedPointGlobalAveragePooling2D(keepdims=True),
    ]


@pytest.mark.parametrize("layer", layers_of_every_kind(), ids=lambda layer: type(layer).__name__)
def test_config_round_trip(layer):
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(copy) is type(layer)
    assert copy.get_config() == layer.get_config()
    assert copy.compute_dtype == "float32"


def test_layers_stay_in_float32_under_any_policy():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        assert {layer.compute_dtype for layer in layers_of_every_kind()} == {"float32"}
    finally:
        keras.config.set_dtype_policy("float32")


def test_float64_sums_are_exact_where_float32_is_not():
    cin = 70_000
    positions = {"kernel_position": 0, "bias_position": 0}
    x = np.full((1, cin), 127, np.float32)
    kernel = np.full((cin, 1), 127, np.float32)
    kernel[cin // 2 :] = -127
    kernel[-1] = -126
    layer = FixedPointDense(1, accumulator="float64", **positions)
    layer.build((None, cin))
    layer.kernel.assign(kernel)
    layer.bias.assign([1.0])
    assert apply(layer, x).item() == 128.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accumulator": "int32"}, "'float32' or 'float64'"),
        ({"use_bias": False}, "needs a bias and a linear activation"),
        ({"activation": "relu"}, "needs a bias and a linear activation"),
        ({"block": 0}, "block"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        FixedPointConv2D(4, 3, kernel_position=1, bias_position=1, **arguments)
