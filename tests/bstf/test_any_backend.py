"""What must hold on every backend of Keras; `test_backends.py` runs this module on those that the suite doesn't."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import bstf
from bstf import applications
from bstf.batches import Batch
from bstf.blocks import nonzero_blocks
from bstf.callbacks import BlockSparsity
from bstf.layers import _slots
from bstf.layouts import from_planes, variable
from bstf.objective import Objective
from bstf.places import effective_kernel, masked_places
from bstf.schedules import Cubic, Steps

BACKEND = keras.backend.backend()
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
OPTIMIZERS = {
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.8),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "lion": lambda: keras.optimizers.Lion(0.003, weight_decay=0.1),
    "ftrl": lambda: keras.optimizers.Ftrl(0.01),
    "muon": lambda: keras.optimizers.Muon(0.01),
}


def every_layer():
    """One of each layer that has a masked form, and a batch normalisation."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4, 4, 8))
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="conv2d")(inputs)
    x = layers.SeparableConv2D(8, 3, padding="same", name="separable")(layers.BatchNormalization(name="norm")(x))
    x = layers.Conv2DTranspose(8, 2, strides=2, activation="relu", name="transposed")(x)
    x = layers.Conv1D(8, 3, padding="causal", activation="relu", name="conv1d")(layers.Reshape((8, 64))(x))
    x = layers.EinsumDense("abc,cde->abde", (8, 2, 8), bias_axes="de", name="einsum")(x)
    x = layers.Conv3D(8, 2, activation="relu", name="conv3d")(layers.Reshape((4, 4, 2, 4))(x))
    return keras.Model(inputs, layers.Dense(10, name="dense")(layers.Flatten()(x)))


def two_layers():
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4, 4, 8))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(16, 3, activation="relu", name="conv")(inputs))
    return keras.Model(inputs, layers.Dense(10, name="dense")(x))


def data(n=16):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 4, 4, 8)).astype("float32"), rng.integers(0, 10, n)


def array(value):
    return ops.convert_to_numpy(value)


def assert_sacred(model, optimizer=None):
    """Zero where Γ is: the kernel that is stored, the one computed with, every slot of the optimizer's of its shape."""
    for path, layer in masked_places(model):
        gamma, kernel = array(layer.gamma), variable(layer)
        cin, cout = effective_kernel(layer).shape[-2:]
        mask = np.kron(gamma, np.ones(layer.block))[:cin, :cout]
        dead = np.broadcast_to(array(from_planes(layer, mask)) == 0, kernel.shape)
        for value in [kernel, layer.masked_kernel(), *_slots(optimizer, kernel)]:
            assert not array(value)[dead].any(), path
        np.testing.assert_array_equal(nonzero_blocks(effective_kernel(layer), layer.block), gamma != 0)


class Watch(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        assert_sacred(self.model, self.model.optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_blocks_die_in_the_middle_of_fit(name):
    model = bstf.sparsify(two_layers(), block=4, ratio=0)
    model.compile(OPTIMIZERS[name](), LOSS)
    sparsity = BlockSparsity(Cubic(0.5, end=2), unit="step" if name == "adam" else "epoch")
    model.fit(*data(), batch_size=8, epochs=3, verbose=0, callbacks=[sparsity, Watch()])
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    assert bstf.report(model).ratio == pytest.approx(0.5, abs=0.05)


def test_every_layer_loses_blocks_in_fit():
    model = bstf.sparsify(every_layer(), block=4, ratio=0)
    model.compile("adam", LOSS)
    sparsity = BlockSparsity(Cubic(0.5, end=1), scope="global")
    model.fit(*data(), batch_size=8, epochs=2, verbose=0, callbacks=[sparsity, Watch()])
    report = bstf.report(model)
    assert len(report.layers) == len(bstf.places.MASKED) == 7 and report.ratio == pytest.approx(0.5, abs=0.01)


def test_save_load_and_go_on(tmp_path):
    model = bstf.sparsify(two_layers(), block=4, ratio=0.25)
    x, y = data()
    model.compile("adam", LOSS)
    model.fit(x, y, verbose=0)
    before = model.predict(x, verbose=0)
    model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    other = bstf.sparsify(two_layers(), block=4, ratio=0.5, importance="l1")  # with another Γ, which the file replaces
    other.compile("adam", LOSS)
    other.train_on_batch(x, y)
    other.load_weights(tmp_path / "m.weights.h5")
    for again in (loaded, other):
        np.testing.assert_allclose(again.predict(x, verbose=0), before, rtol=1e-5, atol=1e-6)
        again.fit(x, y, verbose=0)
        for (_, layer), (_, original) in zip(masked_places(again), masked_places(model)):
            np.testing.assert_array_equal(layer.gamma, original.gamma)
        assert_sacred(again)
    loaded.fit(x, y, epochs=3, initial_epoch=1, verbose=0, callbacks=[BlockSparsity(Steps(0.5, every=1)), Watch()])


def test_sparsify_and_densify():
    model = every_layer()
    x, _ = data()
    same = bstf.sparsify(model, block=4, ratio=0)
    np.testing.assert_allclose(same.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-4, atol=1e-5)
    sparse = bstf.sparsify(model, block=4, ratio=0.5)
    dense = bstf.densify(sparse)
    assert not any(hasattr(layer, "gamma") for layer in dense.layers if layer.name != "norm")
    np.testing.assert_allclose(dense.predict(x, verbose=0), sparse.predict(x, verbose=0), rtol=1e-4, atol=1e-5)
    assert [row.zeros for row in bstf.report(dense, block=4).layers] == [
        row.zeros for row in bstf.report(sparse).layers
    ]


def test_recover_and_wanda():
    model = every_layer()
    x, _ = data(64)
    sparse = bstf.sparsify(model, block=4, ratio=0.5, importance="wanda", data=x)
    expected = model.predict(x, verbose=0)
    worse = np.square(sparse.predict(x, verbose=0) - expected).mean()
    bstf.recover(sparse, x, dense=model)
    assert np.square(sparse.predict(x, verbose=0) - expected).mean() < 0.7 * worse
    assert_sacred(sparse)
    bstf.recover(sparse, x)
    assert_sacred(sparse)


@pytest.mark.skipif(BACKEND == "torch", reason="mixed precision on the CPU isn't supported by Keras on PyTorch")
@pytest.mark.parametrize("policy, jit", [("mixed_float16", False), ("mixed_bfloat16", True)])
def test_mixed_precision(policy, jit):
    keras.config.set_dtype_policy(policy)
    try:
        model = bstf.sparsify(two_layers(), block=4, ratio=0)
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), LOSS, jit_compile=jit)
    model.fit(*data(), 8, 3, verbose=0, callbacks=[BlockSparsity(Cubic(0.5, end=2)), Watch()])
    assert bstf.report(model).ratio == pytest.approx(0.5, abs=0.05)


