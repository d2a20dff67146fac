"""Statistics of the loss against finite differences, explicit tapes and a Hessian written out, in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from bstf import batches as batches_room
from bstf.batches import batches
from bstf.blocks import BlockShape
from bstf.curvature import hessian_diagonal, input_norm, mean_gradient, mean_square_gradient
from bstf.objective import Objective
from bstf.places import eligible, places

BLOCK = BlockShape(2, 2)
LOSS = "sparse_categorical_crossentropy"  # by name it stays in float64; compiled it is float32


def classifier(seed=0):
    """A model in a model, batch norm and dropout; float64, so that differences of the loss are exact enough."""
    keras.utils.set_random_seed(seed)
    make = {"dtype": "float64"}
    inner = keras.Sequential(
        [
            keras.Input((5, 5, 4), dtype="float64"),
            layers.Conv2D(6, 3, activation="tanh", name="conv", **make),
            layers.BatchNormalization(**make),
            layers.Dropout(0.5, **make),
        ],
        name="inner",
    )
    inputs = keras.Input((5, 5, 4), dtype="float64")
    x = layers.Flatten(**make)(inner(inputs))
    model = keras.Model(inputs, layers.Dense(3, activation="softmax", name="class", **make)(x))
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if "seed" not in weight.path:
            weight.assign(rng.uniform(0.1, 1.0, weight.shape) if "variance" in weight.path else weight + 0.1)
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def examples(count=7, seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, 5, 5, 4)), rng.integers(0, 3, count)


def loss_of(model, x, y):
    return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y, model(x, training=False)))


def kernels_of(model):
    return {path: layer.kernel for path, layer in eligible(model, BLOCK)}


def test_mean_gradient_is_the_slope_of_the_loss():
    model, (x, y) = classifier(), examples()
    gradients = mean_gradient(model, eligible(model, BLOCK), [(x[:4], y[:4]), (x[4:], y[4:])], LOSS)
    assert list(gradients) == ["inner/conv", "class"]
    rng = np.random.default_rng(0)
    for path, kernel in kernels_of(model).items():
        assert gradients[path].shape == tuple(kernel.shape) and gradients[path].dtype == np.float64
        start = kernel.numpy()
        for _ in range(5):
            at = tuple(rng.integers(0, size) for size in kernel.shape)
            step = np.zeros(kernel.shape)
            step[at] = 1e-5
            losses = []
            for sign in (1, -1):
                kernel.assign(start + sign * step)
                losses.append(float(loss_of(model, x, y)))
            kernel.assign(start)
            assert gradients[path][at] == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-6, abs=1e-9)


def test_mean_square_gradient_is_per_example():
    model, (x, y) = classifier(), examples()
    kernels = kernels_of(model)
    squares = {path: [] for path in kernels}
    for i in range(len(x)):
        with tf.GradientTape() as tape:
            loss = loss_of(model, x[i : i + 1], y[i : i + 1])
        for path, gradient in zip(kernels, tape.gradient(loss, [k.value for k in kernels.values()])):
            squares[path].append(gradient.numpy() ** 2)
    found = mean_square_gradient(model, eligible(model, BLOCK), [(x[:5], y[:5]), (x[5:], y[5:])], LOSS)
    means = mean_gradient(model, eligible(model, BLOCK), (x, y), LOSS)
    for path in kernels:
        np.testing.assert_allclose(found[path], np.mean(squares[path], axis=0), rtol=1e-10, atol=1e-15)
        assert (found[path] > means[path] ** 2).mean() > 0.9  # gradients of examples cancel in a batch


def test_squares_of_half_precision_are_neither_lost_nor_infinite():
    keras.utils.set_random_seed(0)
    for scale in (1e-4, 1e3):
        found = {}
        for dtype in ("float16", "float32"):
            model = keras.Sequential([keras.Input((8,)), layers.Dense(8, use_bias=False, dtype=dtype, name="dense")])
            model.set_weights([np.random.default_rng(0).normal(size=(8, 8)) / 8])
            x = np.random.default_rng(1).normal(size=(6, 8)).astype("float32")
            data = (x, np.zeros((6, 8), "float32"))

            def loss(y, outputs, scale=scale):
                return scale * keras.ops.mean(keras.ops.cast(outputs, "float32"), axis=-1)

            found[dtype] = mean_square_gradient(model, eligible(model, BLOCK), data, loss)["dense"]
        np.testing.assert_allclose(found["float16"], found["float32"], rtol=1e-2)
        assert (found["float32"] > 0).all()


def full_hessian(model, x, y):
    """The Hessian over all kernels, row by row of the gradient's Jacobian."""
    kernels = [kernel.value for kernel in kernels_of(model).values()]
    with tf.GradientTape(persistent=True) as outer:
        with tf.GradientTape() as inner:
            loss = loss_of(model, x, y)
        flat = tf.concat([tf.reshape(g, [-1]) for g in inner.gradient(loss, kernels)], 0)
    rows = outer.jacobian(flat, kernels, experimental_use_pfor=False)
    return np.concatenate([np.reshape(row, (len(flat), -1)) for row in rows], axis=1)


