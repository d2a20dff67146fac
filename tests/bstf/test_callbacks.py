"""BlockSparsity: the schedule is met, dead blocks stay dead and nothing moves under them, whatever trains."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from keras import ops

import bstf
from bstf.callbacks import BlockSparsity
from bstf.schedules import Cubic, OneShot, Steps
from bstf.selection import kept_blocks

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
OPTIMIZERS = {
    "momentum": lambda **kw: keras.optimizers.SGD(0.05, momentum=0.9, **kw),
    "adam": lambda **kw: keras.optimizers.Adam(0.01, **kw),
    "adamw": lambda **kw: keras.optimizers.AdamW(0.01, weight_decay=0.1, **kw),
    "lion": lambda **kw: keras.optimizers.Lion(0.003, weight_decay=0.1, **kw),
    "rmsprop": lambda **kw: keras.optimizers.RMSprop(0.01, momentum=0.9, centered=True, **kw),
    "adagrad": lambda **kw: keras.optimizers.Adagrad(0.05, **kw),
    "muon": lambda **kw: keras.optimizers.Muon(0.01, **kw),
}


def dense_model(policy="float32", cin=12, cout=20, block_norm=True):
    inputs = keras.Input((6, 6, cin))
    x = keras.layers.Conv2D(cout, 3, dtype=policy, name="conv")(inputs)
    x = keras.layers.BatchNormalization(dtype=policy, name="bn")(x) if block_norm else x
    x = keras.layers.GlobalAveragePooling2D(dtype=policy)(keras.layers.ReLU(dtype=policy)(x))
    return keras.Model(inputs, keras.layers.Dense(10, dtype=policy, name="dense")(x))


def masked_model(block=4, **kwargs):
    keras.utils.set_random_seed(1)
    return bstf.sparsify(dense_model(**kwargs), block=block, ratio=0)


def data(n=32, cin=12):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 6, 6, cin)).astype("float32"), rng.integers(0, 10, n)


def gammas(model):
    return {name: ops.convert_to_numpy(model.get_layer(name).gamma).copy() for name in ("conv", "dense")}


def zeros(model):
    return {name: int((gamma == 0).sum()) for name, gamma in gammas(model).items()}


def assert_sacred(model, optimizer):
    """Zero under Γ: the kernel that is stored, the one computed with, and every slot of its shape."""
    for name in ("conv", "dense"):
        layer = model.get_layer(name)
        shape = tuple(layer._kernel.shape)
        dead = np.broadcast_to(
            np.kron(np.asarray(layer.gamma), np.ones(layer.block))[: shape[-2], : shape[-1]] == 0, shape
        )
        assert not np.asarray(layer._kernel)[dead].any()
        assert not ops.convert_to_numpy(ops.cast(layer.masked_kernel(), "float32"))[dead].any()
        slots = [v for v in optimizer.variables if tuple(v.shape) == shape]
        assert slots or not optimizer.built
        for slot in slots:
            assert not np.asarray(slot)[dead].any(), slot.path


class Watch(keras.callbacks.Callback):
    """Asserts the contract before and after every step; collects Γ."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_begin(self, batch, logs=None):
        assert_sacred(self.model, self.model.optimizer)
        self.seen.append(gammas(self.model))

    def on_train_batch_end(self, batch, logs=None):
        assert_sacred(self.model, self.model.optimizer)

    def on_train_end(self, logs=None):
        assert_sacred(self.model, self.model.optimizer)


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])  # one takes seconds
@given(
    name=st.sampled_from(sorted({*OPTIMIZERS} - {"muon"})),
    policy=st.sampled_from(["float32", "mixed_float16", "mixed_bfloat16"]),
    kwargs=st.sampled_from(
        [{}, {"clipnorm": 0.1}, {"global_clipnorm": 0.1}, {"clipvalue": 0.01}, {"use_ema": True, "ema_momentum": 0.8}]
        + [{"use_ema": True, "ema_overwrite_frequency": 2}, {"gradient_accumulation_steps": 2}]
    ),
    block=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    ratio=st.floats(0.1, 0.8),
    unit=st.sampled_from(["epoch", "step"]),
)
def test_zeros_are_sacred(name, policy, kwargs, block, ratio, unit):
    model = masked_model(block, policy=policy, cin=9, cout=11)
    optimizer = OPTIMIZERS[name](**kwargs)
    if policy == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=64.0, dynamic_growth_steps=2)
    model.compile(optimizer, LOSS, run_eagerly=True)
    x, y = data(24, cin=9)
    watch = Watch()
    model.fit(x, y, 8, 3, verbose=0, callbacks=[BlockSparsity(Cubic(ratio, end=2), unit=unit), watch])
    assert model.optimizer.iterations > 0
    for before, after in itertools.pairwise(watch.seen):
        assert all((after[layer] <= before[layer]).all() for layer in after)
    for gamma in gammas(model).values():
        assert gamma.sum() == kept_blocks(*gamma.shape, ratio) and gamma.any(axis=0).all() and gamma.any(axis=1).all()
    plain = bstf.densify(model)
    for layer, gamma in gammas(model).items():
        kernel = np.asarray(plain.get_layer(layer).kernel)
        np.testing.assert_array_equal(bstf.blocks.nonzero_blocks(kernel, model.get_layer(layer).block), gamma != 0)


