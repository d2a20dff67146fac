"""Models computed call by call against the same models computed whole."""

import keras
import numpy as np
import pytest

from bstf.lockstep import Lockstep, calls

layers = keras.layers


def batches(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, *shape)).astype("float32") for n in (3, 2)]


def last_call_of(model, images):
    """What the last call of a model gives for each batch, every call before it computed on its own."""
    for call in calls(model, images):
        outputs = [call.compute(i) for i in range(len(images))]
    return outputs


def check(model, images):
    for found, one in zip(last_call_of(model, images), images, strict=True):
        np.testing.assert_allclose(found, model(one, training=False), rtol=1e-6, atol=1e-6)


def random(model):
    rng = np.random.default_rng(1)
    model.set_weights([rng.normal(size=weight.shape) for weight in model.get_weights()])
    return model


def test_branches_nesting_and_layers_that_are_called_again():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="inside"), layers.Dropout(0.5)], name="inner")
    outer = keras.Sequential([keras.Input((4,)), inner, layers.BatchNormalization()], name="outer")
    inputs = keras.Input((4,))
    shared = layers.Dense(4, activation="tanh", name="shared")
    left, right = keras.ops.split(shared(layers.Dense(8)(inputs)) * 1.0, 2, axis=-1)
    x = layers.Concatenate()([outer(layers.Dense(4)(left)), layers.Dense(4)(right), inputs])
    x = layers.Add()([outer(layers.Dense(4)(x)), shared(layers.Dense(8)(inputs))])
    check(random(keras.Model(inputs, x)), batches(4))


def test_what_keras_computes_otherwise_stays_whole():
    class Own(keras.Model):
        """Computes something else than its graph."""

        def call(self, x, training=None):
            return 3.0 * super().call(x, training=training)

    class Trains(layers.Layer):
        """Computes in training mode if nobody says otherwise."""

        def call(self, x, training=True):
            return x + 5.0 if training else x

    class Around(layers.Layer):
        def __init__(self):
            super().__init__()
            self.inside = Trains()

        def call(self, x):
            return self.inside(x)

    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    by_name = keras.Model([b, a], layers.Subtract()([b, a]), name="by_name")
    rounded = keras.Input((4,), dtype="int32")
    entry = keras.Input((4,))
    own = Own(entry, layers.Dense(4)(entry), name="own")
    whole = keras.Model(rounded, layers.Rescaling(0.5)(rounded), name="rounds")
    inputs = keras.Input((4,))
    x = own(layers.Dense(4)(inputs))
    x = by_name({"a": x, "b": inputs})
    check(random(keras.Model(inputs, layers.Activation("tanh")(Around()(whole(x * 10.0))))), batches(4))


def test_masks_reach_nested_models():
    inner = keras.Sequential([keras.Input((5, 4)), layers.LSTM(3)], name="inner")
    inputs = keras.Input((5, 4))
    model = random(keras.Model(inputs, layers.Dense(2)(inner(layers.Masking()(inputs)))))
    images = batches(5, 4)
    for one in images:
        one[:, 3:] = 0
    check(model, images)


def test_the_call_around_a_layer():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="inside")], name="inner")
    inputs = keras.Input((4,))
    first, second, twice = (layers.Dense(4, name=name) for name in ("first", "second", "twice"))
    model = random(keras.Model(inputs, twice(second(inner(twice(first(inputs)))))))
    inside = inner.get_layer("inside")
    lockstep, images = Lockstep(model, batches(4)), batches(4)
    assert lockstep.order([second, inside, twice, layers.Dense(3), first]) == [first, twice, inside, second]
    assert lockstep.around(first).operation is first
    assert lockstep.around(twice).operation is model
    first.kernel.assign(-first.kernel)  # not computed yet
    wanted = keras.Model(model.input, second.input)
    assert lockstep.around(inside).operation is inside
    assert lockstep.around(second).operation is second
    for i, one in enumerate(images):
        ((found,), _) = lockstep.around(second).arguments[i]
        np.testing.assert_allclose(found, wanted(one), rtol=1e-6)
    assert lockstep.around(first).operation is model  # gone by
    assert lockstep.around(second).operation is second


def test_layers_within_a_layer_keep_the_order_that_they_are_given_in():
    class Pair(layers.Layer):
        def __init__(self, name):
            super().__init__(name=name)
            self.one, self.two = layers.Dense(4, name=f"{name}_one"), layers.Dense(4, name=f"{name}_two")

        def call(self, x):
            return self.two(self.one(x))

    class Stage(layers.Layer):
        def __init__(self):
            super().__init__()
            self.pairs = [Pair("a"), Pair("b")]

        def call(self, x):
            return self.pairs[1](self.pairs[0](x))

    stage = Stage()
    model = keras.Sequential([keras.Input((4,)), stage])
    inside = [layer for pair in stage.pairs for layer in (pair.one, pair.two)]
    lockstep = Lockstep(model, batches(4))
    assert lockstep.order(inside) == inside
    assert all(lockstep.around(layer).operation is stage for layer in inside)


@pytest.mark.parametrize("build", [lambda inner: keras.Sequential(inner), lambda inner: Unknown(inner)])
def test_a_model_without_a_graph_is_known_as_a_whole(build):
    inner = [layers.Dense(4, name="one"), layers.Dense(4, name="two")]
    x = batches(4)[0]
    for layer in inner:
        layer.build((None, 4))
    model = build(inner)
    call = Lockstep(model, [x]).around(inner[1])
    assert call.operation is model
    np.testing.assert_allclose(call.compute(0), inner[1](inner[0](x)), rtol=1e-6)


class Unknown(keras.Model):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, x):
        for layer in self.inner:
            x = layer(x)
        return x