def tiny(seed=0):
    """Two layers, 16 + 12 weights."""
    rng = np.random.default_rng(seed)
    inputs = keras.Input((4,), dtype="float64")
    x = layers.Dense(4, activation="tanh", use_bias=False, dtype="float64", name="a")(inputs)
    model = keras.Model(inputs, layers.Dense(3, activation="softmax", dtype="float64", name="b")(x))
    model.set_weights([rng.normal(size=weight.shape) for weight in model.weights])
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model, (rng.normal(size=(6, 4)), rng.integers(0, 3, 6))


def test_products_with_the_hessian():
    model, (x, y) = tiny()
    hessian = full_hessian(model, x, y)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-12)
    vector = np.random.default_rng(3).normal(size=28)
    objective = Objective(model, [model.get_layer("a"), model.get_layer("b")], LOSS)
    (batch,) = batches((x, y), labels=True)
    loss, products = objective.hessian_product(batch, [vector[:16].reshape(4, 4), vector[16:].reshape(4, 3)])
    np.testing.assert_allclose(np.concatenate([p.ravel() for p in products]), hessian @ vector, atol=1e-12)
    assert loss == pytest.approx(float(loss_of(model, x, y)), rel=1e-12)


def test_hessian_diagonal_of_the_hessian_written_out():
    model, (x, y) = tiny()
    hessian = full_hessian(model, x, y)
    probes = 800
    found = hessian_diagonal(
        model, eligible(model, BLOCK), [(x[:4], y[:4]), (x[4:], y[4:])], LOSS, probes=probes, seed=5
    )
    found = np.concatenate([found[path].ravel() for path in ("a", "b")])
    # Var[z_i (Hz)_i] = sum over j != i of H_ij^2 for a batch; two batches average their own.
    halves = [full_hessian(model, x[:4], y[:4]), full_hessian(model, x[4:], y[4:])]
    variances = [((h - np.diag(np.diag(h))) ** 2).sum(axis=1) / probes for h in halves]
    deviation = np.sqrt((4 / 6) ** 2 * variances[0] + (2 / 6) ** 2 * variances[1])
    errors = np.abs(found - np.diag(hessian)) / deviation
    assert errors.max() < 5 and (errors < 2).mean() > 0.75
    assert deviation.mean() < 0.2 * np.abs(np.diag(hessian)).mean()  # else the bound would say nothing
    row_sums = hessian.sum(axis=1)  # what a gradient of summed gradients gives
    assert (np.abs(row_sums - np.diag(hessian)) / deviation > 5).mean() > 0.3


def test_hessian_is_exact_where_it_is_diagonal():
    """One output an input: loss = mean of (w x - y)^2 has the Hessian 2 x^2 / outputs on its diagonal alone."""
    inputs = keras.Input((1,), dtype="float64")
    model = keras.Model(inputs, layers.Dense(4, use_bias=False, dtype="float64", name="d")(inputs))
    x = np.array([[1.0], [2.0], [4.0]])
    (found,) = hessian_diagonal(
        model, eligible(model, BlockShape(1, 1)), (x, np.ones((3, 4))), "mse", probes=1
    ).values()
    np.testing.assert_allclose(found, np.full((1, 4), 2 * np.mean(x**2) / 4), rtol=1e-12)


