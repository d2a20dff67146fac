"""permute: the function is the same on every kind of graph, and blocks keep at least as much as before."""

import itertools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers, ops

import bstf
from bstf.channels import ChannelGroups
from bstf.permutation import kept_energy


def randomised(model, seed=0):
    """Weights of which some channels matter much more than others, statistics and biases included."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        value = rng.uniform(0.5, 1.5, weight.shape)
        if "variance" not in weight.path:
            value *= rng.choice([-1, 1], weight.shape)
        if len(weight.shape) > 1:
            rows, columns = (rng.lognormal(0, 1, size) for size in weight.shape[-2:])
            value *= rows[:, None] * columns / np.sqrt(np.prod(weight.shape[:-1]))
        weight.assign(value)
    return model


def total(model, **kwargs):
    return sum(kept_energy(model, **kwargs).values())


def assert_same_function(model, permuted, changed=True):
    shapes = [(3, *tensor.shape[1:]) for tensor in model.inputs]
    x = [np.random.default_rng(1).normal(size=shape).astype("float32") for shape in shapes]
    x = x[0] if len(x) == 1 else x
    for one, other in zip(keras.tree.flatten(model(x)), keras.tree.flatten(permuted(x)), strict=True):
        scale = np.abs(ops.convert_to_numpy(one)).max()
        np.testing.assert_allclose(other, one, rtol=0, atol=2e-5 * scale)
    pairs = [(a, b) for a, b in zip(model.weights, permuted.weights, strict=True)]
    for one, other in pairs:
        assert one.shape == other.shape
        np.testing.assert_array_equal(np.sort(one.numpy(), axis=None), np.sort(other.numpy(), axis=None))
    assert any((a.numpy() != b.numpy()).any() for a, b in pairs) == changed


def test_one_kernel_keeps_what_the_best_of_all_orders_keeps():
    inputs = keras.Input((4,))
    hidden = layers.Dense(6, name="wide")(inputs)
    model = randomised(keras.Model(inputs, layers.Dense(4, name="last")(hidden)), seed=3)
    permuted = bstf.permute(model, block=(4, 2), ratio=0.34, layers="wide", min_per_line=0)
    energy = np.square(model.get_layer("wide").kernel.numpy()).sum(axis=0)
    best = 0.0
    for order in itertools.permutations(range(6)):
        blocks = energy[list(order)].reshape(3, 2).sum(axis=1)
        best = max(best, np.sort(blocks)[1:].sum() / energy.sum())
    found = kept_energy(permuted, block=(4, 2), ratio=0.34, layers="wide", min_per_line=0)
    assert found["wide"] == pytest.approx(best)
    assert_same_function(model, permuted)


def residual(x, width, rng):
    y = layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same", use_bias=False)(x))
    y = layers.ReLU()(y)
    y = layers.Conv2D(width, 3, padding="same", activation="silu")(y)
    if x.shape[-1] != width:
        x = layers.Conv2D(width, 1)(x)
    return x + y if rng.random() < 0.5 else layers.Add()([y, x])


def dense_block(x, width, rng):
    y = layers.Conv2D(width, 3, padding="same", activation="relu")(x)
    return layers.BatchNormalization()(layers.Concatenate()([x, y] if rng.random() < 0.5 else [y, x, y]))


def depthwise(x, width, rng):
    x = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=int(rng.integers(1, 3)))(x)
    x = layers.Conv2D(width, 1, activation="relu6")(x)
    return layers.SeparableConv2D(width, 3, padding="same", depth_multiplier=2)(x)


def pooled(x, width, rng):
    x = layers.Conv2DTranspose(width, 2, activation="tanh")(x)
    return layers.AveragePooling2D(2, padding="same")(layers.ZeroPadding2D(1)(x))


def squeezed(x, width, rng):
    x = layers.Conv2D(width, 1)(x)
    gate = layers.Dense(width, activation="sigmoid")(layers.Dense(8)(layers.GlobalAveragePooling2D()(x)))
    return layers.Multiply()([x, layers.Reshape((1, 1, width))(gate)])


def nested(x, width, rng):
    inner = keras.Input(x.shape[1:])
    model = keras.Model(inner, residual(inner, width, rng))
    return keras.Sequential([keras.Input(model.output_shape[1:]), layers.Conv2D(width, 1)])(model(x))


def shared(x, width, rng):
    first = layers.Conv2D(width, 1)(x)
    conv = layers.Conv2D(width, 3, padding="same")
    return conv(layers.LayerNormalization()(conv(first)))


def grouped(x, width, rng):
    return layers.Conv2D(16, 1, groups=2)(layers.Conv2D(16, 1)(x))


def softened(x, width, rng):
    x = layers.PReLU(shared_axes=(1, 2))(layers.Conv2D(width, 1)(x))
    return layers.Softmax()(layers.Activation("relu")(layers.Conv2D(width, 1, activation="log_softmax")(x)))


PIECES = (residual, dense_block, depthwise, pooled, squeezed, nested, shared, grouped, softened)


@settings(max_examples=6, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(PIECES), min_size=1, max_size=3),
    width=st.sampled_from([8, 12, 16, 20]),
    flat=st.booleans(),
    block=st.sampled_from([4, 8, (8, 4)]),
    seed=st.integers(0, 999),
)
def test_random_graphs(pieces, width, flat, block, seed):
    rng = np.random.default_rng(seed)
    inputs = keras.Input((4, 3, 5))
    x = layers.Conv2D(width, 3, padding="same")(inputs)
    for piece in pieces:
        x = piece(x, width, rng)
    x = layers.Flatten()(x) if flat else layers.GlobalMaxPooling2D()(x)
    x = layers.Dense(16, activation="relu")(layers.Dropout(0.5)(x))
    outputs = [layers.Dense(9)(x), layers.Softmax()(layers.Dense(8)(x))]
    model = randomised(keras.Model(inputs, outputs), seed)
    permuted = bstf.permute(model, block, 0.5)
    assert_same_function(model, permuted)
    assert total(permuted, block=block) >= total(model, block=block) - 1e-9


@pytest.mark.parametrize("piece", PIECES)
def test_every_piece(piece):
    inputs = keras.Input((4, 4, 3))
    x = piece(layers.Conv2D(24, 3, padding="same")(inputs), 16, np.random.default_rng(0))
    model = randomised(keras.Model(inputs, layers.Dense(5)(layers.Flatten()(layers.Conv2D(16, 1)(x)))))
    permuted = bstf.permute(model, 4, 0.5)
    assert_same_function(model, permuted)
    assert total(permuted, block=4) > total(model, block=4)


def test_hidden_blocks_are_found():
    """A kernel that was block sparse before its channels were mixed gets most of that back."""
    rng = np.random.default_rng(0)
    inputs = keras.Input((64,))
    x = layers.Dense(64, use_bias=False)(inputs)
    x = layers.Dense(64, use_bias=False, name="mixed")(x)
    model = keras.Model(inputs, layers.Dense(10)(x))
    strong = np.kron(rng.random((8, 8)) < 0.5, np.ones((8, 8)))
    kernel = rng.normal(size=(64, 64)) * (0.1 + strong)
    model.get_layer("mixed").kernel.assign(kernel[np.ix_(rng.permutation(64), rng.permutation(64))])
    permuted = bstf.permute(model, 8, 0.5, layers="mixed")
    before, after = (kept_energy(one, 8, 0.5, layers="mixed")["mixed"] for one in (model, permuted))
    assert before < 0.7 and after > 0.9
    assert_same_function(model, permuted)


def test_the_same_model_gives_the_same_order_and_stays_as_it_is():
    inputs = keras.Input((4, 4, 3))
    x = residual(layers.Conv2D(24, 3)(inputs), 24, np.random.default_rng(0))
    model = randomised(keras.Model(inputs, layers.Dense(5)(layers.Flatten()(x)), name="m"))
    before = [weight.numpy() for weight in model.weights]
    first, second = bstf.permute(model), bstf.permute(model, ratio={".*": 0.5})
    for one, other, own, old in zip(first.weights, second.weights, model.weights, before):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(own, old)
    assert [layer.name for layer in first.layers] == [layer.name for layer in model.layers]
    sparse = bstf.sparsify(first, ratio=0.5)
    for layer in sparse.layers:
        if hasattr(layer, "block"):
            assert kept_energy(first)[layer.name] == pytest.approx(
                float(np.square(layer.kernel).sum() / np.square(first.get_layer(layer.name).kernel).sum()), rel=1e-5
            )


def test_channels_that_something_unknown_reads_stay():
    inputs = keras.Input((4, 4, 16))
    read = layers.Conv2D(16, 1, name="read")(inputs)
    model = keras.Model(inputs, [layers.Lambda(lambda t: t[..., :4])(read), layers.Conv2D(8, 1)(read)])
    assert ChannelGroups(model).free() == []
    assert_same_function(randomised(model), bstf.permute(model, 4), changed=False)
    constant = keras.Model(inputs, layers.Dense(4)(layers.Conv2D(16, 1)(inputs) + np.arange(16, dtype="float32")))
    assert ChannelGroups(constant).free() == []
    masks = layers.Softmax()(layers.Conv2D(16, 1)(inputs), mask=inputs > 0)
    assert ChannelGroups(keras.Model(inputs, layers.Dense(4)(masks))).free() == []


def test_groups_are_as_large_as_they_must_be():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", name="first")(inputs)
    y = layers.Conv2D(8, 3, padding="same", name="second")(layers.Conv2D(12, 3, padding="same")(x))
    z = layers.Concatenate()([x + y, layers.Conv2D(4, 1)(x)])
    model = keras.Model(inputs, layers.Conv2D(5, 1)(z))
    groups = ChannelGroups(model)
    assert sorted(groups.sizes[group] for group in groups.free()) == [4, 8, 12]


def test_errors_are_sentences():
    inputs = keras.Input((16,))
    model = keras.Model(inputs, layers.Dense(8, name="last")(layers.Dense(16, name="d")(inputs)))
    with pytest.raises(ValueError, match="permute would mix the blocks of layer 'd', which is masked: call it before"):
        bstf.permute(bstf.sparsify(model, ratio=0))
    with pytest.raises(ValueError, match=r"ratio is the fraction of zero blocks"):
        bstf.permute(model, ratio=1)
    with pytest.raises(ValueError, match="min_per_line must be an integer"):
        bstf.permute(model, min_per_line=-1)
    with pytest.raises(ValueError, match="matches the whole name of no layer"):
        bstf.permute(model, layers="typo")
    with pytest.raises(TypeError, match="permute takes a keras.Model; got int"):
        bstf.permute(3)