# XLA compiles for long; what optimizers differ in is seen without it.
@pytest.mark.parametrize("name, jit", [*((name, False) for name in OPTIMIZERS), ("adam", True), ("muon", True)])
def test_compiled_training(name, jit, tmp_path):
    model = masked_model()
    model.compile(OPTIMIZERS[name](), LOSS, jit_compile=jit)
    x, y = data()
    model.fit(x, y, 8, 3, verbose=0, callbacks=[BlockSparsity(Steps(0.5, every=1, fraction=0.2)), Watch()])
    assert zeros(model) == {"conv": 8, "dense": 8}  # of 15
    if name == "adam":
        bstf.export(model, tmp_path / "m")
        loaded = tf.saved_model.load(tmp_path / "m")
        np.testing.assert_allclose(loaded.serve(x), model.predict(x, verbose=0), rtol=1e-4, atol=1e-5)
        kernels = [v.numpy() for v in loaded.variables if v.shape == (3, 3, 12, 20)]
        assert len(kernels) == 1
        found = bstf.blocks.nonzero_blocks(kernels[0], model.get_layer("conv").block)
        np.testing.assert_array_equal(found, gammas(model)["conv"] != 0)


@pytest.mark.parametrize("name", sorted({*OPTIMIZERS} - {"muon"}))
def test_a_custom_loop(name):
    model, optimizer = masked_model(), OPTIMIZERS[name](use_ema=True)
    sparsity = BlockSparsity(Cubic(0.5, end=6, every=2))
    x, y = data()
    for step in range(8):
        sparsity.step(step, model, optimizer)
        assert_sacred(model, optimizer)
        with tf.GradientTape() as tape:
            loss = LOSS(y, model(x, training=True))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        assert_sacred(model, optimizer)
    optimizer.finalize_variable_values(model.trainable_variables)
    assert_sacred(model, optimizer)
    assert zeros(model) == {"conv": 8, "dense": 8}