@settings(max_examples=15, deadline=None)
@given(
    channels=st.integers(2, 5),
    filters=st.integers(2, 5),
    size=st.integers(3, 5),
    count=st.integers(1, 5),
    batch=st.integers(1, 5),
    channels_first=st.booleans(),
)
def test_input_norm(channels, filters, size, count, batch, channels_first):
    format = "channels_first" if channels_first else "channels_last"
    shape = (channels, size, size) if channels_first else (size, size, channels)
    conv = layers.Conv2D(filters, 1, data_format=format, name="conv")
    model = keras.Sequential([keras.Input(shape), layers.Rescaling(2.0), conv, layers.ReLU()])
    x = np.random.default_rng(count).normal(size=(count, *shape)).astype("float32")
    if channels_first:  # the CPU of TensorFlow has no such convolution
        conv.call = lambda inputs: inputs
    parts = (x[i : i + batch] for i in range(0, count, batch))
    norm = input_norm(model, eligible(model, BLOCK), parts)["conv"]
    others = (0, 2, 3) if channels_first else (0, 1, 2)
    np.testing.assert_allclose(norm, np.sqrt(np.square(2 * x).sum(axis=others) / count), rtol=1e-5)


def test_input_norm_of_a_shared_layer_sums_over_its_calls():
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    shared = layers.Dense(4, name="shared")
    model = keras.Model([left, right], layers.Add()([shared(left), shared(right)]))
    a, b = np.random.default_rng(0).normal(size=(2, 6, 4)).astype("float32")
    norm = input_norm(model, eligible(model, BLOCK), iter([([a, b], np.zeros(6))]))["shared"]
    np.testing.assert_allclose(norm, np.sqrt((a**2 + b**2).mean(axis=0) * 1.0), rtol=1e-5)


def test_the_model_stays_as_it_is():
    model, data = classifier(), examples()
    before, places_before = model.get_weights(), list(places(model))
    for statistic in (mean_gradient, mean_square_gradient, hessian_diagonal, input_norm):
        statistic(model, eligible(model, BLOCK), data)
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)
    assert all("call" not in vars(layer) for _, layer in places_before)


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return (self.x[:4], self.y[:4]) if i == 0 else (self.x[4:], self.y[4:])


def test_every_form_of_data_gives_the_same(monkeypatch):
    model, (x, y) = classifier(), examples()
    expected = mean_gradient(model, eligible(model, BLOCK), [(x, y)], LOSS)["class"]
    monkeypatch.setattr(batches_room, "_BATCH", 3)
    for data in (
        (x, y),
        tf.data.Dataset.from_tensor_slices((x, y)).batch(2),
        Batches(x, y),
        iter([(x[:1], y[:1]), (x[:0], y[:0]), (x[1:], y[1:])]),
        [(keras.ops.convert_to_tensor(x), y[:, None])],
    ):
        found = mean_gradient(model, eligible(model, BLOCK), data, LOSS)["class"]
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_losses():
    model, (x, y) = classifier(), examples()
    compiled = mean_gradient(model, eligible(model, BLOCK), (x, y))["class"]
    for loss in (
        "sparse_categorical_crossentropy",
        keras.losses.SparseCategoricalCrossentropy(),
        lambda labels, outputs: keras.losses.sparse_categorical_crossentropy(labels, outputs),
    ):
        found = mean_gradient(model, eligible(model, BLOCK), (x, y), loss)["class"]
        np.testing.assert_allclose(found, compiled, rtol=1e-5, atol=1e-7)
    model.get_layer("class").kernel_regularizer = keras.regularizers.L2(10.0)
    np.testing.assert_allclose(mean_gradient(model, eligible(model, BLOCK), (x, y))["class"], compiled)