def small():
    """A convolution and a dense layer, whose kernels a reference in TensorFlow is given."""
    inputs = keras.Input((5, 5, 4))
    x = layers.Flatten()(layers.Conv2D(6, 3, activation="tanh", name="conv")(inputs))
    model = keras.Model(inputs, layers.Dense(3, name="class")(x))
    rng = np.random.default_rng(1)
    model.set_weights([rng.normal(0, 0.3, weight.shape) for weight in model.weights])
    return model


def reference(weights, x, y):
    """The loss of `small` in TensorFlow alone."""
    kernel, bias, matrix, offset = weights
    hidden = tf.tanh(tf.nn.conv2d(x, kernel, 1, "VALID") + bias)
    logits = tf.reshape(hidden, (len(x), -1)) @ matrix + offset
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))


def test_derivatives_are_those_of_tensorflow():
    model = small()
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(6, 5, 5, 4)).astype("float32"), rng.integers(0, 3, 6)
    weights = [tf.constant(weight) for weight in model.get_weights()]
    vectors = [rng.choice([-1.0, 1.0], weights[i].shape).astype("float32") for i in (0, 2)]
    with tf.GradientTape() as outer:
        outer.watch(weights)
        with tf.GradientTape() as inner:
            inner.watch(weights)
            loss = reference(weights, x, y)
        gradients = inner.gradient(loss, [weights[0], weights[2]])
        along = tf.add_n([tf.reduce_sum(g * v) for g, v in zip(gradients, vectors)])
    products = outer.gradient(along, [weights[0], weights[2]])
    squares = [np.zeros(weights[i].shape) for i in (0, 2)]
    for i in range(len(x)):
        with tf.GradientTape() as tape:
            tape.watch(weights)
            one = reference(weights, x[i : i + 1], y[i : i + 1])
        for square, gradient in zip(squares, tape.gradient(one, [weights[0], weights[2]])):
            square += gradient.numpy().astype(float) ** 2 / len(x)

    places = bstf.places.eligible(model, bstf.blocks.BlockShape(2, 2))
    objective = Objective(model, [layer for _, layer in places], LOSS)
    batch = Batch(ops.convert_to_tensor(x), ops.convert_to_tensor(y), len(x))
    close = {"rtol": 1e-4, "atol": 1e-6}
    found, by_kernel = objective.gradient(batch)
    assert found == pytest.approx(float(loss), rel=1e-5)
    for one, other in zip(by_kernel, gradients):
        np.testing.assert_allclose(one, other, **close)
    for one, other in zip(objective.hessian_product(batch, vectors)[1], products):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
    taylor = bstf.curvature.mean_gradient(model, places, [(x[:4], y[:4]), (x[4:], y[4:])], LOSS)
    fisher = bstf.curvature.mean_square_gradient(model, places, (x, y), LOSS)
    for name, gradient, square in zip(("conv", "class"), gradients, squares):
        np.testing.assert_allclose(taylor[name], gradient, **close)
        np.testing.assert_allclose(fisher[name], square, **close)
    hessian = bstf.curvature.hessian_diagonal(model, places, (x, y), LOSS, probes=1, seed=5)
    signs = np.random.default_rng(5)
    vectors = [signs.integers(0, 2, vector.shape).astype("float32") * 2 - 1 for vector in vectors]
    again = objective.hessian_product(batch, vectors)[1]
    for name, vector, product in zip(("conv", "class"), vectors, again):
        np.testing.assert_allclose(hessian[name], vector * product, **close)


