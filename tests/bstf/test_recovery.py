"""Batch-norm statistics and least squares against NumPy, and what recovery does to a network."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bstf
from bstf.layers import MaskedConv2D
from bstf.places import effective_kernel
from bstf.recovery import obs_update, patches, recover, reestimate_batch_norm


def network(seed=0):
    """Convolutions with stride and padding, batch norms, a nested model and a dense layer."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    inner = keras.Sequential(
        [keras.Input((5, 5, 16)), layers.Conv2D(12, 3, activation="relu", name="conv2"), layers.Dropout(0.5)],
        name="inner",
    )
    inputs = keras.Input((10, 10, 8))
    x = layers.Conv2D(16, 3, strides=2, padding="same", use_bias=False, name="conv1")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(name="bn1", momentum=0.9)(x))
    x = layers.BatchNormalization(name="bn2")(layers.Flatten()(inner(x)))
    return keras.Model(inputs, layers.Dense(10, name="dense")(x))


def images(n=96, seed=1):
    """Noise whose channels depend on each other, as those of real layers do."""
    mixing = np.random.default_rng(0).normal(size=(8, 8)) * 0.5 ** np.arange(8)[:, None]
    return (np.random.default_rng(seed).normal(size=(n, 10, 10, 8)) @ mixing).astype("float32")


def run(model, name, x):
    """What a layer of the flat part of a model gives."""
    return keras.Model(model.input, model.get_layer(name).output)(x, training=False).numpy()


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(5, 9),
    width=st.integers(5, 9),
    channels=st.integers(1, 4),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.sampled_from(["same", "valid"]),
)
def test_patches_times_the_kernel_are_the_convolution(height, width, channels, size, strides, dilation, padding):
    rng = np.random.default_rng(0)
    strides = (strides, strides) if dilation == 1 else (1, 1)  # Keras has no strides and dilation at once
    x = rng.normal(size=(2, height, width, channels)).astype("float32")
    kernel = rng.normal(size=(*size, channels, 3)).astype("float32")
    expected = keras.ops.conv(x, kernel, strides, padding, "channels_last", (dilation, dilation)).numpy()
    found = patches(x, size, strides, (dilation, dilation), padding) @ kernel.reshape(-1, 3)
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)


