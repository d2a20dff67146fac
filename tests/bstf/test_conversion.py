"""sparsify and densify on every kind of model: names, weights, counts, outputs, and what is left alone."""

import math

import keras
import numpy as np
import pytest
from keras import layers

import bstf
from bstf.conversion import places, transfer_weights


def randomised(model, seed=0):
    """Random weights everywhere, biases and batch norm statistics included."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        low = 0.5 if "variance" in weight.name else -1.0
        weight.assign(rng.uniform(low, 1.0, weight.shape))
    return model


def branched():
    """Functional: strides, residual add, batch norm, grouped and depthwise convolutions, two outputs."""
    inputs = keras.Input((8, 8, 3), name="photo")
    x = layers.Conv2D(16, 3, padding="same", name="first")(inputs)
    y = layers.BatchNormalization(name="norm")(layers.Conv2D(16, 3, padding="same", name="a")(x))
    x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.Conv2D(32, 1, groups=2, name="grouped")(x)
    x = layers.Conv2D(20, 3, strides=2, name="b")(x)
    x = layers.GlobalAveragePooling2D()(x)
    outputs = {"class": layers.Dense(10, name="class")(x), "small": layers.Dense(4, name="small")(x)}
    return randomised(keras.Model(inputs, outputs, name="branched"))


def sequential():
    return randomised(
        keras.Sequential(
            [
                keras.Input((8, 8, 8), name="photo"),
                layers.Conv2D(16, 3, strides=2, activation="relu", use_bias=False, name="conv"),
                layers.Flatten(),
                layers.Dense(12, activation="softmax", name="dense"),
            ],
            name="line",
        )
    )


def nested():
    """A shared inner model, a model in a model in it, and one layer name in two of them."""
    innermost = keras.Sequential([keras.Input((8, 8, 8)), layers.Conv2D(8, 3, name="conv", padding="same")], name="c")
    a = keras.Input((8, 8, 8))
    middle = keras.Model(a, layers.Conv2D(16, 1, name="conv")(innermost(a)), name="middle")
    left, right = keras.Input((8, 8, 8), name="left"), keras.Input((8, 8, 8), name="right")
    shared = layers.Dense(16, name="shared")
    joined = layers.Concatenate()([shared(middle(left)), shared(middle(right))])
    return randomised(keras.Model([left, right], layers.Conv2D(24, 8, name="last")(joined), name="outer"))


MODELS = {"branched": branched, "sequential": sequential, "nested": nested}


def inputs_of(model, batch=2):
    rng = np.random.default_rng(1)
    arrays = [rng.normal(size=(batch, *x.shape[1:])).astype("float32") for x in model.inputs]
    return arrays if len(arrays) > 1 else arrays[0]


def outputs_of(model):
    return [np.asarray(y) for y in keras.tree.flatten(model(inputs_of(model)))]


def masked_by_hand(model, sparse):
    """The original model with its own weights, the covered ones set to zero here."""
    twin = keras.models.clone_model(model, recursive=True)
    twin.set_weights(model.get_weights())
    by_path = dict(places(twin))
    for path, layer in places(sparse):
        if hasattr(layer, "gamma") and hasattr(layer, "block"):
            kernel = by_path[path].kernel
            mask = np.kron(np.asarray(layer.gamma), np.ones(layer.block))[: kernel.shape[-2], : kernel.shape[-1]]
            kernel.assign(kernel.numpy() * mask)
    return twin


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.75])
def test_sparsify(build, ratio):
    model = build()
    weights = model.get_weights()
    before = outputs_of(model)
    sparse = bstf.sparsify(model, ratio=ratio)

    for old, new in zip(weights, model.get_weights()):
        np.testing.assert_array_equal(old, new)
    assert not any(isinstance(layer, (bstf.MaskedConv2D, bstf.MaskedDense)) for _, layer in places(model))
    assert [path for path, _ in places(sparse)] == [path for path, _ in places(model)]
    assert sparse.name == model.name and not sparse.compiled

    for path, layer in places(sparse):
        if not isinstance(layer, (bstf.MaskedConv2D, bstf.MaskedDense)):
            continue
        cin, cout = layer.kernel.shape[-2:]
        gamma = np.asarray(layer.gamma)
        rows, cols = -(-cin // 8), -(-cout // 8)
        assert gamma.shape == (rows, cols), path
        wanted = math.floor(ratio * rows * cols + 0.5)
        assert (gamma == 0).sum() == min(wanted, rows * cols - max(rows, cols)), path

    expected = before if ratio == 0 else outputs_of(masked_by_hand(model, sparse))
    for one, other in zip(outputs_of(sparse), expected):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_densify(build):
    sparse = bstf.sparsify(build(), ratio=0.5)
    dense = bstf.densify(sparse)
    assert [path for path, _ in places(dense)] == [path for path, _ in places(sparse)]
    assert all(type(layer).__module__.startswith("keras") for _, layer in places(dense))
    for one, other in zip(outputs_of(dense), outputs_of(sparse)):
        np.testing.assert_array_equal(one, other)
    zeros = sum((w == 0).sum() for w in dense.get_weights())
    assert zeros == sum((w == 0).sum() for _, layer in places(sparse) for w in layer.get_weights()[:1]) > 0


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_round_trips(build, tmp_path):
    sparse = bstf.sparsify(build(), ratio=0.5)
    expected = outputs_of(sparse)
    sparse.save(tmp_path / "m.keras")
    sparse.save_weights(tmp_path / "m.weights.h5")
    rebuilt = type(sparse).from_config(sparse.get_config())
    rebuilt.load_weights(tmp_path / "m.weights.h5")
    resparsified = bstf.sparsify(build(), ratio=0.25)
    resparsified.load_weights(tmp_path / "m.weights.h5")
    for model in (keras.models.load_model(tmp_path / "m.keras"), rebuilt, resparsified):
        for one, other in zip(outputs_of(model), expected):
            np.testing.assert_array_equal(one, other)


def test_what_is_eligible():
    sparse = bstf.sparsify(branched())
    masked = [path for path, layer in places(sparse) if hasattr(layer, "block")]
    assert masked == ["a", "b", "class"]
    assert {type(sparse.get_layer(name)) for name in ("first", "grouped")} == {layers.Conv2D}
    assert {type(sparse.get_layer(name)) for name in ("class", "small")} == {bstf.MaskedDense, layers.Dense}


def test_inputs_keep_their_names():
    for build in (branched, sequential):
        assert bstf.sparsify(build()).inputs[0].name == build().inputs[0].name
    assert [x._keras_history.operation.name for x in bstf.sparsify(nested()).inputs] == ["left", "right"]


def test_shared_layers_stay_shared():
    sparse = bstf.sparsify(nested())
    paths = [path for path, layer in places(sparse) if hasattr(layer, "block")]
    assert sorted(paths) == ["last", "middle/c/conv", "middle/conv", "shared"]
    assert len(sparse.weights) == len(nested().weights) + len(paths)


def test_the_ratio_of_an_8x8_layer_is_forbidden_by_the_floor():
    sparse = bstf.sparsify(nested())
    assert np.asarray(dict(places(sparse))["middle/c/conv"].gamma).tolist() == [[1]]


@pytest.mark.parametrize("block", [4, (8, 4), (3, 5), 16])
def test_blocks(block):
    bi, bo = (block, block) if isinstance(block, int) else block
    sparse = bstf.sparsify(branched(), block, 0.5)
    for name in ("b", "class"):
        layer = sparse.get_layer(name)
        cin, cout = layer.kernel.shape[-2:]
        if cin >= bi and cout >= bo:
            assert layer.gamma.shape == (-(-cin // bi), -(-cout // bo))


def test_importance_chooses():
    model = sequential()
    sums = bstf.sparsify(model, ratio=0.5, importance="l1", layers="dense")
    most = bstf.sparsify(model, importance=lambda kernel, block: -bstf.importance.l1(kernel, block), layers="dense")
    assert type(sums.get_layer("conv")) is layers.Conv2D
    kernel = np.abs(model.get_layer("dense").kernel.numpy())
    kept = [np.abs(m.get_layer("dense").kernel.numpy()).sum() for m in (sums, most)]
    assert kept[1] < kernel.sum() / 2 < kept[0]


def test_sparsify_again():
    once = bstf.sparsify(branched(), ratio=0.25)
    twice = bstf.sparsify(once, ratio=0.5)
    first, second = (np.asarray(m.get_layer("b").gamma) for m in (once, twice))
    assert (first == 0).sum() == 3 and (second == 0).sum() == 6 and (second <= first).all()
    again = bstf.sparsify(once, block=4, ratio=0.5)
    assert again.get_layer("b").block == (4, 4) and again.get_layer("b").gamma.shape == (8, 5)


def test_a_ratio_for_each_layer():
    sparse = bstf.sparsify(branched(), ratio={"a": 0.25, "b|class": 0.5}, min_per_line=0)
    zeros = {name: (np.asarray(sparse.get_layer(name).gamma) == 0).mean() for name in ("a", "b", "class")}
    assert zeros == {"a": 0.25, "b": 0.5, "class": 0.5}
    nest = bstf.sparsify(nested(), ratio={"middle/conv": 0.5}, min_per_line=0)
    zeros = {path: (np.asarray(layer.gamma) == 0).sum() for path, layer in places(nest) if hasattr(layer, "block")}
    assert zeros == {"middle/c/conv": 0, "middle/conv": 1, "shared": 0, "last": 0}
    with pytest.raises(
        ValueError, match=r"'clas' \(did you mean 'class'\?\), which matches no layer that can be made sparse"
    ):
        bstf.sparsify(branched(), ratio={"clas": 0.5})


def test_scopes():
    model = branched()
    model.get_layer("b").kernel.assign(model.get_layer("b").kernel * 1e-3)  # its scale says nothing
    even = bstf.sparsify(model, 4, 0.5, scope="column").get_layer("b")
    assert set(np.asarray(even.gamma).sum(axis=0)) == {4}
    even = bstf.sparsify(model, 4, 0.4, scope="row").get_layer("b")
    assert set(np.asarray(even.gamma).sum(axis=1)) == {3}
    together = bstf.sparsify(model, 4, 0.5, scope="global")
    gammas = [np.asarray(layer.gamma) for _, layer in places(together) if hasattr(layer, "block")]
    blocks = sum(gamma.size for gamma in gammas)
    assert sum((gamma == 0).sum() for gamma in gammas) == math.floor(0.5 * blocks + 0.5)
    assert 0.3 < (np.asarray(together.get_layer("b").gamma) == 0).mean() < 0.7


@pytest.mark.parametrize(
    "selection, expected",
    [
        (None, ["a", "b", "class"]),
        ("a|class", ["a", "class"]),
        (".*", ["a", "b", "class"]),
        (["b"], ["b"]),
        (("a", "grouped"), ["a"]),
        (lambda layer: isinstance(layer, layers.Dense), ["class"]),
    ],
)
def test_selected_layers(selection, expected):
    sparse = bstf.sparsify(branched(), layers=selection)
    assert [path for path, layer in places(sparse) if hasattr(layer, "block")] == expected


def test_selected_by_path_in_nested_models():
    sparse = bstf.sparsify(nested(), layers=["middle/conv"])
    assert [path for path, layer in places(sparse) if hasattr(layer, "block")] == ["middle/conv"]


def test_a_sequential_model_without_input():
    model = keras.Sequential([layers.Dense(16), layers.Dense(16)])
    x = np.ones((2, 16), "float32")
    model(x)
    sparse = bstf.sparsify(model, ratio=0.0)
    np.testing.assert_array_equal(sparse(x), model(x))


def test_compiled_with_a_lambda_and_frozen():
    model = sequential()
    model.compile("adam", loss=lambda y, p: keras.ops.mean((y - p) ** 2))
    model.get_layer("conv").trainable = False
    sparse = bstf.sparsify(model)
    assert model.compiled and not sparse.compiled
    assert not sparse.get_layer("conv").trainable and len(sparse.trainable_weights) == 2


def test_frozen_nested_model():
    model = nested()
    model.get_layer("middle").trainable = False
    assert len(bstf.sparsify(model).trainable_weights) == len(model.trainable_weights) == 4


@keras.saving.register_keras_serializable("test")
class Doubling(layers.Layer):
    """A layer with layers inside, whose names Keras chooses."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(16)

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return self.inner(x) * 2


