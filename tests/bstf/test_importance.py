"""Scores against their formulas, block by block."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

import bstf
from bstf.blocks import BlockShape
from bstf.importance import CRITERIA, STATISTICS, block_scores, get, model_scores
from bstf.places import eligible
from bstf.selection import select

BLOCK = BlockShape(8, 8)
FORMULAS = {
    "l1": lambda w: np.abs(w).sum(),
    "l2": np.linalg.norm,
    "variance": lambda w: ((w - w.mean()) ** 2).mean(),
}
DATA_FORMULAS = {
    "taylor": lambda w, s: abs((w * s).sum()),
    "wanda": lambda w, s: (np.abs(w) * s).sum(),
    "fisher": lambda w, s: (w**2 * s).sum(),
    "hessian": lambda w, s: (w**2 * s).sum() / 2,
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("shape", [(3, 3, 16, 24), (12, 20), (1, 1, 9, 8)])
def test_formula(name, shape):
    kernel = np.random.default_rng(0).normal(0.3, 1, shape).astype("float32")
    scores = block_scores(kernel, BLOCK, name)
    assert scores.shape == (-(-shape[-2] // 8), -(-shape[-1] // 8))
    for r, c in np.ndindex(scores.shape):
        volume = kernel[..., 8 * r : 8 * r + 8, 8 * c : 8 * c + 8].astype("float64")
        assert scores[r, c] == pytest.approx(FORMULAS[name](volume.ravel()), rel=1e-9)


def test_tensor_variance_is_about_the_mean_of_the_whole_kernel():
    kernel = np.random.default_rng(0).normal(0.3, 1, (3, 3, 16, 20))
    kernel[..., :8, :8] = 5.0  # no variance of its own, far from the mean
    own, whole = (block_scores(kernel, BLOCK, name) for name in ("variance", "tensor_variance"))
    for r, c in np.ndindex(whole.shape):
        volume = kernel[..., 8 * r : 8 * r + 8, 8 * c : 8 * c + 8]
        assert whole[r, c] == pytest.approx(np.mean((volume - kernel.mean()) ** 2), rel=1e-9)
    assert own.argmin() == 0 == whole.argmax()


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(DATA_FORMULAS)),
    cin=st.integers(1, 9),
    cout=st.integers(1, 9),
    taps=st.sampled_from([(), (1, 1), (3, 2)]),
    block=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 99),
)
def test_formula_with_a_statistic(name, cin, cout, taps, block, seed):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(*taps, cin, cout))
    statistic = rng.normal(size=(cin,) if name == "wanda" else kernel.shape)
    scores = block_scores(kernel, BlockShape(*block), name, statistic=statistic)
    weights = np.broadcast_to(statistic[:, None], kernel.shape) if name == "wanda" else statistic
    bi, bo = block
    for r, c in np.ndindex(scores.shape):
        volume = (..., slice(bi * r, bi * r + bi), slice(bo * c, bo * c + bo))
        assert scores[r, c] == pytest.approx(DATA_FORMULAS[name](kernel[volume], weights[volume]), rel=1e-9, abs=1e-12)


def test_a_block_of_zeros_is_never_worth_more_than_another():
    kernel, diagonal = np.ones((8, 24)), -np.ones((8, 24))
    kernel[:, :8] = 0
    diagonal[:, 16:] = -2
    np.testing.assert_array_equal(block_scores(kernel, BLOCK, "hessian", statistic=diagonal), [[-64, -32, -64]])


def network():
    keras.utils.set_random_seed(0)
    inner = keras.Sequential(
        [keras.Input((6, 6, 8)), layers.Conv2D(16, 3, activation="relu", name="conv")], name="inner"
    )
    inputs = keras.Input((6, 6, 8))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(24, 3, activation="relu", name="last")(inner(inputs)))
    model = keras.Model(inputs, layers.Dense(10, activation="softmax", name="class")(x))
    model.compile("sgd", "sparse_categorical_crossentropy")
    rng = np.random.default_rng(0)
    return model, (rng.normal(size=(12, 6, 6, 8)).astype("float32"), rng.integers(0, 10, 12))


@pytest.mark.parametrize("name", STATISTICS)
def test_data_change_the_ranking_inside_a_layer(name):
    """A factor that is the same for a whole layer, such as its largest gradient, would leave l2's ranking."""
    model, data = network()
    block = BlockShape(4, 4)
    scores = model_scores(model, eligible(model, block), block, name, data=data)
    by_size = model_scores(model, eligible(model, block), block, "l2")
    for path in ("inner/conv", "last", "class"):
        assert not np.array_equal(np.argsort(scores[path], axis=None), np.argsort(by_size[path], axis=None)), path
        assert not np.allclose(scores[path] / by_size[path] ** 2, (scores[path] / by_size[path] ** 2)[0, 0]), path


