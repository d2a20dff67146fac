"""Γ against its definition: exact counts, floors, and the largest sum by exhaustive search."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bstf.selection import SCOPES, check_ratio, check_scope, comparable, layer_ratios, select, select_all

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
    assert [check_scope(scope) for scope in SCOPES] == ["layer", "global", "column", "row"]
    with pytest.raises(ValueError, match=r"scope must be one of layer, global, column, row.*got 'model'"):
        check_scope("model")
    with pytest.raises(ValueError, match="use select_all"):
        select(np.ones((2, 2)), 0.5, scope="global")


def best_sum(scores, least, alive, counts_fit):
    """The fewest blocks and the largest sum of all Γ that fill the lines, by trying every one."""
    floors = [np.minimum(alive.sum(axis=axis), least) for axis in (1, 0)]
    allowed = [
        gamma
        for bits in itertools.product((0, 1), repeat=scores.size)
        if (gamma := np.reshape(bits, scores.shape)).sum() == (gamma * alive).sum()
        and counts_fit(gamma)
        and (gamma.sum(axis=1) >= floors[0]).all()
        and (gamma.sum(axis=0) >= floors[1]).all()
    ]
    fewest = min((gamma.sum() for gamma in allowed), default=None)
    return fewest, max(((gamma * scores).sum() for gamma in allowed if gamma.sum() == fewest), default=None)


SMALL = st.tuples(st.integers(1, 4), st.integers(1, 3))


@settings(max_examples=120, deadline=None)
@given(shape=SMALL, ratio=RATIOS, least=st.integers(0, 3), seed=st.integers(0, 999), dead=st.floats(0, 0.8))
def test_the_dead_stay_dead_and_the_sum_is_the_largest(shape, ratio, least, seed, dead):
    scores = scores_of(shape, seed)
    alive = np.random.default_rng(seed).random(shape) >= dead
    gamma = select(scores, ratio, least, previous=alive.astype("float32"))
    assert not gamma[~alive].any()
    wanted = min(scores.size - math.floor(ratio * scores.size + 0.5), alive.sum())
    fewest, best = best_sum(scores, least, alive, lambda gamma: gamma.sum() >= wanted)
    assert gamma.sum() == fewest
    assert (gamma * scores).sum() == pytest.approx(best, rel=1e-9, abs=1e-9 * np.abs(scores).max())


@settings(max_examples=120, deadline=None)
@given(
    shape=SMALL,
    ratio=RATIOS,
    least=st.integers(0, 3),
    seed=st.integers(0, 999),
    scope=st.sampled_from(["column", "row"]),
)
def test_even_columns_of_the_largest_sum(shape, ratio, least, seed, scope):
    scores = scores_of(shape, seed)
    gamma = select(scores, ratio, least, scope=scope)
    assert gamma.shape == shape and gamma.dtype == np.float32
    if scope == "row":
        scores, gamma = scores.T, gamma.T
    rows = len(scores)
    counts = set(gamma.sum(axis=0))
    assert len(counts) == 1
    wanted = rows - math.floor(ratio * rows + 0.5)
    fits = lambda one: len(set(one.sum(axis=0))) == 1 and one.sum(axis=0)[0] >= wanted  # noqa: E731
    fewest, best = best_sum(scores, least, np.ones(scores.shape, bool), fits)
    assert gamma.sum() == fewest
    assert (gamma * scores).sum() == pytest.approx(best, rel=1e-9, abs=1e-9 * np.abs(scores).max())


@settings(max_examples=60, deadline=None)
@given(shape=GRIDS, least=st.integers(0, 3), seed=st.integers(0, 99), scope=st.sampled_from(["layer", "column", "row"]))
def test_ratios_that_grow_only_take_away(shape, least, seed, scope):
    previous = None
    for ratio in (0.1, 0.4, 0.3, 0.7, 0.9):
        gamma = select(scores_of(shape, seed + round(10 * ratio)), ratio, least, scope=scope, previous=previous)
        per_row, per_col = min(least, shape[1]), min(least, shape[0])
        assert (gamma.sum(axis=1) >= per_row).all() and (gamma.sum(axis=0) >= per_col).all()
        assert previous is None or (gamma <= previous).all()
        previous = gamma


@settings(max_examples=200, deadline=None)
@given(shape=GRIDS, least=st.integers(0, 3), seed=st.integers(0, 99), scope=st.sampled_from(["layer", "column", "row"]))
def test_lasting_selections_reach_every_ratio(shape, least, seed, scope):
    previous, ratios = None, (0.2, 0.5, 0.6, 0.7, 0.99)
    for step, ratio in enumerate(ratios):
        scores = scores_of(shape, seed + step)
        gamma = select(scores, ratio, least, scope=scope, previous=previous, lasting=True)
        assert previous is None or (gamma <= previous).all()
        assert gamma.sum() == select(scores, ratio, least, scope=scope).sum()
        previous = gamma


def test_a_selection_that_could_not_go_on_is_not_taken():
    """The four best blocks fill all lines, but each is alone in its row or column: none could go later."""
    star = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    scores = star + np.array([[0.1, 0, 0], [0, 0, 0.2], [0, 0.3, 0]])
    np.testing.assert_array_equal(select(scores, 0.55), star)
    lasting = select(scores, 0.55, lasting=True)
    assert lasting.sum() == 4
    at_the_end = select(scores, 0.99, previous=lasting)
    assert at_the_end.sum() == 3 and (at_the_end <= lasting).all()
    assert (at_the_end * scores).sum() == (select(scores, 0.99) * scores).sum()


def test_previous_of_another_shape_is_a_sentence():
    with pytest.raises(ValueError, match=r"previous is a Γ of shape \(2, 3\), but the scores are \(3, 2\)"):
        select(np.ones((3, 2)), 0.5, previous=np.ones((2, 3)))


@settings(max_examples=60, deadline=None)
@given(shapes=st.lists(GRIDS, min_size=1, max_size=4), ratio=RATIOS, least=st.integers(0, 3), seed=st.integers(0, 99))
def test_global_counts_and_floors(shapes, ratio, least, seed):
    scores = {str(i): scores_of(shape, seed + i) for i, shape in enumerate(shapes)}
    gammas = select_all(scores, ratio, least, scope="global")
    blocks = sum(one.size for one in scores.values())
    fewest = sum(max(r * min(least, c), c * min(least, r)) for r, c in shapes)
    assert sum(gamma.sum() for gamma in gammas.values()) == max(blocks - math.floor(ratio * blocks + 0.5), fewest)
    for (rows, cols), gamma in zip(shapes, gammas.values()):
        assert (gamma.sum(axis=1) >= min(least, cols)).all() and (gamma.sum(axis=0) >= min(least, rows)).all()


def test_global_keeps_the_best_of_all_layers():
    rng = np.random.default_rng(0)
    scores = {"weak": rng.random((6, 6)), "strong": 3 * rng.random((6, 8)), "dead": np.zeros((4, 4))}
    gammas = select_all(scores, 0.5, 0, scope="global")
    kept = np.concatenate([scores[name][gammas[name] == 1] for name in scores])
    dropped = np.concatenate([scores[name][gammas[name] == 0] for name in scores])
    assert kept.min() > dropped.max() and not gammas["dead"].any()
    floored = select_all(scores, 0.5, 1, scope="global")
    assert floored["dead"].sum() == 4 and sum(gamma.sum() for gamma in floored.values()) == len(kept)
    previous = {"strong": np.eye(6, 8)}
    after = select_all(scores, 0.5, 0, scope="global", previous=previous)
    assert (after["strong"] <= previous["strong"]).all() and sum(gamma.sum() for gamma in after.values()) == 50


def test_comparable_scores_know_no_scale():
    rng = np.random.default_rng(0)
    scores = {"a": rng.random((3, 4)), "b": rng.random((5, 2)), "zeros": np.zeros((2, 2))}
    scaled = {name: one * factor for (name, one), factor in zip(scores.items(), (1e-6, 9.0, 1.0))}
    for name, one in comparable(scaled).items():
        np.testing.assert_allclose(one, comparable(scores)[name], rtol=1e-12)
    assert comparable({"a": np.array([[0.0, 2.0, 6.0]])})["a"].tolist() == [[0, 0.5, 1.5]]


def test_a_ratio_for_each_layer():
    names = ["stem", "block1/conv", "block2/conv", "head"]
    found = layer_ratios(names, {"stem": 0.25, "block2/.*": 0.5, "conv": 0.75, ".*": 0.1})
    assert found == {"stem": 0.25, "block1/conv": 0.75, "block2/conv": 0.5, "head": 0.1}
    assert layer_ratios(names, {"head": 0.5}) == {"stem": 0, "block1/conv": 0, "block2/conv": 0, "head": 0.5}
    scores = {name: np.random.default_rng(0).random((4, 5)) for name in names}
    gammas = select_all(scores, found, scope="column")
    assert [int((gamma == 0).sum()) for gamma in gammas.values()] == [5, 15, 10, 0]
    with pytest.raises(ValueError, match=r"'haed' \(did you mean 'head'\?\), which matches no layer"):
        layer_ratios(names, {"haed": 0.5})
    with pytest.raises(ValueError, match="matches no layer that can be made sparse; they are stem, block1/conv"):
        layer_ratios(names, {"xyzzy42": 0.5})
    with pytest.raises(ValueError, match=r"'\(', which isn't a regular expression"):
        layer_ratios(names, {"(": 0.5})
    with pytest.raises(ValueError, match="ratio is the fraction of zero blocks"):
        layer_ratios(names, {"head": 1.0})
    with pytest.raises(ValueError, match="give a number, or another scope"):
        select_all(scores, found, scope="global")


def test_many_short_lines_of_a_large_layer_take_little_time():
    """A search over all blocks for each short line takes 40 s here."""
    rng = np.random.default_rng(0)
    scores = np.outer(rng.random(3136) ** 6, rng.random(512) ** 6) * rng.random((3136, 512))
    start = time.process_time()
    gamma = select(scores, 0.5)
    assert time.process_time() - start < 5
    assert gamma.sum() == scores.size / 2 and gamma.sum(axis=0).min() == 1 == gamma.sum(axis=1).min()
    best = np.zeros(scores.size, dtype=bool)
    best[np.argsort(-scores, axis=None)[: scores.size // 2]] = True
    best = best.reshape(scores.shape)
    assert (best.sum(axis=1) == 0).sum() > 400 and (best.sum(axis=0) == 0).sum() > 50