def test_layers_that_hold_layers_or_functions_are_copied():
    inputs = keras.Input((5, 16))
    x = Doubling()(layers.TimeDistributed(layers.Dense(16))(inputs))
    x = layers.Lambda(lambda t: t + 1)(layers.Normalization(mean=1.0, variance=4.0)(x))
    x = keras.ops.relu(layers.MultiHeadAttention(2, 8)(x, x))
    model = randomised(keras.Model(inputs, layers.Dense(16, name="last")(x)))
    sparse = bstf.sparsify(model, ratio=0.0)
    np.testing.assert_array_equal(outputs_of(sparse), outputs_of(model))
    assert [path for path, layer in places(sparse) if hasattr(layer, "block")] == ["last"]


def test_mixed_precision_policy_is_kept():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = sequential()
    finally:
        keras.config.set_dtype_policy("float32")
    sparse = bstf.sparsify(model)
    conv = sparse.get_layer("conv")
    assert conv.compute_dtype == "float16" and conv.gamma.dtype == conv.kernel.dtype == "float32"
    np.testing.assert_array_equal(outputs_of(bstf.densify(sparse)), outputs_of(sparse))


def test_lora_goes_along():
    model = sequential()
    model.get_layer("dense").enable_lora(2)
    model.get_layer("dense").lora_kernel_b.assign(np.ones((2, 12)))
    sparse = bstf.sparsify(model, ratio=0.0)
    np.testing.assert_allclose(outputs_of(sparse), outputs_of(model), rtol=1e-5, atol=1e-6)
    assert sparse.get_layer("dense").lora_enabled


