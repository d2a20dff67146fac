"""Every masked layer: Keras' own layer tests, equality with the plain layer, the road from model to SavedModel."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers
from keras.src.testing import TestCase  # the checks that Keras runs on its own layers

import bstf
from bstf.blocks import nonzero_blocks
from bstf.places import MASKED, effective_kernel

# Name: arguments, input shape of a batch of 2, output shape, kernel plane (..., cin, cout).
CASES = {
    "Conv1D": ({"filters": 20, "kernel_size": 3, "padding": "causal"}, (7, 12), (7, 20), (3, 12, 20)),
    "Conv2D": ({"filters": 20, "kernel_size": (3, 2), "strides": 2}, (7, 6, 12), (3, 3, 20), (3, 2, 12, 20)),
    "Conv3D": ({"filters": 20, "kernel_size": 2, "padding": "same"}, (4, 3, 5, 12), (4, 3, 5, 20), (2, 2, 2, 12, 20)),
    "Conv2DTranspose": (
        {"filters": 20, "kernel_size": 3, "strides": 2, "padding": "same"},
        (4, 5, 12),
        (8, 10, 20),
        (3, 3, 12, 20),
    ),
    "SeparableConv2D": (
        {"filters": 20, "kernel_size": 3, "depth_multiplier": 2},
        (5, 6, 6),
        (3, 4, 20),
        (1, 1, 12, 20),
    ),
    "Dense": ({"units": 20}, (12,), (20,), (12, 20)),
    "EinsumDense": (
        {"equation": "abc,cde->abde", "output_shape": (7, 4, 5), "bias_axes": "de"},
        (7, 12),
        (7, 4, 5),
        (12, 20),
    ),
}
GAMMA = np.array([[1, 0, 1], [0, 1, 0]])
LOSS = "mse"
each_layer = pytest.mark.parametrize("name", CASES)


def plain_of(name):
    return getattr(layers, name)


def masked_of(name):
    return getattr(bstf, f"Masked{name}")


def model_of(name, masked=False, sequential=False, **kwargs):
    arguments, shape, *_ = CASES[name]
    kind = masked_of(name) if masked else plain_of(name)
    layer = kind(name="it", **arguments, **kwargs)
    if sequential:
        return keras.Sequential([keras.Input(shape), layer])
    inputs = keras.Input(shape)
    return keras.Model(inputs, layer(inputs))


def data_of(name, n=8):
    _, shape, out, _ = CASES[name]
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, *shape)).astype("float32"), rng.normal(size=(n, *out)).astype("float32")


def masked_by_hand(name, kernel, gamma=GAMMA, block=(8, 8)):
    """A kernel as Keras stores it, zero where Γ is: written out for each order of axes."""
    mask = np.kron(gamma, np.ones(block))[:12, :20]
    if name == "Conv2DTranspose":
        mask = mask.T
    if name == "EinsumDense":
        mask = mask.reshape(12, 4, 5)
    return kernel * mask


def stored(layer):
    return layer.pointwise_kernel if isinstance(layer, layers.SeparableConv2D) else layer.kernel


def test_every_masked_layer_has_a_case():
    assert {plain.__name__ for plain in MASKED} == set(CASES)


class TestKerasOwnChecks(TestCase):
    @parameterized.parameters(*CASES)
    def test_layer(self, name):
        arguments, shape, out, _ = CASES[name]
        regularizer = "pointwise_regularizer" if name == "SeparableConv2D" else "kernel_regularizer"
        self.run_layer_test(
            masked_of(name),
            init_kwargs={**arguments, "block": (8, 4), regularizer: "l2"},
            input_shape=(2, *shape),
            expected_output_shape=(2, *out),
            expected_num_trainable_weights=3 if name == "SeparableConv2D" else 2,
            expected_num_non_trainable_weights=1,
            expected_num_seed_generators=0,
            expected_num_losses=1,
            supports_masking=name == "Dense",
        )


@each_layer
@pytest.mark.parametrize("sequential", [False, True])
def test_it_is_the_plain_layer_on_a_masked_kernel(name, sequential, tmp_path):
    model = model_of(name, masked=True, sequential=sequential, bias_initializer="normal", activation="tanh")
    plain = model_of(name, sequential=sequential, activation="tanh")
    layer, twin = model.get_layer("it"), plain.get_layer("it")
    assert layer.gamma.shape == GAMMA.shape and effective_kernel(layer).shape == CASES[name][3]
    bstf.conversion.transfer_weights(layer, twin)
    x, _ = data_of(name)
    np.testing.assert_array_equal(model(x), plain(x))
    before = stored(layer).numpy()
    layer.set_gamma(GAMMA)
    stored(twin).assign(masked_by_hand(name, before))
    np.testing.assert_array_equal(layer.masked_kernel(), stored(twin))
    np.testing.assert_array_equal(stored(layer), stored(twin))
    np.testing.assert_array_equal(model(x), plain(x))
    np.testing.assert_array_equal(nonzero_blocks(effective_kernel(layer), layer.block), GAMMA)
    dense = bstf.densify(model)
    assert type(dense.get_layer("it")) is plain_of(name)
    np.testing.assert_array_equal(dense(x), model(x))


@each_layer
def test_sparsify_scores_blocks_of_the_plane(name):
    model = model_of(name)
    layer = model.get_layer("it")
    weak = masked_by_hand(name, np.ones(stored(layer).shape), GAMMA) + 0.01
    stored(layer).assign(stored(layer) * weak)
    sparse = bstf.sparsify(model, ratio=0.5)
    assert type(sparse.get_layer("it")) is masked_of(name)
    np.testing.assert_array_equal(sparse.get_layer("it").gamma, GAMMA)
    np.testing.assert_array_equal(bstf.sparsify(sparse, ratio=0.5).get_layer("it").gamma, GAMMA)


@each_layer
def test_report_counts_multiply_adds(name):
    sparse = bstf.sparsify(model_of(name), ratio=0.5)
    (row,) = bstf.report(sparse).layers
    *_, out, kernel = CASES[name]
    assert row.kernel == kernel and row.gamma == (2, 3) and row.zeros == 3 and row.skipped == ""
    places = {"Dense": 1, "EinsumDense": 7, "Conv2DTranspose": 4 * 5}.get(name, int(np.prod(out[:-1])))
    depthwise = places * 3 * 3 * 6 * 2 if name == "SeparableConv2D" else 0
    assert row.dense_macs == places * np.prod(kernel) + depthwise
    kept = np.count_nonzero(effective_kernel(sparse.get_layer("it")))
    assert row.macs == places * kept + depthwise


@each_layer
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16"])
def test_dtype_policies(name, policy):
    model = model_of(name, masked=True, dtype=policy)
    layer = model.get_layer("it")
    layer.set_gamma(GAMMA)
    assert layer.gamma.dtype == "float32" and layer.compute_dtype == keras.DTypePolicy(policy).compute_dtype
    x, y = data_of(name)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), LOSS)
    model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    assert model(x).dtype == layer.compute_dtype
    kernel = stored(layer).numpy().astype("float32")
    assert np.isfinite(kernel).all()
    np.testing.assert_array_equal(masked_by_hand(name, kernel), kernel)


@each_layer
def test_save_load_and_export(name, tmp_path):
    model = model_of(name, masked=True, bias_initializer="normal")
    model.get_layer("it").set_gamma(GAMMA)
    x, y = data_of(name)
    model.compile("adam", LOSS)
    model.fit(x, y, verbose=0)
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    fresh = model_of(name, masked=True)
    fresh.load_weights(tmp_path / "m.weights.h5")
    copied = model_of(name, masked=True)
    copied.set_weights(model.get_weights())
    for again in (loaded, fresh, copied):
        np.testing.assert_array_equal(again.predict(x, verbose=0), expected)
        np.testing.assert_array_equal(again.get_layer("it").gamma, GAMMA)
    bstf.export(model, tmp_path / "saved")
    read = tf.saved_model.load(tmp_path / "saved")
    np.testing.assert_allclose(read.serve(x), expected, rtol=1e-5, atol=1e-5)
    kernel = next(v.numpy() for v in read.variables if v.shape == stored(model.get_layer("it")).shape)
    np.testing.assert_array_equal(masked_by_hand(name, kernel), kernel)
    assert np.count_nonzero(kernel) == kernel.size * masked_by_hand(name, np.ones(kernel.shape)).mean()


@each_layer
@pytest.mark.parametrize("importance", ["wanda", "taylor", "fisher", "hessian"])
def test_criteria_of_data(name, importance):
    """Blocks whose inputs are always zero go first, where the criterion sees what the kernel multiplies."""
    x, y = data_of(name)
    x[..., 8 // (2 if name == "SeparableConv2D" else 1) :] = 0
    sparse = bstf.sparsify(model_of(name), ratio=0.5, importance=importance, data=(x, y), loss=LOSS, min_per_line=0)
    np.testing.assert_array_equal(sparse.get_layer("it").gamma, [[1, 1, 1], [0, 0, 0]])


@each_layer
def test_recover_gives_back_what_kept_blocks_can(name):
    """Outputs that a dense kernel makes of the inputs of kept blocks alone are met again from any other kernel."""
    sparse = bstf.sparsify(model_of(name), ratio=0.5)
    dense = bstf.densify(sparse)
    rng = np.random.default_rng(0)
    layer = sparse.get_layer("it")
    stored(layer).assign(layer._mask(stored(layer) + rng.normal(size=stored(layer).shape).astype("float32")))
    x, _ = data_of(name, 256)
    assert np.abs(sparse(x) - dense(x)).max() > 0.1
    bstf.recover(sparse, x, dense, damping=1e-9)
    np.testing.assert_allclose(sparse(x), dense(x), rtol=1e-3, atol=1e-3)
    kernel = stored(layer).numpy()
    assert not effective_kernel(layer)[..., np.kron(np.asarray(layer.gamma), np.ones((8, 8)))[:12, :20] == 0].any()
    np.testing.assert_array_equal(layer.masked_kernel(), kernel)


@each_layer
def test_auto_ratio_meets_its_target(name):
    x, y = data_of(name)
    sparse = bstf.sparsify(model_of(name), 4, "auto", data=(x, y), loss=LOSS, target_macs=0.7)
    report = bstf.report(sparse)
    assert report.macs <= 0.7 * report.dense_macs


@pytest.mark.parametrize("name", ["Conv2D", "Conv3D", "Conv2DTranspose", "SeparableConv2D", "Conv1D"])
def test_channels_first(name):
    arguments, shape, _, kernel = CASES[name]
    arguments = {**arguments, "padding": "valid"}
    first = masked_of(name)(**arguments, data_format="channels_first", bias_initializer="normal")
    last = masked_of(name)(**arguments, bias_initializer="normal")
    last.build((None, *shape))
    first.build((None, shape[-1], *shape[:-1]))
    assert first.gamma.shape == last.gamma.shape == (2, 3)
    first.set_weights(last.get_weights())
    outputs = first.compute_output_spec(keras.KerasTensor((2, shape[-1], *shape[:-1])))
    assert outputs.shape[1] == 20 and effective_kernel(first).shape == kernel


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 4),
    width=st.integers(1, 6),
    cin=st.integers(1, 9),
    block=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 99),
    equation=st.sampled_from(["...c,chw->...hw", "abhw,hwc->abc", "abhw,chw->abc", "abhw,wch->abc", "abc,hcw->abwh"]),
)
def test_equations_of_one_matrix(heads, width, cin, block, seed, equation):
    rng = np.random.default_rng(seed)
    sizes = {"a": 2, "b": 3, "h": heads, "w": width, "c": cin}
    inputs, outputs = equation.split(",")[0], equation.split("->")[1]
    x = rng.normal(size=[sizes[label] for label in inputs.replace("...", "ab")]).astype("float32")
    shape = [sizes[label] for label in outputs.replace("...", "ab")]
    layer = bstf.MaskedEinsumDense(equation, shape[2:] if "." in equation else shape[1:], block=block)
    layer.build(x.shape)
    kernel = effective_kernel(layer)
    assert kernel.ndim == 2 and kernel.size == np.prod([sizes[label] for label in equation.split(",")[1].split("-")[0]])
    gamma = rng.integers(0, 2, layer.gamma.shape)
    layer.set_gamma(gamma)
    mask = np.kron(gamma, np.ones(block))[: kernel.shape[0], : kernel.shape[1]]
    np.testing.assert_array_equal(effective_kernel(layer), kernel * mask)
    term = equation.split(",")[1].split("->")[0]
    ins = [label for label in term if label in inputs]
    rows = np.einsum(f"{inputs.replace('...', 'ab')}->ab{''.join(ins)}", x).reshape(6, -1)
    outs = [label for label in term if label not in inputs]
    expected = (rows @ (kernel * mask)).reshape(2, 3, *(sizes[label] for label in outs))
    expected = np.einsum(f"ab{''.join(outs)}->{outputs.replace('...', 'ab')}", expected)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "equation, shape, sentence",
    [
        ("abc,bcd->abd", (3, 8), r"grouped \(a matrix for each 'b' of its equation abc,bcd->abd\)"),
        ("abc,c->abc", (3, 8), r"grouped \(a matrix for each 'c'"),
        ("abc,cd->ad", (8,), r"no product alone \(equation abc,cd->ad adds up over 'b'\)"),
        ("ab,cd->abcd", (8, 8, 8), "no matrix of inputs and outputs"),
    ],
)
def test_equations_that_are_no_matrix(equation, shape, sentence):
    with pytest.raises(
        ValueError, match=f"Layer 'e' can't have a Γ, .*{sentence}.*. Keep it as keras.layers.EinsumDense"
    ):
        bstf.MaskedEinsumDense(equation, shape, name="e")
    if equation.startswith("abc,bcd"):
        model = keras.Sequential([keras.Input((3, 8)), layers.EinsumDense(equation, shape, name="e")])
        assert bstf.report(bstf.sparsify(model)).layers[0].skipped.startswith("grouped (a matrix for each 'b'")


def test_lora_of_an_einsum_dense(tmp_path):
    model = model_of("EinsumDense", masked=True, lora_rank=2)
    layer = model.get_layer("it")
    layer.set_gamma(GAMMA)
    x, y = data_of("EinsumDense")
    model.compile("adam", LOSS)
    model.fit(x, y, verbose=0)
    kernel = np.asarray(layer.masked_kernel())
    np.testing.assert_array_equal(masked_by_hand("EinsumDense", kernel), kernel)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        masked_by_hand("EinsumDense", loaded.get_layer("it")._kernel), loaded.get_layer("it")._kernel
    )


def test_a_user_constraint_and_regulariser_of_the_pointwise_kernel():
    layer = bstf.MaskedSeparableConv2D(
        20, 3, depth_multiplier=2, pointwise_constraint="non_neg", pointwise_regularizer="l1", name="it"
    )
    model = keras.Sequential([keras.Input((5, 6, 6)), layer])
    layer.set_gamma(GAMMA)
    x, y = data_of("SeparableConv2D")
    kernel = layer.pointwise_kernel.numpy()
    assert float(sum(model.losses)) == pytest.approx(0.01 * np.abs(kernel).sum(), rel=1e-5)
    model.compile("adam", LOSS)
    model.fit(x, y, verbose=0)
    kernel = layer.pointwise_kernel.numpy()
    assert (kernel >= 0).all() and kernel.any()
    np.testing.assert_array_equal(masked_by_hand("SeparableConv2D", kernel), kernel)
    assert (layer.depthwise_kernel.numpy() < 0).any()


def test_quantised_separable_convolution_keeps_its_zeros():
    inputs = keras.Input((8, 8, 8))
    x = layers.SeparableConv2D(24, 3, activation="relu", name="sep")(inputs)
    model = keras.Model(inputs, layers.Dense(10, name="d")(layers.GlobalAveragePooling2D()(x)))
    sparse = bstf.sparsify(model, ratio=0.5)
    images = np.random.default_rng(0).normal(size=(16, 8, 8, 8)).astype("float32")
    sparse = bstf.sparsify(model, (4, 8), ratio=0.5)
    quantised = bstf.quantize(sparse, images)
    kernel = quantised.get_layer("sep").kernel.numpy()
    gamma = np.asarray(sparse.get_layer("sep").gamma)
    assert quantised.get_layer("sep").block == (4, 8)
    assert not (nonzero_blocks(kernel, sparse.get_layer("sep").block) & (gamma == 0)).any() and (gamma == 0).sum() == 3