def test_a_compiled_loss_of_several_outputs_that_was_never_fitted():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, {name: layers.Dense(2, name=name)(inputs) for name in ("a", "b")})
    model.compile("sgd", {"a": "mse", "b": "mae"}, loss_weights={"a": 3.0, "b": 1.0})
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    y = {"a": np.zeros((5, 2), "float32"), "b": np.full((5, 2), 100.0, "float32")}
    found = mean_gradient(model, eligible(model, BLOCK), [(x, y)])
    outputs = x @ model.get_layer("a").kernel.numpy()
    np.testing.assert_allclose(found["a"], 3 * x.T @ (2 * outputs) / 10, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["b"], np.repeat(-x.mean(axis=0)[:, None] / 2, 2, axis=1), rtol=1e-5, atol=1e-6)


def test_same_seed_same_numbers():
    model, data = tiny()
    a, b, c = (hessian_diagonal(model, eligible(model, BLOCK), data, seed=seed)["a"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_progress(monkeypatch, capsys):
    monkeypatch.setattr(batches_room, "_QUIET_SECONDS", -1.0)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    model, (x, y) = tiny()
    mean_gradient(model, eligible(model, BLOCK), [(x, y)] * 3)
    assert "3/3" in capsys.readouterr().out


@pytest.mark.parametrize(
    "data, error, sentence",
    [
        ([], ValueError, "data holds no examples"),
        (iter([(np.zeros((0, 4)), np.zeros(0))]), ValueError, "data holds no examples"),
        (np.zeros((6, 4)), ValueError, "data has a batch without labels"),
        ((np.zeros((6, 4)), np.zeros(5)), ValueError, r"\(6, 4\) with labels \(5,\): there must be one label"),
        ([(np.zeros((6, 4)), np.zeros(5))], ValueError, r"\(6, 4\) with labels \(5,\): there must be one label"),
        ([(np.zeros((6, 4)), np.zeros(6), np.ones(6))], ValueError, "more than .x, y."),
        ((np.zeros((6, 5)), np.zeros(6)), ValueError, r"can't be computed on \(6, 5\) with labels \(6,\)"),
        ((np.zeros((6, 4)), np.zeros((6, 2, 2))), ValueError, r"can't be computed on .* with labels \(6, 2, 2\)"),
        ((np.zeros((6, 4)), np.full(6, 7)), ValueError, r"can't be computed on .* with labels \(6,\)"),
        ((np.full((6, 4), np.nan), np.zeros(6)), ValueError, "is nan on a batch"),
        (7, TypeError, "data is a int"),
        (tf.data.Dataset.from_tensors((np.zeros((6, 4)), np.zeros(6))).repeat(), ValueError, "endless"),
    ],
)
def test_bad_data_is_a_sentence(data, error, sentence):
    model, _ = tiny()
    with pytest.raises(error, match=sentence) as caught:
        mean_gradient(model, eligible(model, BLOCK), data)
    assert "\n" not in str(caught.value) and 'File "' not in str(caught.value)


def test_inputs_may_be_tuples():
    left, right = keras.Input((4,)), keras.Input((3,))
    joined = layers.Concatenate()([layers.Dense(4, name="one")(left), layers.Dense(4, name="two")(right)])
    model = keras.Model([left, right], layers.Dense(2)(joined))
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(6, 4)).astype("float32"), rng.normal(size=(6, 3)).astype("float32")), np.arange(6) % 2
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(3)
    norms = input_norm(model, eligible(model, BLOCK), data)
    np.testing.assert_allclose(norms["two"], np.sqrt(np.mean(x[1] ** 2, axis=0)), rtol=1e-5)


def test_bad_losses_and_probes_are_sentences():
    model, data = tiny()
    bare = keras.Model(model.inputs, model.outputs)
    with pytest.raises(ValueError, match="isn't compiled with a loss: compile it, or say which one"):
        mean_gradient(bare, eligible(bare, BLOCK), data)
    with pytest.raises(ValueError, match="Keras has no loss 'accuracy_of_sorts'"):
        mean_gradient(model, eligible(model, BLOCK), data, "accuracy_of_sorts")
    with pytest.raises(ValueError, match="probes must be at least 1; got 0"):
        hessian_diagonal(model, eligible(model, BLOCK), data, probes=0)
    with pytest.raises(ValueError, match="can't compute a batch of data"):
        input_norm(model, eligible(model, BLOCK), np.zeros((3, 9)))