def test_dense_weights_file_goes_through_the_dense_model(tmp_path):
    trained, sparse = sequential(), bstf.sparsify(randomised(sequential(), 5), ratio=0.5)
    trained.save_weights(tmp_path / "dense.weights.h5")
    with pytest.raises(ValueError):  # Keras files weights under the class of their layer
        sparse.load_weights(tmp_path / "dense.weights.h5")
    dense = sequential()
    dense.load_weights(tmp_path / "dense.weights.h5")
    gamma = np.asarray(sparse.get_layer("conv").gamma)
    transfer_weights(dense, sparse)
    np.testing.assert_array_equal(sparse.get_layer("conv").gamma, gamma)
    np.testing.assert_array_equal(outputs_of(sparse), outputs_of(masked_by_hand(trained, sparse)))
    with pytest.raises(ValueError, match=r"weights of layer '\w+' don't fit layer '\w+' of 'line'"):
        transfer_weights(branched(), sparse)


def test_resnet50():
    model = keras.applications.ResNet50(weights=None, input_shape=(32, 32, 3))
    sparse = bstf.sparsify(model, ratio=0.5)
    masked = [layer for _, layer in places(sparse) if hasattr(layer, "block")]
    assert len(masked) == 53 and type(sparse.get_layer("conv1_conv")) is layers.Conv2D  # 52 of 53 convs, 1 dense
    for layer in masked:
        gamma = np.asarray(layer.gamma)
        assert (gamma == 0).sum() == math.floor(0.5 * gamma.size + 0.5)
        assert gamma.sum(axis=0).min() >= 1 and gamma.sum(axis=1).min() >= 1
    np.testing.assert_array_equal(outputs_of(bstf.densify(sparse)), outputs_of(sparse))
    np.testing.assert_array_equal(outputs_of(bstf.sparsify(model, ratio=0.0)), outputs_of(model))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.conv = layers.Conv2D(16, 3)
        self.dense = layers.Dense(16)

    def call(self, x):
        return self.dense(keras.ops.mean(self.conv(x), (1, 2)))


