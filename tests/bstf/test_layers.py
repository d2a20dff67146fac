"""Masked layers against TensorFlow on kernels masked by hand; what training and files do to the zeros."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from bstf.layers import MaskedConv2D, MaskedDense


def mask_of(gamma, block, cin, cout):
    return np.kron(gamma, np.ones(block))[:cin, :cout].astype("float32")


def sparse_model(dtype=None, regularizer=None):
    """A masked convolution and a masked dense layer with ragged blocks and zeros in both."""
    common = {"kernel_regularizer": regularizer, "dtype": dtype, "bias_initializer": "ones"}
    model = keras.Sequential(
        [
            keras.Input((6, 6, 12)),
            MaskedConv2D(20, 3, block=8, activation="relu", name="conv", **common),
            keras.layers.GlobalAveragePooling2D(dtype=dtype),
            MaskedDense(10, block=(8, 4), name="dense", **common),
        ]
    )
    model.get_layer("conv").set_gamma([[1, 0, 1], [0, 1, 0]])
    model.get_layer("dense").set_gamma([[1, 0, 1], [0, 1, 0], [0, 0, 1]])
    return model


def dead(layer):
    """Bool like the kernel: what Γ covers, worked out from its entries alone."""
    cin, cout = layer._kernel.shape[-2:]
    mask = mask_of(ops.convert_to_numpy(layer.gamma), layer.block, cin, cout)
    return np.broadcast_to(mask == 0, layer._kernel.shape)


def assert_zero(model):
    """Stored kernels and every slot of the optimizer of the same shape are zero where Γ is."""
    for layer in (model.get_layer("conv"), model.get_layer("dense")):
        covered = dead(layer)
        assert covered.any() and not ops.convert_to_numpy(layer._kernel)[covered].any()
        assert np.count_nonzero(ops.convert_to_numpy(layer._kernel)[~covered]) == (~covered).sum()
        slots = [v for v in model.optimizer.variables if tuple(v.shape) == layer._kernel.shape]
        assert slots
        for slot in slots:
            assert not ops.convert_to_numpy(slot)[covered].any(), slot.path


def data(n=32):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 6, 6, 12)).astype("float32"), rng.integers(0, 10, n)


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "nesterov": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "ema": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=2),
    "accumulated": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
}


@settings(max_examples=30, deadline=None)
@given(
    cin=st.integers(1, 19),
    cout=st.integers(1, 19),
    block=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.integers(1, 4),
    strides=st.integers(1, 3),
    padding=st.sampled_from(["same", "valid"]),
    seed=st.integers(0, 99),
)
def test_conv_equals_tensorflow(cin, cout, block, size, strides, padding, seed):
    rng = np.random.default_rng(seed)
    gamma = rng.integers(0, 2, (-(-cin // block[0]), -(-cout // block[1])))
    x = rng.normal(size=(2, 7, 6, cin)).astype("float32")
    layer = MaskedConv2D(cout, size, strides, padding, block=block, bias_initializer="glorot_normal")
    layer.build(x.shape)
    kernel = layer.kernel.numpy()
    layer.set_gamma(gamma)
    masked = kernel * mask_of(gamma, block, cin, cout)
    np.testing.assert_array_equal(layer.masked_kernel(), masked)
    expected = tf.nn.conv2d(x, masked, strides, padding.upper()) + layer.bias
    np.testing.assert_array_equal(layer(x), expected)


@settings(max_examples=20, deadline=None)
@given(cin=st.integers(1, 19), units=st.integers(1, 19), block=st.integers(1, 9), seed=st.integers(0, 99))
def test_dense_equals_numpy(cin, units, block, seed):
    rng = np.random.default_rng(seed)
    gamma = rng.integers(0, 2, (-(-cin // block), -(-units // block)))
    x = rng.normal(size=(3, 5, cin)).astype("float32")
    layer = MaskedDense(units, block=block, activation="tanh")
    layer.build(x.shape)
    kernel = layer.kernel.numpy() * mask_of(gamma, (block, block), cin, units)
    layer.set_gamma(gamma)
    np.testing.assert_allclose(layer(x), np.tanh(x @ kernel), rtol=1e-5, atol=1e-6)


def test_channels_first_shape():
    layer = MaskedConv2D(20, 3, data_format="channels_first", block=8)
    layer.build((None, 12, 9, 9))
    assert layer.gamma.shape == (2, 3)


def test_gamma_may_be_assigned_without_set_gamma():
    model = sparse_model()
    x, _ = data(2)
    layer = model.get_layer("conv")
    layer.gamma.assign(np.zeros((2, 3)))
    assert not np.asarray(model.layers[0](x) - 1).any()  # only the bias of 1 is left


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16", "float16"])
def test_gamma_is_float32_and_not_trained(policy, capsys):
    model = sparse_model(policy)
    for layer in (model.get_layer("conv"), model.get_layer("dense")):
        assert layer.gamma.dtype == "float32" and not layer.gamma.trainable
        assert any(v is layer.gamma for v in layer.non_trainable_variables)
        assert len(layer.trainable_variables) == 2
        layer.trainable = False
        layer.trainable = True
        assert not layer.gamma.trainable
    model.summary()
    assert "Non-trainable params: 15 (60.00 B)" in capsys.readouterr().out
    x, y = data()
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), LOSS)
    model.fit(x, y, epochs=1, verbose=0)
    assert model(x).dtype == keras.DTypePolicy(policy).compute_dtype
    for layer in (model.get_layer("conv"), model.get_layer("dense")):
        assert not ops.convert_to_numpy(layer._kernel)[dead(layer)].any()
        assert set(np.unique(layer.gamma)) == {0, 1}


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_keeps_weights_and_slots_zero(name, steps):
    model = sparse_model()
    x, y = data()
    model.compile(OPTIMIZERS[name](), LOSS)
    model.fit(x, y, batch_size=16, epochs=1, steps_per_epoch=min(steps, 2), verbose=0)
    for _ in range(steps // 3):
        model.fit(x, y, batch_size=16, verbose=0)
    assert_zero(model)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_jit_compiled_training(name):
    model = sparse_model()
    x, y = data()
    before = model.get_layer("conv").kernel.numpy()
    model.compile(OPTIMIZERS[name](), LOSS, jit_compile=True)
    model.fit(x, y, batch_size=16, epochs=2, verbose=0)
    assert_zero(model)
    assert (before != model.get_layer("conv").kernel.numpy()).any()


def test_custom_loop():
    model = sparse_model()
    x, y = data()
    model.optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1)
    for _ in range(3):
        with tf.GradientTape() as tape:
            loss = LOSS(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply(gradients, model.trainable_variables)
    assert_zero(model)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_dense_weights_put_under_the_mask_are_gone_after_a_step(name):
    model = sparse_model(regularizer=keras.regularizers.L1L2(0.01, 0.01))
    x, y = data()
    clean = model.predict(x, verbose=0)
    for layer in (model.get_layer("conv"), model.get_layer("dense")):
        kernel = layer.kernel.numpy()
        kernel[dead(layer)] = 7.0
        layer._kernel.assign(kernel)
    np.testing.assert_array_equal(model.predict(x, verbose=0), clean)
    loss_of_kept = sum(np.abs(v).sum() + np.square(v).sum() for v in kept_weights(model)) * 0.01
    assert float(sum(model.losses)) == pytest.approx(loss_of_kept, rel=1e-5)
    model.compile(OPTIMIZERS[name](), LOSS)
    model.fit(x, y, batch_size=32, verbose=0)
    assert_zero(model)


def kept_weights(model):
    layers = (model.get_layer("conv"), model.get_layer("dense"))
    return [layer.kernel.numpy()[~dead(layer)] for layer in layers]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_killing_a_block_in_the_middle_of_training(name):
    model = sparse_model()
    x, y = data(48)
    model.compile(OPTIMIZERS[name](), LOSS)
    model.fit(x, y, batch_size=16, verbose=0)
    conv = model.get_layer("conv")
    conv.set_gamma([[1, 0, 0], [0, 1, 0]], model.optimizer)
    assert_zero(model)
    model.fit(x, y, batch_size=16, verbose=0)
    assert_zero(model)


def test_killing_a_block_under_loss_scaling():
    model = sparse_model("mixed_float16")
    x, y = data()
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01), initial_scale=8.0), LOSS)
    model.fit(x, y, batch_size=16, verbose=0)
    model.get_layer("conv").set_gamma([[1, 0, 0], [0, 1, 0]], model.optimizer)
    assert_zero(model)
    model.fit(x, y, batch_size=16, verbose=0)
    assert_zero(model)


def test_slots_of_layers_of_the_same_path_are_told_apart():
    inner = [keras.Sequential([keras.Input((8,)), MaskedDense(8, block=4, name="same")], name=name) for name in "ab"]
    inputs = keras.Input((8,))
    model = keras.Model(inputs, inner[1](inner[0](inputs)))
    model.compile(OPTIMIZERS["sgd"](), "mse")
    model.fit(np.random.default_rng(0).normal(size=(8, 8)), np.ones((8, 8)), verbose=0)
    inner[1].get_layer("same").set_gamma(np.eye(2), model.optimizer)
    slots = [v.numpy() for v in model.optimizer.variables if v.shape == (8, 8)]
    assert [np.count_nonzero(slot) for slot in slots] == [64, 32]


def test_kernel_constraint_still_holds():
    layer = MaskedDense(16, block=8, kernel_constraint=keras.constraints.UnitNorm(axis=0))
    model = keras.Sequential([keras.Input((16,)), layer])
    layer.set_gamma([[1, 0], [1, 1]])
    model.compile(OPTIMIZERS["sgd"](), "mse")
    model.fit(np.random.default_rng(0).normal(size=(8, 16)), np.ones((8, 16)), verbose=0)
    np.testing.assert_allclose(np.linalg.norm(layer.kernel.numpy(), axis=0), np.ones(16), rtol=1e-5)
    assert not layer.kernel.numpy()[dead(layer)].any()
    assert layer.get_config()["kernel_constraint"]["class_name"] == "UnitNorm"


def test_lora_reaches_no_dead_block(tmp_path):
    model = sparse_model()
    x, y = data()
    for layer in (model.get_layer("conv"), model.get_layer("dense")):
        layer.enable_lora(2)
    model.compile(OPTIMIZERS["adamw"](), LOSS)
    model.fit(x, y, epochs=2, verbose=0)
    conv = model.get_layer("conv")
    assert conv.kernel.numpy()[dead(conv)].any()  # Keras' merged kernel, without Γ
    assert not np.asarray(conv.masked_kernel())[dead(conv)].any()
    model.save(tmp_path / "lora.keras")
    loaded = keras.models.load_model(tmp_path / "lora.keras")
    assert not loaded.get_layer("conv")._kernel.numpy()[dead(conv)].any()
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_round_trips(tmp_path, policy):
    model = sparse_model(policy)
    x, y = data()
    model.compile("adam", LOSS)
    model.fit(x, y, verbose=0)
    expected = model.predict(x, verbose=0)

    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)
    assert loaded.get_layer("dense").block == (8, 4)
    loaded.fit(x, y, verbose=0)
    assert_zero(loaded)

    model.save_weights(tmp_path / "m.weights.h5")
    fresh = keras.Sequential.from_config(model.get_config())
    fresh.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(fresh.predict(x, verbose=0), expected)

    copied = keras.Sequential.from_config(model.get_config())
    copied.set_weights(model.get_weights())
    np.testing.assert_array_equal(copied.predict(x, verbose=0), expected)
    for one in (loaded, fresh, copied):
        np.testing.assert_array_equal(one.get_layer("conv").gamma, model.get_layer("conv").gamma)


@pytest.mark.parametrize("layer", [MaskedConv2D(9, 3, 2, block=(8, 4), use_bias=False), MaskedDense(9, block=4)])
def test_config_rebuilds_the_layer(layer):
    again = type(layer).from_config(layer.get_config())
    assert again.get_config() == layer.get_config() and again.block == layer.block
    serialized = keras.saving.serialize_keras_object(layer)
    assert serialized["registered_name"] == f"bstf>{type(layer).__name__}"
    assert type(keras.saving.deserialize_keras_object(serialized)) is type(layer)


def test_export_of_masked_layers(tmp_path):
    model = sparse_model()
    x, _ = data()
    model.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "saved")
    np.testing.assert_allclose(loaded.serve(x), model.predict(x, verbose=0), rtol=1e-6, atol=1e-6)


def test_errors_are_sentences():
    with pytest.raises(
        ValueError, match=r"Layer 'g' can't have a Γ, .*: grouped \(groups=2\). Keep it as keras.layers.Conv2D"
    ):
        MaskedConv2D(8, 3, groups=2, name="g")
    with pytest.raises(ValueError, match="block must be a positive integer"):
        MaskedDense(8, block=0)
    layer = MaskedDense(16, name="d")
    with pytest.raises(ValueError, match="'d' has no Γ yet"):
        layer.set_gamma(np.ones((2, 2)))
    with pytest.raises(ValueError, match="'d' is built for an unknown number of input channels"):
        layer.build((None, None))
    layer.build((None, 16))
    with pytest.raises(ValueError, match=r"Γ of layer 'd' \(8x8 blocks\) is \(2, 2\); got \(3, 2\)"):
        layer.set_gamma(np.ones((3, 2)))
    with pytest.raises(ValueError, match="0 and 1 only"):
        layer.set_gamma(np.full((2, 2), 0.5))
