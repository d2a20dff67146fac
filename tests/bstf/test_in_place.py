"""sparsify_layers on models that hold their layers in several places; what can't be undone is refused."""

import keras
import numpy as np
import pytest
from keras import layers

import bstf
from bstf.layers import MaskedDense
from bstf.places import masked_places


class Shares(keras.Model):
    """Two functional models and an attribute that hold the same layer."""

    def __init__(self):
        super().__init__()
        inputs = keras.Input((8,))
        hidden = layers.Dense(16, name="hidden")(inputs)
        self.encoder = keras.Model(inputs, hidden)
        self.whole = keras.Model(inputs, layers.Dense(8, name="out")(hidden))
        self.direct = self.whole.get_layer("hidden")

    def call(self, x):
        return self.encoder(x), self.whole(x), self.direct(x)


class Holds(keras.Model):
    """One layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, x):
        return self.layer(x)


def test_a_layer_that_several_models_hold_stays_one():
    model, x = Shares(), np.random.default_rng(0).normal(size=(4, 8)).astype("float32")
    before = model(x)
    bstf.sparsify_layers(model)
    assert len(model.trainable_variables) == 4 and len(masked_places(model)) == 2
    assert model.direct is model.whole.get_layer("hidden") and isinstance(model.direct, MaskedDense)
    for old, new in zip(before, model(x)):
        np.testing.assert_allclose(new, old, atol=1e-6)


def test_layers_inside_layers_of_a_functional_model():
    inputs = keras.Input((3, 8))
    inner = layers.TimeDistributed(layers.Dense(16, name="inner"), name="times")
    model = Holds(keras.Model(inputs, layers.Dense(8, name="out")(inner(inputs))))
    x = np.random.default_rng(0).normal(size=(4, 3, 8)).astype("float32")
    before = model(x)
    bstf.sparsify_layers(model)
    assert len(masked_places(model)) == 2
    np.testing.assert_allclose(model(x), before, atol=1e-6)


def test_a_variable_that_another_layer_holds_keeps_its_layer():
    model = Holds(keras.Sequential([layers.SpectralNormalization(layers.Dense(16, name="inner")), layers.Dense(8)]))
    x = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")
    before = model(x)
    bstf.sparsify_layers(model)
    assert [layer.name for _, layer in masked_places(model)] == [model.layer.layers[-1].name]
    np.testing.assert_allclose(model(x), before, atol=1e-6)


def test_masked_layers_that_densify_cannot_reach_are_refused(tmp_path):
    inputs = keras.Input((3, 8))
    model = keras.Model(inputs, layers.TimeDistributed(layers.Dense(16, name="inner"), name="times")(inputs))
    bstf.sparsify_layers(model)
    bstf.prune(model, 0.5)
    for refused in (bstf.densify, lambda one: bstf.export(one, tmp_path / "model")):
        with pytest.raises(ValueError, match="Layer 'times/inner' is masked inside a layer that is no model"):
            refused(model)
    assert not (tmp_path / "model").exists()


def test_recover_where_an_equation_exchanges_axes():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((2, 3, 16))
    dense = keras.Model(inputs, layers.EinsumDense("abcd,de->acbe", (3, 2, 16), name="it")(inputs))
    sparse = bstf.sparsify(dense, ratio=0.5)
    x = np.random.default_rng(0).normal(size=(64, 2, 3, 8)) @ np.random.default_rng(1).normal(size=(8, 16))
    bstf.recover(sparse, x.astype("float32"), dense, damping=1e-9)
    rows = x.reshape(-1, 16)
    kernel = dense.get_layer("it").kernel.numpy().astype(np.float64)
    gamma = np.kron(np.asarray(sparse.get_layer("it").gamma), np.ones((8, 8)))
    for out in range(16):
        kept = gamma[:, out] != 0
        best = np.linalg.lstsq(rows[:, kept], rows @ kernel[:, out], rcond=None)[0]
        found = sparse.get_layer("it").kernel.numpy()[kept, out]
        np.testing.assert_allclose(rows[:, kept] @ found, rows[:, kept] @ best, atol=1e-3)
