"""Γ as something to train: forward and backward against TensorFlow on kernels made by hand, then rounding."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

import bstf
from bstf.layers import MaskedConv2D, MaskedDense
from bstf.penalties import BoxedGammaRange
from bstf.selection import kept_blocks, select

BLOCK = (8, 4)


def expanded(gamma, cin, cout, block=BLOCK):
    return np.kron(gamma, np.ones(block))[:cin, :cout].astype("float32")


def network():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 16))
    x = layers.Conv2D(20, 3, padding="same", activation="tanh", name="a")(inputs)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(12, name="b")(x), name="net")


def data(n=64):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 6, 6, 16)).astype("float32"), rng.integers(0, 12, n)


def train(model, **kwargs):
    x, y = data()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, **(kwargs or {"run_eagerly": True}))  # tracing takes longer
    model.fit(x, y, batch_size=16, verbose=0)
    return model


def masked(model):
    return [layer for layer in model.layers if hasattr(layer, "block")]


@settings(max_examples=20, deadline=None)
@given(cin=st.integers(1, 19), cout=st.integers(1, 19), seed=st.integers(0, 99), straight=st.booleans())
def test_forward_and_backward_equal_tensorflow(cin, cout, seed, straight):
    rng = np.random.default_rng(seed)
    how = {"trainable_gamma": "straight_through", "gamma_ratio": 0.5} if straight else {"trainable_gamma": True}
    layer = MaskedConv2D(cout, 3, padding="same", block=BLOCK, use_bias=False, **how)
    x = rng.normal(size=(2, 5, 6, cin)).astype("float32")
    layer.build(x.shape)
    shape = tuple(layer.gamma.shape)
    dead = rng.random(shape) < 0.2
    kernel = layer.kernel.numpy()
    layer.set_gamma(1 - dead.astype(int))
    soft = np.where(dead, 0, rng.normal(size=shape)).astype("float32")
    layer.soft_gamma.assign(soft)
    factor = soft
    if straight:
        best = sorted(zip(*np.nonzero(~dead)), key=lambda at: -soft[at])[: kept_blocks(*shape, 0.5, 0)]
        factor = np.zeros(shape, "float32")
        factor[tuple(np.array(best, int).reshape(-1, 2).T)] = 1

    effective = tf.constant(kernel * expanded(np.where(dead, 0, factor), cin, cout))
    weights = rng.normal(size=(2, 5, 6, cout)).astype("float32")
    with tf.GradientTape() as tape:
        tape.watch(effective)
        expected = tf.nn.conv2d(x, effective, 1, "SAME")
        loss = tf.reduce_sum(expected * weights)
    gradient = tape.gradient(loss, effective).numpy()
    with tf.GradientTape() as tape:
        outputs = layer(x)
        loss = tf.reduce_sum(outputs * weights)
    of_kernel, of_soft = tape.gradient(loss, [layer._kernel.value, layer.soft_gamma.value])
    np.testing.assert_array_equal(outputs, expected)
    np.testing.assert_allclose(
        of_kernel, gradient * expanded(np.where(dead, 0, factor), cin, cout), atol=1e-4, rtol=1e-4
    )
    by_block = np.array(
        [
            [(gradient * kernel)[:, :, i * 8 : i * 8 + 8, j * 4 : j * 4 + 4].sum() for j in range(shape[1])]
            for i in range(shape[0])
        ]
    )
    np.testing.assert_allclose(of_soft, np.where(dead, 0, by_block), atol=2e-3, rtol=1e-3)


def test_gradient_of_gamma_equals_finite_differences():
    layer = MaskedDense(12, block=BLOCK, trainable_gamma=True, dtype="float64", activation="tanh")
    x = np.random.default_rng(0).normal(size=(3, 16))
    layer.build(x.shape)
    gamma = np.random.default_rng(1).uniform(size=(2, 3)).astype("float32")

    def loss(values):
        layer.soft_gamma.assign(values)
        return tf.reduce_sum(layer(x) ** 2)

    with tf.GradientTape() as tape:
        value = loss(gamma)
    gradient = tape.gradient(value, layer.soft_gamma.value)
    step = 2.0**-10
    for at in np.ndindex(2, 3):
        shift = np.zeros((2, 3), "float32")
        shift[at] = step
        numeric = (loss(gamma + shift) - loss(gamma - shift)) / (2 * step)
        assert float(gradient[at]) == pytest.approx(float(numeric), rel=1e-3, abs=1e-4)


@pytest.fixture(scope="module", params=[True, "straight_through"])
def soft(request):
    """A model whose Γ has been trained for an epoch."""
    ratio = 0.5 if request.param == "straight_through" else 0
    return train(bstf.sparsify(network(), BLOCK, ratio, trainable_gamma=request.param, min_per_line=0))


def test_training_moves_gamma(soft):
    how = soft.get_layer("a").trainable_gamma
    start = bstf.sparsify(network(), BLOCK, 0.5 if how == "straight_through" else 0, trainable_gamma=how)
    assert len(start.trainable_weights) == len(network().trainable_weights) + 2
    for before, after in zip(masked(start), masked(soft)):
        assert (before.soft_gamma.numpy() != after.soft_gamma.numpy()).mean() > 0.5
        assert (after.gamma.numpy() == 1).all()
    if how is True:
        np.testing.assert_array_equal(start(data()[0]), network()(data()[0]))  # Γ starts at 1


@pytest.mark.parametrize("scope", ["layer", "column", "row", "global"])
def test_rounding_meets_the_ratio(soft, scope):
    sparse = bstf.sparsify(soft, BLOCK, 0.5, importance="gamma", scope=scope)
    for before, layer in zip(masked(soft), masked(sparse)):
        gamma, scores = layer.gamma.numpy(), before.soft_gamma.numpy()
        assert set(np.unique(gamma)) == {0, 1} and gamma.any(axis=0).all() and gamma.any(axis=1).all()
        assert not layer.trainable_gamma and len(layer.trainable_weights) == 2
        if scope == "layer":
            np.testing.assert_array_equal(gamma, select(scores, 0.5))
            assert gamma.sum() == kept_blocks(*gamma.shape, 0.5)
        factors = gamma * (scores if before.trainable_gamma is True else 1)
        expected = before.kernel.numpy() * expanded(factors, *before.kernel.shape[-2:])
        np.testing.assert_allclose(layer.kernel, expected, rtol=1e-6)
    if scope == "global":
        total = sum(layer.gamma.numpy().size for layer in masked(sparse))
        assert sum((layer.gamma.numpy() == 0).sum() for layer in masked(sparse)) == (total + 1) // 2


def test_a_rounded_model_trains_and_keeps_its_zeros(soft):
    sparse = train(bstf.sparsify(soft, BLOCK, 0.5, importance="gamma"))
    for layer in masked(sparse):
        dead = expanded(layer.gamma.numpy(), *layer.kernel.shape[-2:]) == 0
        slots = [slot for slot in sparse.optimizer.variables if f"{layer.name}_kernel" in slot.path]
        assert dead.any() and len(slots) == 2
        assert not any(one.numpy()[..., dead].any() for one in (layer.kernel, *slots))


def test_rounding_keeps_the_function_where_the_forward_pass_is_the_rounded_one():
    soft = bstf.sparsify(network(), BLOCK, 0.5, trainable_gamma="straight_through", min_per_line=0)
    for layer in masked(soft):
        layer.soft_gamma.assign(np.random.default_rng(0).normal(size=layer.gamma.shape))
    sparse = bstf.sparsify(soft, BLOCK, 0.5, importance="gamma", min_per_line=0)
    x, _ = data()
    np.testing.assert_allclose(sparse(x), soft(x), rtol=1e-5, atol=1e-6)
    assert bstf.report(soft).ratio == bstf.report(sparse).ratio == pytest.approx(0.5, abs=0.05)
    by_norm = bstf.sparsify(network(), BLOCK, 0.5, min_per_line=0)
    assert all((a.gamma.numpy() != b.gamma.numpy()).any() for a, b in zip(masked(sparse), masked(by_norm)))


def test_rounding_in_stages_multiplies_by_gamma_once():
    soft = bstf.sparsify(network(), BLOCK, 0, trainable_gamma=True)
    for layer in masked(soft):
        layer.soft_gamma.assign(np.random.default_rng(0).uniform(0.2, 2, layer.soft_gamma.shape))
    same = bstf.sparsify(soft, BLOCK, 0, importance="gamma", trainable_gamma=True)
    np.testing.assert_allclose(same(data()[0]), soft(data()[0]), rtol=1e-5, atol=1e-6)


def test_the_sign_of_a_relaxed_gamma_is_no_matter():
    soft = bstf.sparsify(network(), (8, 10), 0, trainable_gamma=True, layers="a")
    soft.get_layer("a").soft_gamma.assign([[-2.0, 0.1], [0.2, -3.0]])
    rounded = bstf.sparsify(soft, (8, 10), 0.5, importance="gamma", layers="a")
    np.testing.assert_array_equal(rounded.get_layer("a").gamma, [[1, 0], [0, 1]])


def test_weights_of_a_trained_gamma_go_to_kept_blocks_of_another_size_only():
    soft = bstf.sparsify(network(), (8, 8), 0, trainable_gamma=True)
    target = bstf.sparsify(network(), (4, 4), 0.5)
    bstf.conversion.transfer_weights(soft, target)
    for layer in masked(target):
        mask = np.kron(np.asarray(layer.gamma), np.ones((4, 4)))[: layer.kernel.shape[-2], : layer.kernel.shape[-1]]
        assert not layer._kernel.numpy()[..., mask == 0].any() and (mask == 0).any()


def test_straight_through_starts_with_the_blocks_of_the_criterion():
    model = network()
    soft = bstf.sparsify(model, BLOCK, 0.5, trainable_gamma="straight_through", importance="l1", min_per_line=0)
    hard = bstf.sparsify(model, BLOCK, 0.5, importance="l1", min_per_line=0)
    np.testing.assert_array_equal(soft(data()[0]), hard(data()[0]))
    for layer in masked(soft):
        assert layer.soft_gamma.numpy().mean() == pytest.approx(1)


@pytest.mark.parametrize("how, policy", [(True, "mixed_float16"), ("straight_through", "mixed_bfloat16")])
def test_a_block_that_dies_while_gamma_trains_is_zero_everywhere(how, policy):
    keras.config.set_dtype_policy(policy)
    try:
        soft = bstf.sparsify(
            network(), BLOCK, 0.25, trainable_gamma=how, gamma_regularizer=BoxedGammaRange(0.5, strength=0.1)
        )
    finally:
        keras.config.set_dtype_policy("float32")
    train(soft)
    sparsity = bstf.callbacks.BlockSparsity(bstf.schedules.OneShot(0.5), importance="gamma")
    sparsity.step(0, soft, soft.optimizer)
    x, y = data()
    soft.fit(x, y, verbose=0)
    for layer in masked(soft):
        assert layer.soft_gamma.dtype == "float32"
        gamma = layer.gamma.numpy()
        assert (gamma == 0).sum() == gamma.size - kept_blocks(*gamma.shape, 0.5)
        assert not layer.soft_gamma.numpy()[gamma == 0].any()
        dead = expanded(gamma, *layer.kernel.shape[-2:]) == 0
        assert not np.asarray(keras.ops.convert_to_numpy(layer.masked_kernel()))[..., dead].any()
        slots = [slot for slot in soft.optimizer.variables if f"{layer.name}_soft_gamma" in slot.path]
        assert len(slots) == 2 and not any(slot.numpy()[gamma == 0].any() for slot in slots)


def test_files_and_copies(soft, tmp_path):
    x, _ = data(8)
    expected = soft(x)
    soft.save(tmp_path / "soft.keras")
    loaded = keras.models.load_model(tmp_path / "soft.keras", compile=False)
    np.testing.assert_array_equal(loaded(x), expected)
    for name in "ab":
        assert loaded.get_layer(name).get_config() == soft.get_layer(name).get_config()
        np.testing.assert_array_equal(loaded.get_layer(name).soft_gamma, soft.get_layer(name).soft_gamma)
    soft.save_weights(tmp_path / "soft.weights.h5")
    fresh = keras.Model.from_config(soft.get_config())
    fresh.load_weights(tmp_path / "soft.weights.h5")
    np.testing.assert_array_equal(fresh(x), expected)
    plain = bstf.densify(soft)
    assert type(plain.get_layer("a")) is layers.Conv2D
    np.testing.assert_allclose(plain(x), expected, rtol=1e-5, atol=1e-6)
    again = bstf.sparsify(soft, BLOCK, 0, trainable_gamma=True)  # trains on, or starts anew from the same function
    np.testing.assert_allclose(again(x), expected, rtol=1e-5, atol=1e-6)


def test_a_regularizer_is_saved_and_sees_every_layers_gamma():
    penalty = BoxedGammaRange(0.5)
    model = bstf.sparsify(network(), BLOCK, 0, trainable_gamma=True, gamma_regularizer=penalty)
    again = keras.Model.from_config(model.get_config())
    values = [float(penalty(np.ones(layer.gamma.shape, "float32"))) for layer in masked(model)]
    assert sorted(map(float, again.losses)) == pytest.approx(sorted(values), rel=1e-5)


def test_jit_compiled_training():
    soft = bstf.sparsify(network(), BLOCK, 0.5, trainable_gamma="straight_through")
    before = soft.get_layer("a").soft_gamma.numpy()
    train(soft, jit_compile=True)
    assert (soft.get_layer("a").soft_gamma.numpy() != before).mean() > 0.5


def test_errors_are_sentences():
    model = network()
    soft = bstf.sparsify(model, BLOCK, 0, trainable_gamma=True)
    x, y = data()
    for arguments, sentence in (
        ({"trainable_gamma": "supermask"}, "trainable_gamma must be False, True or 'straight_through'"),
        ({"gamma_regularizer": "l2"}, "gamma_regularizer acts on a trained Γ"),
        ({"group_lasso": -1}, "group_lasso is the strength of a penalty, a number of at least 0; got -1"),
        ({"importance": "gamma"}, "layer 'a' has none in 8x8 blocks.*sparsify"),
    ):
        with pytest.raises(ValueError, match=sentence):
            bstf.sparsify(model, **arguments)
    with pytest.raises(ValueError, match=r"ratio is the fraction of zero blocks"):
        MaskedDense(8, trainable_gamma="straight_through", gamma_ratio=1.0)
    with pytest.raises(ValueError, match="Layer 'a' has a trainable Γ, by which its kernel is multiplied"):
        bstf.sparsify(soft, BLOCK, importance="fisher", data=(x, y), loss="sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match="Layer 'a' has a trainable Γ: round it"):
        bstf.recover(soft, x, model)
    soft.get_layer("b").soft_gamma.assign(np.full((3, 3), np.nan))
    with pytest.raises(ValueError, match="Layer 'b' has NaN or infinite values in its soft_gamma"):
        bstf.sparsify(soft, BLOCK, importance="gamma")
