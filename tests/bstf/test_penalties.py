"""Penalties against NumPy and SciPy, their gradients against finite differences."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime
from scipy.special import logsumexp

import bstf
from bstf.penalties import BoxedGammaRange, BoxedGammaRatio, GammaRange, GroupLasso, smooth_max, smooth_min

ARGUMENTS = {"ratio": 0.25, "beta": 0.01, "iota": 0.02, "alpha": 30.0, "strength": 0.5}
T = 0.75 * 12


def soft_max(x):
    return logsumexp(30.0 * x) / 30.0


def common(gamma):
    return 0.01 * (gamma.sum() - T) ** 2 + 0.02 * np.abs(gamma).sum()


def box(gamma):
    return sum(soft_max(np.array([-one, 0.0])) + soft_max(np.array([one - 1, 0.0])) for one in gamma.ravel())


def equation_13(gamma):
    return 0.5 * (-(soft_max(gamma) + soft_max(-gamma)) + common(gamma))


def equation_14(gamma):
    return 0.5 * (box(gamma) - (soft_max(gamma) + soft_max(-gamma)) + common(gamma))


def equation_15(gamma, sign=-1):
    return 0.5 * (box(gamma) + sign * -soft_max(-gamma) / soft_max(gamma) + common(gamma))


PENALTIES = {
    "13": (GammaRange(**ARGUMENTS), equation_13),
    "14": (BoxedGammaRange(**ARGUMENTS), equation_14),
    "15": (BoxedGammaRatio(**ARGUMENTS), equation_15),
    "15 reversed": (BoxedGammaRatio(**ARGUMENTS, sign=1), lambda gamma: equation_15(gamma, 1)),
}


def value_and_gradient(penalty, x):
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = penalty(x)
    return float(value), tape.gradient(value, x).numpy()


@pytest.mark.parametrize("name", PENALTIES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), size=st.sampled_from([0.3, 1.0, 5.0]))
def test_equations_and_gradients(name, seed, size):
    penalty, formula = PENALTIES[name]
    gamma = 0.5 + size * np.random.default_rng(seed).uniform(-0.4, 1.0, (3, 4))
    value, gradient = value_and_gradient(penalty, gamma)
    assert value == pytest.approx(formula(gamma), rel=1e-9, abs=1e-9)
    numeric = approx_fprime(gamma.ravel(), lambda x: formula(x.reshape(3, 4)), 1e-7)
    np.testing.assert_allclose(gradient.ravel(), numeric, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, -1e4, 1e4])
def test_nothing_overflows(value):
    gamma = np.full((3, 4), value, "float32")
    for penalty in (GammaRange(), BoxedGammaRange(), BoxedGammaRatio(), BoxedGammaRatio(sign=1)):
        found, gradient = value_and_gradient(penalty, gamma)
        assert np.isfinite(found) and np.isfinite(gradient).all()


@pytest.mark.parametrize("penalty", [BoxedGammaRange(0.25, 0.1, 0.0), BoxedGammaRatio(0.25, 0.1, 0.0, sign=1)])
def test_alone_a_penalty_pulls_gamma_apart_and_meets_the_number(penalty):
    gamma = np.random.default_rng(0).uniform(0.4, 0.6, (3, 4))
    for _ in range(80):
        gamma = gamma - 0.03 * value_and_gradient(penalty, gamma)[1]
    assert gamma.min() < 0.1 and gamma.max() > 0.8
    assert gamma.sum() == pytest.approx(T, abs=0.7)


def test_equation_15_as_printed_leaves_gamma_alike():
    gamma = np.random.default_rng(0).uniform(0.4, 0.6, (3, 4))
    for _ in range(80):
        gamma = gamma - 0.03 * value_and_gradient(BoxedGammaRatio(0.25, 0.1, 0.0), gamma)[1]
    assert np.ptp(gamma) < 0.15


def test_smooth_maximum_is_near_the_maximum():
    x = np.random.default_rng(0).normal(size=(5, 6))
    assert x.max() <= smooth_max(x, 100.0) <= x.max() + np.log(30) / 100
    assert x.min() >= smooth_min(x, 100.0) >= x.min() - np.log(30) / 100


@pytest.mark.parametrize("penalty", [*(one for one, _ in PENALTIES.values()), GroupLasso(0.5, block=(8, 4))])
def test_penalties_are_saved(penalty):
    again = keras.regularizers.deserialize(keras.regularizers.serialize(penalty))
    assert type(again) is type(penalty) and again.get_config() == penalty.get_config()
    x = np.random.default_rng(0).uniform(size=(3, 4)).astype("float32")
    assert float(again(x)) == float(penalty(x))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from([(), (3, 3), (5,), (1, 2, 3)]),
    cin=st.integers(1, 19),
    cout=st.integers(1, 19),
    block=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_group_lasso_equals_a_loop(shape, cin, cout, block):
    kernel = np.random.default_rng(cin).normal(size=(*shape, cin, cout))
    blocks = [
        kernel[..., i : i + block[0], j : j + block[1]]
        for i in range(0, cin, block[0])
        for j in range(0, cout, block[1])
    ]
    value, gradient = value_and_gradient(GroupLasso(0.1, block), kernel)
    assert value == pytest.approx(0.1 * sum(np.sqrt(b.size) * np.linalg.norm(b) for b in blocks), rel=1e-9)
    last = np.sqrt(blocks[-1].size) * blocks[-1] / np.linalg.norm(blocks[-1])
    found = gradient[..., (cin - 1) // block[0] * block[0] :, (cout - 1) // block[1] * block[1] :]
    np.testing.assert_allclose(found, 0.1 * last, rtol=1e-9)


def test_group_lasso_of_zero_blocks_has_a_finite_gradient():
    kernel = np.ones((3, 3, 16, 12), "float32")
    kernel[:, :, :8, 8:] = 0.0
    value, gradient = value_and_gradient(GroupLasso(1.0), kernel)
    assert value == pytest.approx(9 * (64 + 64 + 32))
    assert np.isfinite(gradient).all() and not gradient[:, :, :8, 8:].any() and gradient[:, :, 8:, 8:].all()


def test_group_lasso_empties_the_blocks_that_the_labels_do_not_need():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 16)).astype("float32")
    true = np.zeros((16, 12), "float32")
    true[:8, :8] = rng.normal(size=(8, 8))
    true[8:, 8:] = rng.normal(size=(8, 4))
    noisy = x @ true + rng.normal(size=(512, 12)).astype("float32")
    dense = keras.Sequential([keras.Input((16,)), keras.layers.Dense(12, use_bias=False, name="d")])
    norms = {}
    for strength in (0.0, 0.05):
        model = bstf.sparsify(dense, ratio=0, group_lasso=strength)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(x, noisy, epochs=12, batch_size=32, verbose=0)
        kernel = model.get_layer("d").kernel.numpy()
        norms[strength] = np.linalg.norm(kernel[:8, 8:]), np.linalg.norm(kernel[:8, :8])
        assert bstf.sparsify(model, ratio=0.5).get_layer("d").group_lasso == 0
    assert norms[0.05][0] < 0.2 * norms[0.0][0] and norms[0.05][1] > 0.7 * norms[0.0][1]


def test_sparsify_adds_the_lasso_to_the_layers_own_regularizer():
    inputs = keras.Input((6, 6, 12))
    conv = keras.layers.Conv2D(20, 3, kernel_regularizer=keras.regularizers.L2(0.1), name="c")
    model = keras.Model(inputs, conv(inputs))
    warm = bstf.sparsify(model, block=(8, 4), ratio=0, group_lasso=0.01)
    kernel = conv.kernel.numpy()
    expected = 0.1 * np.square(kernel).sum() + float(GroupLasso(0.01, (8, 4))(kernel))
    assert float(sum(warm.losses)) == pytest.approx(expected, rel=1e-5)
    again = keras.layers.deserialize(keras.layers.serialize(warm.get_layer("c")))
    assert again.group_lasso == 0.01
    sparse = bstf.sparsify(warm, block=(8, 4), ratio=0)
    assert float(sum(sparse.losses)) == pytest.approx(0.1 * np.square(kernel).sum(), rel=1e-5)


@pytest.mark.parametrize(
    "build, sentence",
    [
        (lambda: GammaRange(1.0), r"ratio is the fraction of blocks that should become zero, in \[0, 1\)"),
        (lambda: GammaRange(beta=-1), "beta must be a number of at least 0; got -1"),
        (lambda: BoxedGammaRange(iota=float("nan")), "iota must be a number"),
        (lambda: BoxedGammaRange(alpha=0), "alpha must be a number above 0; got 0"),
        (lambda: BoxedGammaRatio(sign=0), "sign must be -1, as printed, or 1; got 0"),
        (lambda: GroupLasso("much"), "strength must be a number of at least 0; got 'much'"),
        (lambda: GroupLasso(block=0), "block must be a positive integer"),
        (lambda: bstf.MaskedDense(8, group_lasso=-1.0), "group_lasso is the strength of a penalty"),
    ],
)
def test_errors_are_sentences(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()
