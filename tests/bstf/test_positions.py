import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bstf.quantization import positions
from bstf.quantization.positions import half_even, half_up, min_mse, most_common, non_overflow, percentile


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, 6),
        (0.0, 127 / 128, 7),
        (0.0, 127.4 / 128, 6),
        (-1.0, 0.0, 7),
        (-128.4 / 128, 0.0, 6),
        (-1.0, 127 / 128, 7),
        (0.0, 127.0, 0),
        (0.0, 127.5, -1),
        (-1e6, 0.0, -13),
        (0.0, 0.0, positions.ZERO_POSITION),
        (0.0, 1e-30, positions.FINEST_POSITION),
    ],
)
def test_non_overflow_is_the_finest_grid_that_clips_nothing(low, high, expected):
    assert non_overflow(low, high) == expected


@pytest.mark.parametrize(
    ("low", "high", "margin_0", "margin_half"),
    [
        (0.0, 1.0, 6, 6),
        (0.0, 127 / 128, 7, 7),
        (0.0, 127.4 / 128, 6, 7),
        (0.0, 127.5 / 128, 6, 7),
        (0.0, 127.6 / 128, 6, 6),
        (-1.0, 0.0, 7, 7),
        (-128.4 / 128, 0.0, 6, 7),
        (-128.6 / 128, 0.0, 6, 6),
        (0.0, 0.0, positions.ZERO_POSITION, positions.ZERO_POSITION),
        (0.0, 1e-30, positions.FINEST_POSITION, positions.FINEST_POSITION),
    ],
)
def test_both_rules_of_non_overflow(low, high, margin_0, margin_half):
    assert non_overflow(low, high) == margin_0
    assert non_overflow(low, high, margin=0.5) == margin_half


@given(st.floats(-1e6, 0), st.floats(0, 1e6))
def test_the_rule_with_a_margin_clips_nothing_that_is_rounded(low, high):
    position = non_overflow(low, high, margin=0.5)
    assert position >= non_overflow(low, high)
    if position not in (positions.ZERO_POSITION, positions.FINEST_POSITION):
        fits = [math.ldexp(low, p) >= -128.5 and math.ldexp(high, p) <= 127.5 for p in (position, position + 1)]
        assert fits == [True, False]


@given(st.floats(-1e6, 0), st.floats(0, 1e6))
def test_non_overflow_against_its_definition(low, high):
    position = non_overflow(low, high)
    if max(-low / 128, high / 127) == 0:  # a subnormal number counts as zero
        assert position == positions.ZERO_POSITION
        return
    fits = [math.ldexp(low, p) >= -128 and math.ldexp(high, p) <= 127 for p in (position, position + 1)]
    assert fits[0]
    assert not fits[1] or position == positions.FINEST_POSITION


def test_roundings_on_a_fine_grid():
    x = np.arange(-4, 4.25, 0.25)
    ties = x[np.abs(x) % 1 == 0.5]
    assert np.array_equal(half_up(ties), ties + 0.5)
    assert np.array_equal(half_even(ties) % 2, np.zeros_like(ties))
    for rounding in (half_up, half_even):
        rest = np.abs(x) % 1 != 0.5
        assert (np.abs(rounding(x) - x)[rest] < 0.5).all()


def test_half_up_is_the_rounding_of_the_device():
    """DPU_ROUND in C++: std::round, which takes ties away from zero, but a negative tie goes up by std::ceil."""
    x = np.arange(-4, 4.25, 0.25)
    away = np.sign(x) * np.floor(np.abs(x) + 0.5)
    device = np.where((x < 0) & (x - np.floor(x) == 0.5), np.ceil(x), away)
    assert np.array_equal(half_up(x), device)
    assert not np.array_equal(half_up(x), away)  # as TensorFlow 1 and PyTorch round weights
    assert not np.array_equal(half_up(x), np.floor(x))
    assert half_up(np.array([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])).tolist() == [-3, -2, -1, 0, 1, 2, 3, 4]
    assert half_even(np.array([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])).tolist() == [-4, -2, -2, 0, 0, 2, 2, 4]