def test_optimizers_that_divide_by_empty_slots_or_hold_other_optimizers():
    x, y = data(24)
    by_path = keras.optimizers.OptimizerMap(
        keras.optimizers.SGD(0.1, momentum=0.9), {".*dense.*": keras.optimizers.Adam(0.01)}
    )
    for optimizer in (keras.optimizers.Ftrl(0.01), keras.optimizers.MultiOptimizer(by_path)):
        model = masked_model()
        model.compile(optimizer, LOSS, run_eagerly=True)
        model.fit(x, y, 8, 3, verbose=0, callbacks=[BlockSparsity(Cubic(0.5, end=2)), Watch()])
        assert all(np.isfinite(weight).all() for weight in model.get_weights())


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_optimizers_that_write_under_dead_blocks_are_cleared(name):
    model, (x, y) = masked_model(), data(16)
    make = {"muon": keras.optimizers.Muon, "adafactor": keras.optimizers.Adafactor}[name]
    model.compile(make(0.01, use_ema=True, ema_momentum=0.5), LOSS)
    before = gammas(model)

    class AtTheEnd(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            assert_sacred(self.model, self.model.optimizer)

    model.fit(x, y, 8, 3, verbose=0, callbacks=[BlockSparsity(OneShot(0.5, at=1)), AtTheEnd()])
    assert_sacred(model, model.optimizer)
    assert zeros(model) == {"conv": 8, "dense": 8} and all(gamma.all() for gamma in before.values())


class Interrupt(keras.callbacks.Callback):
    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise InterruptedError


@pytest.mark.parametrize(
    "name, unit, schedule",
    [("momentum", "epoch", Steps(0.6, every=2, fraction=0.2)), ("adam", "step", Cubic(0.6, end=20))],
)
def test_resumed_training_is_the_uninterrupted_one(tmp_path, name, unit, schedule):
    x, y = data()

    def compiled():
        model = masked_model()
        model.compile(OPTIMIZERS[name](use_ema=name == "adam"), LOSS)
        return model

    def fit(model, *callbacks, **kwargs):
        callbacks = [*callbacks, BlockSparsity(schedule, unit=unit)]
        model.fit(x, y, 8, 6, shuffle=False, verbose=0, callbacks=callbacks, **kwargs)
        return model

    whole, stopped = fit(compiled()), compiled()
    with pytest.raises(InterruptedError):
        fit(stopped, keras.callbacks.BackupAndRestore(tmp_path / "backup"), Interrupt(3))
    restored = fit(compiled(), keras.callbacks.BackupAndRestore(tmp_path / "backup"))

    assert 0 < zeros(stopped)["conv"] < zeros(whole)["conv"]
    stopped.save(tmp_path / "m.keras")
    loaded = fit(keras.models.load_model(tmp_path / "m.keras"), initial_epoch=3)
    for again in (restored, loaded):
        for one, other in zip(whole.weights, again.weights):
            np.testing.assert_array_equal(one, other, err_msg=one.path)
        assert_sacred(again, again.optimizer)


def test_the_history_has_the_ratio():
    model = masked_model()
    model.compile("sgd", LOSS)
    sparsity = BlockSparsity(OneShot(0.4, at=1))
    history = model.fit(*data(), epochs=3, verbose=0, callbacks=[sparsity])
    assert history.history["block_ratio"] == pytest.approx([0, 0.4, 0.4])
    model.fit(*data(), epochs=3, initial_epoch=3, verbose=0, callbacks=[sparsity])  # nothing left to train


def test_a_schedule_longer_than_the_training_warns():
    model = masked_model()
    model.compile("sgd", LOSS)
    with pytest.warns(UserWarning, match=r"ended after epoch 1, where the schedule is at ratio 0\.438 of 0\.5"):
        model.fit(*data(), epochs=2, verbose=0, callbacks=[BlockSparsity(Cubic(0.5, end=2, every=1, initial=0.0))])


def test_a_sparser_model_is_left_as_it_is_until_the_schedule_passes_it():
    model = bstf.sparsify(dense_model(), block=4, ratio=0.4)
    before = gammas(model)
    BlockSparsity(OneShot(0.3)).step(0, model)
    for name, gamma in gammas(model).items():
        np.testing.assert_array_equal(gamma, before[name])
    BlockSparsity(OneShot(0.6)).step(0, model)
    assert zeros(model) == {"conv": 9, "dense": 9}


@pytest.mark.parametrize("scope", ["column", "row", "global"])
def test_every_scope_takes_more_blocks_and_revives_none(scope):
    model = masked_model(block=2)
    sparsity = BlockSparsity(Cubic(0.6, end=4), scope=scope)
    before = gammas(model)
    for time in range(5):
        sparsity.step(time, model)
        after = gammas(model)
        assert all((after[name] <= before[name]).all() for name in after)
        before = after
    if scope == "global":
        assert sum(zeros(model).values()) == round(0.6 * sum(gamma.size for gamma in before.values()))
    else:
        for gamma in before.values():
            counts = gamma.sum(axis=0 if scope == "column" else 1)
            assert len(set(counts)) == 1
            assert counts[0] == len(gamma if scope == "column" else gamma.T) - np.floor(
                0.6 * (gamma.shape[0 if scope == "column" else 1]) + 0.5
            )


@pytest.mark.parametrize("scope", ["layer", "column", "row", "global"])
def test_blocks_are_scored_only_when_some_go(monkeypatch, scope):
    model, calls = masked_model(block=(2, 8)), []
    real = bstf.in_place.model_scores
    monkeypatch.setattr(bstf.in_place, "model_scores", lambda *args, **kw: calls.append(1) or real(*args, **kw))
    sparsity = BlockSparsity(OneShot(0.28), scope=scope)
    for time in range(4):
        sparsity.step(time, model)
    assert len(calls) == 1


def test_masked_layers_inside_other_layers():
    class Outer(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = bstf.MaskedDense(8, block=4, name="inner")

        def call(self, x):
            return self.inner(x)

    inputs = keras.Input((8,))
    model = keras.Model(inputs, bstf.MaskedDense(8, block=4, name="last")(Outer()(inputs)))
    BlockSparsity(OneShot(0.5)).step(0, model)
    assert [row.zeros for row in bstf.report(model).layers] == [2, 2]


def test_criteria_may_look_at_data():
    model, (x, y) = masked_model(), data()
    x[..., 4:8] = 0  # no loss depends on these inputs of the convolution
    BlockSparsity(OneShot(0.3), "taylor", data=(x, y), loss=LOSS, min_per_line=0).step(0, model)
    assert (gammas(model)["conv"][1] == 0).all()


@pytest.mark.parametrize(
    "make, error, sentence",
    [
        (lambda: BlockSparsity(0.5), TypeError, "schedule must be one of bstf.schedules"),
        (lambda: BlockSparsity(OneShot(0.5), unit="batch"), ValueError, "unit must be one of epoch, step; got 'batch'"),
        (lambda: BlockSparsity(OneShot(0.5), "size"), ValueError, "importance must be one of l1"),
        (lambda: BlockSparsity(OneShot(0.5), "fisher"), ValueError, "importance='fisher' compares blocks by what they"),
        (lambda: BlockSparsity(OneShot(0.5), data=iter([])), ValueError, "data is an iterator, which can be read once"),
        (lambda: BlockSparsity(OneShot(0.5), scope="no"), ValueError, "scope must be one of"),
        (lambda: BlockSparsity(OneShot(0.5), min_per_line=-1), ValueError, "min_per_line must be an integer"),
        (lambda: BlockSparsity(OneShot(0.5)).step(0, dense_model()), ValueError, "has no masked layer to make sparser"),
    ],
)
def test_errors_are_sentences(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make()