def test_subclassed_model_and_the_way_out():
    model = Subclassed()
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 8)).astype("float32")
    expected = model(x)
    for action in (bstf.sparsify, bstf.densify):
        with pytest.raises(ValueError, match=r"subclassed model \(class Subclassed\).*Make it functional first"):
            action(model)
    inputs = keras.Input((8, 8, 8))
    functional = keras.Model(inputs, model.call(inputs))
    sparse = bstf.sparsify(functional, ratio=0.0)
    np.testing.assert_allclose(sparse(x), expected, rtol=1e-6)
    assert len([layer for _, layer in places(sparse) if hasattr(layer, "block")]) == 2
    with pytest.raises(ValueError, match=r"Layer 'subclassed\w*' \(class Subclassed\) can't be copied"):
        bstf.sparsify(keras.Model(inputs, model(inputs)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_numbers(value):
    model = nested()
    kernel = dict(places(model))["middle/conv"].kernel
    kernel.assign(np.full(kernel.shape, value))
    with pytest.raises(ValueError, match="Layer 'middle/conv' has NaN or infinite values in its kernel"):
        bstf.sparsify(model)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"ratio": 1.0}, r"ratio is the fraction of zero blocks, a number in \[0, 1\)"),
        ({"ratio": -0.1}, "ratio is the fraction of zero blocks"),
        ({"ratio": float("nan")}, "ratio is the fraction of zero blocks"),
        ({"block": 0}, "block must be a positive integer"),
        ({"importance": "magnitude"}, "importance must be one of l1, l2, variance"),
        ({"scope": "planet"}, "scope must be one of layer"),
        ({"min_per_line": -1}, "min_per_line must be an integer of at least 0"),
        ({"layers": ["conv", "typo"]}, "'line' has no layers named 'typo'"),
        ({"layers": "typo.*"}, r"layers='typo.\*' matches the whole name of no layer"),
        ({"layers": "("}, "is not a regular expression"),
        ({"importance": lambda k, b: k}, "importance of layer 'conv' must be one score a block"),
    ],
)
def test_bad_arguments_are_sentences(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        bstf.sparsify(sequential(), **arguments)


def test_not_a_model_and_not_built():
    with pytest.raises(TypeError, match=r"sparsify takes a keras.Model; got int"):
        bstf.sparsify(3)
    with pytest.raises(ValueError, match="isn't built yet"):
        bstf.sparsify(keras.Sequential([layers.Dense(16)]))


def test_sparse_model_trains_and_keeps_its_zeros():
    model = bstf.sparsify(branched(), ratio=0.5)
    model.compile(keras.optimizers.AdamW(0.01, weight_decay=0.1), {"class": "mse", "small": "mse"})
    x = inputs_of(model, 16)
    model.fit(x, {"class": np.ones((16, 10)), "small": np.ones((16, 4))}, epochs=2, verbose=0)
    for name in ("a", "b", "class"):
        layer = model.get_layer(name)
        cin, cout = layer.kernel.shape[-2:]
        covered = np.kron(np.asarray(layer.gamma), np.ones((8, 8)))[:cin, :cout] == 0
        assert not layer.kernel.numpy()[..., covered].any()
        slots = [v for v in model.optimizer.variables if f"/{name}_kernel" in v.path]
        assert len(slots) == 2, [v.path for v in model.optimizer.variables]
        for slot in slots:
            assert slot.shape == layer.kernel.shape and not slot.numpy()[..., covered].any()