def test_batch_norm_of_one_batch_is_exact():
    model, x = network(), images() * 3 + 1
    reestimate_batch_norm(model, [x])
    for name in ("bn1", "bn2"):
        layer = model.get_layer(name)
        inputs = keras.Model(model.input, layer.input)(x, training=False).numpy()
        axes = tuple(range(inputs.ndim - 1))
        np.testing.assert_allclose(layer.moving_mean, inputs.mean(axes, dtype=float), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layer.moving_variance, inputs.var(axes, dtype=float), rtol=1e-4, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_batches_are_pooled_exactly(sizes, seed):
    """A first batch norm sees the same inputs however they are divided."""
    model = keras.Sequential([keras.Input((3, 3, 4)), keras.layers.BatchNormalization(momentum=0.5, name="bn")])
    rng = np.random.default_rng(seed)
    batches = [rng.normal(5 * i, 1 + i, size=(n, 3, 3, 4)).astype("float32") for i, n in enumerate(sizes)]
    reestimate_batch_norm(model, iter(batches))
    whole = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(model.get_layer("bn").moving_mean, whole.mean((0, 1, 2)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.get_layer("bn").moving_variance, whole.var((0, 1, 2)), rtol=1e-4, atol=1e-4)


def test_batch_norm_changes_nothing_else_and_nothing_at_all_on_an_error():
    model = network()
    before = {v.path: v.numpy() for v in model.variables}

    def broken():
        yield images(8)
        yield images(8) * np.nan

    with pytest.raises(ValueError, match="NaN or infinite"):
        reestimate_batch_norm(model, broken())
    for variable in model.variables:
        np.testing.assert_array_equal(variable, before[variable.path])
    reestimate_batch_norm(model, images() + 1)
    changed = {path for path, value in before.items() if (value != next_value(model, path)).any()}
    assert len(changed) == 4 and all("moving" in path for path in changed)
    assert "call" not in vars(model.get_layer("bn1"))


def next_value(model, path):
    return next(v.numpy() for v in model.variables if v.path == path)


@settings(max_examples=20, deadline=None)
@given(
    cin=st.integers(4, 9),
    cout=st.integers(4, 9),
    block=st.tuples(st.integers(2, 4), st.integers(2, 4)),
    strides=st.integers(1, 2),
    padding=st.sampled_from(["same", "valid"]),
    seed=st.integers(0, 999),
)
def test_obs_is_the_least_squares_solution(cin, cout, block, strides, padding, seed):
    rng = np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)
    conv = keras.layers.Conv2D(cout, 2, strides, padding, name="conv")
    dense = keras.Sequential([keras.Input((5, 6, cin)), conv])
    sparse = bstf.sparsify(dense, block=block, ratio=0.5, min_per_line=0)
    x = rng.normal(size=(20, 5, 6, cin)).astype("float32")
    obs_update(sparse, [x[:7], x[7:]], dense, damping=1e-9)
    layer = sparse.get_layer("conv")
    rows = patches(x, (2, 2), (strides, strides), (1, 1), padding).astype(np.float64)
    wanted = rows @ conv.kernel.numpy().reshape(-1, cout).astype(np.float64)
    kernel = layer.kernel.numpy()
    mask = np.broadcast_to(np.kron(layer.gamma, np.ones(block))[:cin, :cout], kernel.shape).reshape(-1, cout) != 0
    assert not kernel.reshape(-1, cout)[~mask].any()
    for out in range(cout):
        expected = np.linalg.lstsq(rows[:, mask[:, out]], wanted[:, out], rcond=None)[0]
        np.testing.assert_allclose(kernel.reshape(-1, cout)[mask[:, out], out], expected, rtol=1e-3, atol=1e-4)


def test_obs_is_the_brain_surgeon():
    """W - H^-1 E (E' H^-1 E)^-1 E' W, the closed form for all dead weights of an output at once."""
    keras.utils.set_random_seed(0)
    dense = keras.Sequential([keras.Input((12,)), keras.layers.Dense(8, name="dense")])
    x = np.random.default_rng(0).normal(size=(64, 12)).astype("float32") @ np.random.default_rng(1).normal(
        size=(12, 12)
    )
    sparse = bstf.sparsify(dense, block=4, ratio=0.5)
    weights, gamma = dense.get_layer("dense").kernel.numpy(), np.asarray(sparse.get_layer("dense").gamma)
    obs_update(sparse, x, dense, damping=1e-9)
    inverse = np.linalg.inv(x.astype(np.float32).astype(np.float64).T @ x.astype(np.float32).astype(np.float64))
    for out in range(8):
        dead = np.flatnonzero(np.repeat(gamma[:, out // 4], 4) == 0)
        step = np.linalg.solve(inverse[np.ix_(dead, dead)], weights[dead, out])
        expected = weights[:, out] - inverse[:, dead] @ step
        np.testing.assert_allclose(sparse.get_layer("dense").kernel[:, out], expected, rtol=2e-3, atol=2e-4)


def test_obs_brings_every_layer_closer_and_keeps_the_zeros():
    dense = network()
    x, other = images(600), images(200, seed=5)  # the dense layer has 108 inputs
    sparse, updated = (bstf.sparsify(dense, block=4, ratio=0.5) for _ in range(2))
    obs_update(updated, x, dense)
    places = {name: layer for name, layer in bstf.conversion.places(updated) if bstf.conversion.is_masked(layer)}
    assert places.keys() == {"conv1", "inner/conv2", "dense"}
    for (name, layer), (_, before) in zip(places.items(), masked(sparse)):
        np.testing.assert_array_equal(layer.gamma, before.gamma)
        mask = np.kron(layer.gamma, np.ones(layer.block))[: layer.kernel.shape[-2], : layer.kernel.shape[-1]]
        assert not (layer._kernel.numpy() * (mask == 0)).any() and (mask == 0).any(), name
        assert (layer.kernel.numpy() != before.kernel.numpy()).any()
    for x_ in (x, other):
        wanted, before, after = (outputs(model, x_) for model in (dense, sparse, updated))
        for name in wanted:
            assert np.square(after[name] - wanted[name]).sum() < np.square(before[name] - wanted[name]).sum(), name


def masked(model):
    return [(n, layer) for n, layer in bstf.conversion.places(model) if bstf.conversion.is_masked(layer)]


def outputs(model, x):
    names = ("conv1", "bn2", "dense")
    return {name: run(model, name, x) for name in names}


def test_the_kernels_keep_their_optimum_when_nothing_is_dead():
    dense, x = network(), images()
    sparse = bstf.sparsify(dense, block=4, ratio=0)
    obs_update(sparse, x, dense)
    for name, layer in masked(sparse):
        original = dict(bstf.conversion.places(dense))[name]
        np.testing.assert_allclose(effective_kernel(layer), effective_kernel(original), rtol=1e-3, atol=1e-4)


def test_dead_inputs_and_few_images_leave_finite_weights():
    dense, x = network(), images(1)
    x[..., :4] = 0
    sparse = bstf.sparsify(dense, block=4, ratio=0.5)
    recover(sparse, x, dense)
    assert all(np.isfinite(weight).all() for weight in sparse.get_weights())
    start = bstf.sparsify(dense, block=4, ratio=0.5)
    obs_update(start, np.zeros_like(x), dense)
    np.testing.assert_allclose(
        start.get_layer("conv1").kernel, bstf.sparsify(dense, block=4).get_layer("conv1").kernel, rtol=1e-5
    )


@pytest.mark.parametrize("given_dense", [False, True])
def test_recover_takes_the_piece_that_fits(given_dense):
    dense, x = network(), images() + 1
    one, other = (bstf.sparsify(dense, block=4) for _ in range(2))
    lost = one.get_weights()
    if given_dense:
        recover(one, x, dense)
        obs_update(other, x, dense)
    else:
        recover(one, x)
        reestimate_batch_norm(other, x)
    for a, b in zip(one.get_weights(), other.get_weights()):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(lost, one.get_weights()))


def test_a_shared_layer_and_mixed_precision():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 8))
    shared = keras.layers.Conv2D(8, 3, padding="same", activation="relu", name="shared", dtype="mixed_float16")
    dense = keras.Model(inputs, shared(shared(inputs)))
    sparse, updated = (bstf.sparsify(dense, block=4) for _ in range(2))
    x = np.random.default_rng(0).normal(size=(64, 6, 6, 8)).astype("float32")
    obs_update(updated, x, dense)
    wanted = dense.predict(x, verbose=0)
    errors = [np.square(model.predict(x, verbose=0) - wanted).mean() for model in (sparse, updated)]
    assert errors[1] < errors[0]
    assert updated.get_layer("shared").kernel.dtype == "float32"


@pytest.mark.parametrize(("masked_layers", "times"), [(None, 2 * 2 * 3), ("conv1", 0)])
def test_a_layer_is_computed_once_for_all_masked_layers_after_it(monkeypatch, masked_layers, times):
    """Of both models, both batch norms, three batches; after the last masked layer nothing."""
    dense, x = network(), images(12)
    sparse = bstf.sparsify(dense, block=4, ratio=0.5, layers=masked_layers)
    computed, whole = [], keras.layers.BatchNormalization.call

    def counted(*args, **kwargs):
        computed.append(1)
        return whole(*args, **kwargs)

    monkeypatch.setattr(keras.layers.BatchNormalization, "call", counted)
    obs_update(sparse, [x[:4], x[4:8], x[8:]], dense)
    assert len(computed) == times


def test_what_each_layer_makes_good_is_what_the_updated_ones_before_it_leave():
    """With branches, a nested model and layers that are called twice: the residual is orthogonal to the inputs."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    inputs = keras.Input((6, 6, 8))
    shared = layers.Conv2D(8, 3, padding="same", activation="relu", name="shared")
    inner = keras.Sequential([keras.Input((6, 6, 8)), layers.Conv2D(8, 1, name="in"), layers.ReLU()], name="inner")
    left = layers.Conv2D(8, 3, padding="same", name="left")(inputs)
    right = layers.Conv2D(8, 1, name="right")(inner(shared(inputs)))
    middle = layers.Conv2D(8, 3, padding="same", name="middle")(layers.Add()([left, right]))
    joined = shared(inner(middle))
    dense = keras.Model(inputs, layers.Dense(8, name="last")(layers.GlobalAveragePooling2D()(joined)))
    x = np.random.default_rng(0).normal(size=(48, 6, 6, 8)).astype("float32")
    sparse = bstf.sparsify(dense, block=4, ratio=0.5)
    obs_update(sparse, [x[:20], x[20:]], dense, damping=1e-9)
    assert {name for name, _ in masked(sparse)} == {"left", "right", "shared", "inner/in", "middle", "last"}
    for name, size in (("left", 3), ("right", 1), ("middle", 3), ("last", None)):
        layer, original = sparse.get_layer(name), dense.get_layer(name)
        rows = keras.Model(sparse.input, layer.input).predict(x, verbose=0)
        rows = patches(rows, (size, size), padding="same") if size else rows
        wanted = keras.Model(dense.input, original.output).predict(x, verbose=0) - original.bias.numpy()
        kernel = layer.kernel.numpy().reshape(-1, 8)
        residual = rows.astype(np.float64) @ kernel - wanted.reshape(-1, 8)
        lengths = np.linalg.norm(rows, axis=0)[:, None] * np.linalg.norm(residual, axis=0)
        slopes = rows.T @ residual / np.maximum(lengths, 1e-9)  # some inputs are always zero
        assert np.abs(slopes[kernel != 0]).max() < 1e-4 < np.abs(slopes).max(), name


def test_the_dense_model_may_be_a_subclassed_one():
    class Subclassed(keras.Model):
        def __init__(self, layers):
            super().__init__()
            self.all = layers

        def call(self, x):
            for layer in self.all:
                x = layer(x)
            return x

    keras.utils.set_random_seed(0)
    layers = [keras.layers.Conv2D(8, 3, name="conv"), keras.layers.ReLU(), keras.layers.Conv2D(8, 3, name="next")]
    dense = keras.Sequential([keras.Input((6, 6, 8)), *layers])
    x = np.random.default_rng(0).normal(size=(40, 6, 6, 8)).astype("float32")
    by_graph, by_call = (bstf.sparsify(dense, block=4, ratio=0.5) for _ in range(2))
    obs_update(by_graph, [x[:20], x[20:]], dense)
    obs_update(by_call, [x[:20], x[20:]], Subclassed(layers))
    for one, other in zip(by_graph.get_weights(), by_call.get_weights()):
        np.testing.assert_array_equal(one, other)


def test_errors_are_sentences():
    dense, x = network(), images(4)
    sparse = bstf.sparsify(dense, block=4)
    with pytest.raises(ValueError, match="damping must be above 0; got 0"):
        recover(sparse, x, dense, damping=0)
    with pytest.raises(ValueError, match=r"Layer 'conv1' has a kernel \(3, 3, 8, 16\), but the dense model has none"):
        recover(sparse, x, keras.Sequential([keras.Input((10, 10, 8)), keras.layers.Conv2D(8, 3, name="conv1")]))
    with pytest.raises(ValueError, match=r"needs batches \(n, 10, 10, 8\)"):
        recover(sparse, x[..., :3], dense)
    with pytest.raises(ValueError, match="holds no images"):
        recover(sparse, [], dense)
    with pytest.raises(TypeError, match="give an array"):
        recover(sparse, 5, dense)
    layer = sparse.get_layer("conv1")
    assert isinstance(layer, MaskedConv2D)
    layer.enable_lora(2)
    with pytest.raises(ValueError, match="Layer 'conv1' has LoRA"):
        recover(sparse, x, dense)
