"""Γ against its definition: exact counts, floors, and the largest sum by exhaustive search."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bstf.selection import check_ratio, check_scope, select

GRIDS = st.tuples(st.integers(1, 12), st.integers(1, 12))
RATIOS = st.floats(0, 1, exclude_max=True)


def scores_of(shape, seed):
    """Scores of every kind: even, with ties, and with rows and columns that beat all others."""
    rng = np.random.default_rng(seed)
    kinds = [
        rng.random(shape),
        rng.integers(0, 3, shape).astype(float),
        np.outer(rng.random(shape[0]) ** 6, rng.random(shape[1]) ** 6),
        np.zeros(shape),
        rng.normal(size=shape) * 1e-30,
    ]
    return kinds[seed % len(kinds)]


@settings(max_examples=200, deadline=None)
@given(shape=GRIDS, ratio=RATIOS, least=st.integers(0, 4), seed=st.integers(0, 999))
def test_count_and_floor(shape, ratio, least, seed):
    rows, cols = shape
    scores = scores_of(shape, seed)
    gamma = select(scores, ratio, least)
    assert gamma.dtype == np.float32 and set(np.unique(gamma)) <= {0, 1}
    per_row, per_col = min(least, cols), min(least, rows)
    assert (gamma.sum(axis=1) >= per_row).all() and (gamma.sum(axis=0) >= per_col).all()
    wanted_zeros = math.floor(ratio * rows * cols + 0.5)
    fewest_kept = max(rows * per_row, cols * per_col)
    assert rows * cols - gamma.sum() == min(wanted_zeros, rows * cols - fewest_kept)
    np.testing.assert_array_equal(gamma, select(scores.copy(), ratio, least))


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    ratio=RATIOS,
    least=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_largest_sum_of_all_gammas(shape, ratio, least, seed):
    rows, cols = shape
    scores = scores_of(shape, seed)
    wanted = rows * cols - math.floor(ratio * rows * cols + 0.5)
    allowed = [
        gamma
        for bits in itertools.product((0, 1), repeat=rows * cols)
        if (gamma := np.reshape(bits, shape)).sum() >= wanted
        and (gamma.sum(axis=1) >= min(least, cols)).all()
        and (gamma.sum(axis=0) >= min(least, rows)).all()
    ]
    fewest = min(gamma.sum() for gamma in allowed)
    best = max((gamma * scores).sum() for gamma in allowed if gamma.sum() == fewest)
    chosen = select(scores, ratio, least)
    assert chosen.sum() == fewest
    assert (chosen * scores).sum() == pytest.approx(best, rel=1e-9, abs=1e-9 * np.abs(scores).max())


@given(shape=GRIDS, ratio=RATIOS, seed=st.integers(0, 99))
def test_without_floor_it_is_the_best_scores(shape, ratio, seed):
    scores = np.random.default_rng(seed).permutation(shape[0] * shape[1]).reshape(shape).astype(float)
    gamma = select(scores, ratio, min_per_line=0)
    kept, dropped = scores[gamma == 1], scores[gamma == 0]
    assert not kept.size or not dropped.size or kept.min() > dropped.max()


def test_ties_keep_the_first_blocks():
    np.testing.assert_array_equal(select(np.zeros((2, 3)), 0.5, 0), [[1, 1, 1], [0, 0, 0]])


def test_floor_costs_the_cheapest_block():
    scores = np.array([[9.0, 8.0, 7.0], [1.0, 2.0, 0.5], [6.0, 5.0, 4.0]])
    # The 5 best leave the second row empty: it gets its best block, for the worst of the others.
    np.testing.assert_array_equal(select(scores, 0.44), [[1, 1, 1], [0, 1, 0], [1, 0, 0]])


def test_dead_lines_of_a_large_layer():
    scores = np.random.default_rng(0).random((64, 128))
    scores[::2] = 0
    scores[:, :40] = 0
    gamma = select(scores, 0.9)
    assert gamma.sum() == 64 * 128 - math.floor(0.9 * 64 * 128 + 0.5)
    assert gamma.sum(axis=0).min() == 1 == gamma.sum(axis=1).min()


@pytest.mark.parametrize("ratio, zeros", [(0.25, 4), (0.5, 8), (0.75, 12), (0.99, 12), (0.0, 0), (0.03, 0), (0.04, 1)])
def test_ratio_is_the_fraction_of_zeros(ratio, zeros):
    assert (select(np.arange(16.0).reshape(4, 4), ratio) == 0).sum() == zeros


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.0, 1.5, float("nan"), "0.5", None, True])
def test_bad_ratio_is_a_sentence(ratio):
    with pytest.raises(ValueError, match=r"ratio is the fraction of zero blocks, a number in \[0, 1\)"):
        check_ratio(ratio)


@pytest.mark.parametrize("least", [-1, 1.5, None, True])
def test_bad_floor_is_a_sentence(least):
    with pytest.raises(ValueError, match="min_per_line must be an integer of at least 0"):
        select(np.ones((2, 2)), 0.5, least)


def test_unknown_scope_is_a_sentence():
    assert check_scope("layer") == "layer"
    with pytest.raises(ValueError, match=r"scope must be one of layer.*got 'model'"):
        check_scope("model")