def test_a_criterion_of_the_loss_in_fit():
    model = bstf.sparsify(two_layers(), block=4, ratio=0)
    x, y = data(8)
    model.compile("adam", LOSS)
    sparsity = BlockSparsity(Cubic(0.5, end=1), "hessian", data=(x, y))
    model.fit(x, y, epochs=2, verbose=0, callbacks=[sparsity, Watch()])
    assert bstf.report(model).ratio == pytest.approx(0.5, abs=0.05)


def test_networks_of_applications():
    small_images = applications.efficientnet_lite0((32, 32, 3))
    for model in (applications.cifar_resnet(8), small_images, applications.small_resnet()):
        assert 0.4 < bstf.report(bstf.sparsify(model, block=8, ratio=0.5)).ratio <= 0.5


@keras.saving.register_keras_serializable("test")
class Residual(layers.Layer):
    def __init__(self, channels, **kwargs):
        super().__init__(**kwargs)
        self.steps = [layers.Conv2D(channels, 3, padding="same"), layers.Conv2D(channels, 1)]

    def call(self, x):
        for step in self.steps:
            x = x + step(x)
        return x


@keras.saving.register_keras_serializable("test")
class Subclassed(keras.Model):
    """Lists, a dictionary with a tuple, a shared layer, a Sequential, a functional and a subclassed model in it."""

    def __init__(self, masked=False, **kwargs):
        super().__init__(**kwargs)
        self.stem = layers.Conv2D(16, 3)
        self.blocks = [Residual(16), Residual(16)]
        self.heads = {"pair": (layers.Dense(16), layers.Dense(16))}
        self.shared = layers.Dense(16)
        self.again = self.shared
        self.line = keras.Sequential([layers.Dense(16, activation="relu"), layers.Dense(16)])
        inputs = keras.Input((16,))
        self.graph = keras.Model(inputs, layers.Dense(16, name="in_graph")(inputs))
        self.last = layers.Dense(10)
        self.masked = masked
        if masked:
            bstf.sparsify_layers(self)

    def call(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.again(self.shared(ops.mean(x, (1, 2))))
        for head in self.heads["pair"]:
            x = head(x)
        return self.last(self.graph(self.line(x)))

    def get_config(self):
        return {**super().get_config(), "masked": self.masked}


def test_a_subclassed_model_trains_and_its_weights_are_loaded_again(tmp_path):
    model = Subclassed()
    bstf.sparsify_layers(model, block=8)
    assert model.again is model.shared
    x, y = data(32)
    model.compile(OPTIMIZERS["adamw"](), LOSS)
    model.fit(x, y, 8, 4, verbose=0, callbacks=[BlockSparsity(Cubic(0.5, end=2)), Watch()])
    rows = bstf.report(model).layers
    assert len(rows) == len(masked_places(model)) == 12 and len({row.layer for row in rows}) == 12
    assert rows[0].gamma == (1, 2) and rows[0].zeros == 0  # one row of blocks: each column needs its block
    assert all(row.zeros == 2 and row.gamma == (2, 2) for row in rows[1:])
    expected = model.predict(x, verbose=0)
    model.save_weights(tmp_path / "m.weights.h5")
    fresh = Subclassed(masked=True)
    fresh(x[:1])
    fresh.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_allclose(fresh.predict(x, verbose=0), expected, rtol=1e-5, atol=1e-6)
    assert_sacred(fresh)
    fresh.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), expected, rtol=1e-5, atol=1e-6)
    assert bstf.report(loaded).to_dict()["zeros"] == bstf.report(model).zeros


def test_a_subclassed_model_that_has_weights_keeps_them():
    model = Subclassed()
    x, _ = data()
    expected = model.predict(x, verbose=0)
    bstf.sparsify_layers(model)
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)
    bstf.prune(model, 0.5)
    assert_sacred(model)
    assert bstf.report(model).zeros == 22
    assert np.abs(model.predict(x, verbose=0) - expected).max() > 1e-3


@pytest.mark.skipif(BACKEND == "tensorflow", reason="which exports")
def test_other_backends_export_nothing(tmp_path):
    with pytest.raises(ValueError, match=f"runs on {BACKEND}, and only TensorFlow exports"):
        bstf.export(two_layers(), tmp_path / "model")
    assert not list(tmp_path.iterdir())