def test_integers_saturate_and_zero_has_no_sign():
    x = np.array([-1e9, -2.0, -0.0, 0.0, -1e-9, 2.0, 1e9], np.float32)
    integers = positions.to_integers(x, 3, half_even)
    assert integers.dtype == np.float32
    assert integers.tolist() == [-128, -16, 0, 0, 0, 16, 127]
    assert not np.signbit(integers[2:5]).any()
    assert positions.to_grid(x, 3, half_even).tolist() == [-16, -2, 0, 0, 0, 2, 127 / 8]


@pytest.mark.parametrize("rounding", [half_even, half_up])
def test_min_mse_is_the_first_of_the_best_five(rounding):
    rng = np.random.default_rng(0)
    for _ in range(20):
        x = (rng.standard_t(3, size=500) * 2.0 ** rng.integers(-6, 6)).astype(np.float32)
        first = non_overflow(x.min(), x.max())
        errors = [
            np.sum((x - positions.to_grid(x.astype(np.float64), p, rounding)) ** 2) for p in range(first, first + 5)
        ]
        assert min_mse(x, rounding) == first + int(np.argmin(errors))


def test_min_mse_prefers_the_first_of_equal_errors():
    assert min_mse(np.array([0.5, -0.25]), half_even) == non_overflow(-0.25, 0.5)  # exact on every finer grid


def test_min_mse_clips_a_lone_outlier():
    x = np.append(np.linspace(-0.5, 0.5, 10_001), 0.502)
    assert min_mse(x, half_even) == non_overflow(x.min(), x.max()) + 1


def test_min_mse_of_zeros_is_clamped():
    assert min_mse(np.zeros((3, 3, 8, 8), np.float32), half_even) == positions.ZERO_POSITION


def test_min_mse_of_tiny_values_stops_at_the_finest_position():
    assert min_mse(np.array([1e-12, -1e-12]), half_up) == positions.FINEST_POSITION


def test_min_mse_of_many_chunks():
    x = np.random.default_rng(1).normal(size=(3, positions._CHUNK)).astype(np.float32)
    assert min_mse(x, half_up) == min_mse(x.T.copy(), half_up)


def test_percentile_clips_a_share_of_the_largest():
    x = np.random.default_rng(0).permutation(np.append(np.linspace(-0.95, 0.9, 9_999), [64.0]))
    assert non_overflow(x.min(), x.max()) == 0
    assert percentile(x, 99.9) == 7
    assert percentile(x, 100) == 0
    # One of ten thousand is what the default clips; one of a thousand is more.
    assert percentile(np.append(x, np.zeros(10_000))) == 7
    assert percentile(x[np.argsort(-np.abs(x))][:1000]) == 0


def test_percentile_of_a_one_sided_tensor_knows_its_side():
    assert percentile(np.linspace(0, 1, 101), 100) == 6
    assert percentile(-np.linspace(0, 1, 101), 100) == 7


def test_percentile_of_nearly_all_zeros_clips_nothing():
    x = np.zeros(100_000, np.float32)
    assert percentile(x) == positions.ZERO_POSITION
    x[7] = 3.0
    assert percentile(x) == non_overflow(0, 3)


def test_rules_of_activations_by_name():
    x = np.append(np.linspace(-0.5, 0.5, 100_001), [127.4 / 128]).astype(np.float32)
    found = {name: rule(x) for name, rule in positions.ACTIVATION_RULES.items()}
    assert found == {"min_mse": 8, "non_overflow": 6, "non_overflow_rounded": 7, "percentile": 7}


def test_most_common_takes_the_lowest_of_equally_frequent():
    assert most_common([7, 5, 5, 7, 6]) == 5
    assert most_common(iter([4])) == 4