@pytest.mark.parametrize("name", ["taylor", "fisher", "hessian"])
def test_second_order_prefers_small_weights_that_matter(name):
    """Channels 0-7 carry the data; the weights of 8-15 are ten times as large, and their inputs almost nothing."""
    model = keras.Sequential([keras.Input((16,)), layers.Dense(8, use_bias=False, name="d")])
    rng = np.random.default_rng(0)
    model.get_layer("d").kernel.assign(np.concatenate([np.full((8, 8), 0.1), np.ones((8, 8))]))
    x = np.concatenate([1 + rng.random((20, 8)), 1e-4 * rng.random((20, 8))], axis=1)
    y = np.zeros((20, 8))
    sized, informed = (
        bstf.sparsify(model, ratio=0.5, importance=one, min_per_line=0, data=(x, y), loss="mse") for one in ("l2", name)
    )
    assert np.asarray(sized.get_layer("d").gamma).ravel().tolist() == [0, 1]
    assert np.asarray(informed.get_layer("d").gamma).ravel().tolist() == [1, 0]


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_sparsify_keeps_what_the_scores_say(name):
    model, data = network()
    scores = model_scores(model, eligible(model, BLOCK), BLOCK, name, data=data, seed=3)
    batches = iter([(data[0][:7], data[1][:7]), (data[0][7:], data[1][7:])]) if name != "hessian" else data
    sparse = bstf.sparsify(model, ratio=0.5, importance=name, data=batches, seed=3)
    for path, layer in eligible(sparse, BLOCK):
        np.testing.assert_array_equal(np.asarray(layer.gamma), select(scores[path], 0.5), path)
    assert sum((np.asarray(layer.gamma) == 0).sum() for _, layer in eligible(sparse, BLOCK)) > 0


def test_sparsify_again_with_data_lets_nothing_come_back():
    model, data = network()
    once = bstf.sparsify(model, 4, 0.4, importance="hessian", data=data)
    twice = bstf.sparsify(once, 4, 0.6, importance="hessian", data=data, loss="sparse_categorical_crossentropy")
    for path, layer in eligible(twice, BlockShape(4, 4)):
        before = np.asarray(dict(eligible(once, BlockShape(4, 4)))[path].gamma)
        assert (np.asarray(layer.gamma) <= before).all(), path


def test_criteria_order_differently():
    kernel = np.zeros((8, 24))
    kernel[:, :8] = 1.0  # large sum, no variance
    kernel[0, 8:16] = 5.0  # large norm
    l1, l2, variance = (block_scores(kernel, BLOCK, name)[0] for name in ("l1", "l2", "variance"))
    assert l1[0] > l1[1] and l2[0] < l2[1] and variance[0] == variance[2] == 0 < variance[1]


def test_callable_gets_kernel_and_block():
    seen = []

    def outer_sum(kernel, block):
        seen.append((kernel.shape, block))
        return [[1, 2]]

    scores = block_scores(np.ones((8, 16)), BLOCK, outer_sum)
    assert seen == [((8, 16), BLOCK)] and scores.dtype == np.float64
    np.testing.assert_array_equal(scores, [[1, 2]])


def test_errors_are_sentences():
    with pytest.raises(ValueError, match=r"one of l1, l2, variance, .*hessian, or a callable.*got 'L7'"):
        get("L7")
    with pytest.raises(ValueError, match="importance must be"):
        get(None)
    with pytest.raises(ValueError, match=r"layer 'c1' must be one score a block, shape \(1, 2\)"):
        block_scores(np.ones((8, 16)), BLOCK, lambda kernel, block: kernel, "c1")
    with pytest.raises(ValueError, match="layer 'c1' has a score that is NaN"):
        block_scores(np.ones((8, 16)), BLOCK, lambda kernel, block: [[1, np.nan]], "c1")
    with pytest.raises(ValueError, match=r"importance='fisher' compares blocks by what they do on data: give data="):
        block_scores(np.ones((8, 16)), BLOCK, "fisher")
    model, data = network()
    with pytest.raises(ValueError, match=r"importance='wanda' compares blocks by what they do on data"):
        bstf.sparsify(model, importance="wanda")
    with pytest.raises(ValueError, match="data holds no examples"):
        bstf.sparsify(model, importance="taylor", data=[])
    with pytest.raises(ValueError, match="has a score that is NaN or infinite"):
        # Finite, with an infinite slope.
        bstf.sparsify(model, importance="taylor", data=data, loss=lambda y, p: keras.ops.sqrt(p * 0))
