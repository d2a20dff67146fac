import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from bstf.layers import MaskedConv2D, MaskedDense
from bstf.quantization import calibrate, fold, network


def randomize(model, seed=0):
    """Gives every batch normalisation statistics that matter."""
    rng = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if isinstance(layer, layers.BatchNormalization):
            layer.set_weights(
                [
                    rng.uniform(low, high, w.shape)
                    for w, low, high in zip(layer.get_weights(), (-2, -1, -1, 0.5), (2, 1, 1, 2))
                ]
            )
    return model


def kinds(net):
    return [type(op).__name__ for op in net.operations.values()]


def sequential(*stack, shape=(8, 8, 4)):
    return randomize(keras.Sequential([keras.Input(shape, name="image"), *stack]))


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}, {"axis": 3, "epsilon": 0.1}])
def test_folded_batch_norm_computes_the_same(use_bias, options):
    conv = layers.Conv2D(6, 3, use_bias=use_bias, name="conv", bias_initializer="random_normal")
    model = keras.Sequential([keras.Input((8, 8, 4)), conv, layers.BatchNormalization(name="norm", **options)])
    norm = model.get_layer("norm")
    rng = np.random.default_rng(0)
    norm.set_weights([rng.uniform(0.5, 2, w.shape) for w in norm.get_weights()])
    net = fold.flatten(model)
    assert list(net.operations) == [next(iter(net.inputs)), "conv"]
    assert net.outputs == ("conv",)
    op = net.operations["conv"]
    x = rng.normal(size=(3, 8, 8, 4)).astype(np.float32)
    expected = keras.ops.convert_to_numpy(model(x))
    got = keras.ops.convert_to_numpy(keras.ops.conv(x, op.kernel, 1, "valid")) + op.bias
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_folds_into_a_depthwise_convolution_which_is_a_grouped_one():
    model = sequential(
        layers.DepthwiseConv2D((3, 2), depth_multiplier=2, padding="same", name="dw"), layers.BatchNormalization(),
        layers.ReLU(name="relu"),
    )  # fmt: skip
    randomize(model)
    net = fold.flatten(model)
    assert kinds(net) == ["Input", "Convolution", "Relu"]
    op = net.operations["dw"]
    assert (op.groups, op.kernel.shape, op.depthwise_kernel.shape) == (4, (3, 2, 1, 8), (3, 2, 4, 2))
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype("float32")
    computed = tf.nn.depthwise_conv2d(x, op.depthwise_kernel, [1, 1, 1, 1], "SAME") + op.bias
    np.testing.assert_allclose(tf.nn.relu(computed), model(x), rtol=1e-4, atol=1e-4)


def test_a_separable_convolution_is_two():
    net = fold.flatten(sequential(layers.SeparableConv2D(6, 3, dilation_rate=2, name="s", activation="relu")))
    assert list(net.operations)[1:] == ["s_depthwise", "s", "s_relu"]
    first, second = net.operations["s_depthwise"], net.operations["s"]
    assert (first.groups, first.dilation, first.shape) == (4, (2, 2), (4, 4, 4))
    assert (second.groups, second.dilation, second.kernel.shape) == (1, (1, 1), (1, 1, 4, 6))
    assert net.grids()["s_depthwise"] == "s_depthwise"


def test_a_concatenation_owns_its_grid():
    entry = keras.Input((4, 4, 3), name="image")
    whole = layers.Concatenate(name="whole")([entry, layers.Conv2D(2, 1, name="conv")(entry), entry])
    joined = keras.ops.concatenate([whole, entry], axis=-1)
    net = fold.flatten(keras.Model(entry, layers.ReLU(name="relu")(joined)))
    assert [op.shape[-1] for op in net.operations.values()] == [3, 2, 8, 11, 11]
    grids, last = net.grids(), net.operations["relu"].inputs[0]
    assert grids["whole"] == "whole" and grids[last] == grids["relu"] == last
    assert net.fused() == {}


def test_dense_folds_too():
    model = sequential(layers.Dense(5, use_bias=False, name="d"), layers.BatchNormalization(), shape=(7,))
    op = fold.flatten(model).operations["d"]
    x = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    np.testing.assert_allclose(x @ op.kernel + op.bias, model(x), rtol=1e-4, atol=1e-5)


def test_masked_zeros_survive_folding_without_a_sign():
    model = sequential(
        MaskedConv2D(16, 3, name="conv"), layers.BatchNormalization(), layers.Flatten(), MaskedDense(16, name="d"),
        shape=(4, 4, 16),
    )  # fmt: skip
    model.get_layer("conv").set_gamma(np.array([[1, 0], [0, 1]]))
    gamma = np.ones((8, 2))
    gamma[3] = 0
    model.get_layer("d").set_gamma(gamma)
    before = [np.array(w) for w in model.get_weights()]
    ops = fold.flatten(model).operations
    conv, dense = ops["conv"], ops["d"]
    dead = np.concatenate(
        [conv.kernel[:, :, :8, 8:].ravel(), conv.kernel[:, :, 8:, :8].ravel(), dense.kernel[24:32].ravel()]
    )
    assert (dead == 0).all()
    assert not np.signbit(dead).any()
    assert (conv.kernel[:, :, :8, :8] != 0).all()
    assert conv.block == (8, 8)
    for old, new in zip(before, model.get_weights()):
        assert np.array_equal(old, new)


def test_stored_weights_under_gamma_do_not_count():
    model = sequential(MaskedConv2D(16, 1, name="conv"), shape=(4, 4, 16))
    layer = model.get_layer("conv")
    layer.gamma.assign(np.array([[1, 0], [0, 1]]))  # the kernel keeps its values, as a custom loop could
    assert (fold.flatten(model).operations["conv"].kernel[:, :, :8, 8:] == 0).all()


def test_activation_arguments_become_operations():
    model = sequential(
        layers.Conv2D(4, 3, activation="relu", name="a"),
        layers.Conv2D(4, 3, activation=keras.activations.relu6, name="b"),
        layers.Conv2D(4, 1, activation=layers.ReLU(6.0, name="own"), name="c"),
        layers.Flatten(),
        layers.Dense(3, activation="softmax", name="d"),
    )
    net = fold.flatten(model)
    relus = [(op.name, op.ceiling) for op in net.operations.values() if isinstance(op, network.Relu)]
    assert relus == [("a_relu", None), ("b_relu", 6.0), ("own", 6.0)]
    assert net.outputs == ("d_softmax",)


def test_relu_layers_and_functions():
    x = entry = keras.Input((4, 4, 3))
    for layer in (
        layers.ReLU(),
        layers.ReLU(6),
        layers.Activation("relu"),
        layers.Activation("relu6"),
        layers.Activation("linear"),
    ):
        x = layer(x)
    x = keras.ops.relu6(keras.ops.relu(x))
    net = fold.flatten(keras.Model(entry, x))
    assert [op.ceiling for op in net.operations.values() if isinstance(op, network.Relu)] == [
        None,
        6,
        None,
        6,
        None,
        6,
    ]


def test_identities_vanish():
    model = sequential(
        layers.Dropout(0.5), layers.SpatialDropout2D(0.1), layers.GaussianNoise(0.1), layers.Identity(),
        layers.Conv2D(2, 1, name="conv"), layers.Dropout(0.5), layers.ReLU(name="relu"), layers.Dropout(0.1),
    )  # fmt: skip
    net = fold.flatten(model)
    assert kinds(net) == ["Input", "Convolution", "Relu"]
    assert net.outputs == ("relu",)
    assert net.fused() == {"conv": "relu"}


def test_nested_models_are_flattened_with_unique_names():
    def block(name):
        stack = [
            layers.Conv2D(4, 3, padding="same", name="conv"),
            layers.BatchNormalization(),
            layers.ReLU(name="relu"),
        ]
        return keras.Sequential([keras.Input((8, 8, 4)), *stack], name=name)

    entry = keras.Input((8, 8, 4), name="image")
    inner_in = keras.Input((None, None, 4))
    inner = keras.Model(
        inner_in, layers.Add(name="add")([inner_in, layers.Conv2D(4, 1, name="one")(inner_in)]), name="i"
    )
    x = inner(block("a")(entry))
    model = randomize(keras.Model(entry, block("b")(x)))
    net = fold.flatten(model)
    assert list(net.operations) == ["image", "conv", "relu", "one", "add", "conv_1", "relu_1"]
    assert net.operations["add"].inputs == ("relu", "one")
    assert net.operations["add"].shape == (8, 8, 4)
    assert not np.array_equal(net.operations["conv"].kernel, net.operations["conv_1"].kernel)


def test_a_layer_called_twice_becomes_two_operations():
    entry = keras.Input((8, 8, 4))
    conv = layers.Conv2D(4, 3, padding="same", name="conv")
    net = fold.flatten(keras.Model(entry, conv(layers.ReLU()(conv(entry)))))
    assert kinds(net) == ["Input", "Convolution", "Relu", "Convolution"]
    assert net.outputs == ("conv_1",)
    assert net.operations["conv_1"].kernel is not net.operations["conv"].kernel


def test_adds_of_many_become_binary():
    entry = keras.Input((4, 4, 4))
    branches = [layers.Conv2D(4, 1, name=f"c{i}")(entry) for i in range(3)]
    net = fold.flatten(keras.Model(entry, layers.Add(name="sum")([*branches, entry])))
    assert net.outputs == ("sum",)
    adds = [op for op in net.operations.values() if isinstance(op, network.Add)]
    assert [len(op.inputs) for op in adds] == [2, 2, 2]
    assert adds[-1].inputs[1] == next(iter(net.inputs))


def test_plus_is_an_add():
    entry = keras.Input((4, 4, 4))
    net = fold.flatten(keras.Model(entry, layers.Conv2D(4, 1)(entry) + entry))
    assert kinds(net) == ["Input", "Convolution", "Add"]


def test_a_relu_with_a_rival_is_not_fused():
    entry = keras.Input((4, 4, 4), name="image")
    x = layers.Conv2D(4, 1, name="conv")(entry)
    relu = layers.ReLU(name="relu")(x)
    net = fold.flatten(keras.Model(entry, layers.Add(name="add")([x, relu])))
    assert net.fused() == {}
    assert net.grids() == {"image": "image", "conv": "conv", "relu": "conv", "add": "add"}


def test_grids_pass_through_pools_pads_and_reshapes():
    model = sequential(
        layers.Conv2D(4, 3, name="conv"), layers.ReLU(name="relu"), layers.MaxPooling2D(name="max"),
        layers.ZeroPadding2D(((1, 0), (0, 1)), name="pad"), layers.AveragePooling2D(2, name="avg"),
        layers.Activation("relu6", name="relu6"), layers.GlobalMaxPooling2D(keepdims=True, name="gmp"),
        layers.Flatten(name="flat"), layers.Dense(3, name="dense"), layers.Softmax(name="softmax"),
    )  # fmt: skip
    net = fold.flatten(model)
    owners = net.grids()
    assert {name for name, owner in owners.items() if owner == "conv"} == {
        "relu",
        "max",
        "pad",
        "relu6",
        "gmp",
        "flat",
    }
    assert owners["dense"] == "dense"
    assert "softmax" not in owners
    assert net.fused() == {"conv": "relu", "avg": "relu6"}


def test_several_outputs_keep_their_structure():
    entry = keras.Input((4, 4, 4))
    a = layers.Conv2D(4, 1, name="a")(entry)
    net = fold.flatten(keras.Model(entry, {"first": a, "second": layers.ReLU(name="b")(a)}))
    assert net.outputs == ("a", "b")
    assert set(net.structure) == {"first", "second"}


def hard_swish(x):
    return x * (layers.ReLU(6.0)(x + 3.0) * (1 / 6))


def affine_everywhere(x):
    x = layers.BatchNormalization(name="lone")(layers.MaxPooling2D()(layers.Rescaling(0.5, 1.0)(x)))
    x = layers.ReLU()(x)
    x = layers.Conv2D(6, 3, name="conv")(layers.BatchNormalization(name="before")(x) * 0.5)
    rival = layers.BatchNormalization(name="rival")(x)
    return layers.BatchNormalization(name="last")(layers.Flatten()(layers.Add()([x, rival])))


@pytest.mark.parametrize(
    ("network_of", "expected"),
    [
        (affine_everywhere,
         ["Input", "Affine", "MaxPool", "Convolution", "Relu", "Convolution", "Convolution", "Add", "Reshape",
          "Reshape", "Convolution", "Reshape"]),
        (lambda x: layers.Conv2D(3, 1)(layers.ReLU(6.0)(layers.Conv2D(4, 1)(x) + 3.0) * (1 / 6)),
         ["Input", "Convolution", "Relu", "Convolution"]),
        (lambda x: layers.Activation("tanh")(hard_swish(layers.MaxPooling2D()(x))),
         ["Input", "MaxPool", "Unary"]),
        (lambda x: layers.ReLU(6.0)(layers.ReLU()(layers.Conv2D(4, 1)(x))), ["Input", "Convolution", "Relu", "Relu"]),
        (lambda x: layers.Dense(3)(layers.BatchNormalization()(layers.Flatten()(x))), ["Input", "Reshape", "Dense"]),
        # Zeros around the image stay zeros, so the offset can't go into the convolution.
        (lambda x: layers.Conv2D(4, 3, padding="same")(layers.BatchNormalization()(layers.MaxPooling2D()(x))),
         ["Input", "MaxPool", "Convolution", "Convolution"]),
        (lambda x: layers.GlobalAveragePooling2D()(layers.UpSampling2D((8, 12))(x)),
         ["Input", "Resize", "AveragePool", "GlobalAveragePool"]),
    ],
)  # fmt: skip
def test_scales_and_functions_are_folded_and_the_network_computes_the_same(network_of, expected):
    entry = keras.Input((8, 8, 4))
    model = randomize(keras.Model(entry, network_of(entry)))
    net = fold.flatten(model)
    assert kinds(net) == expected
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 4)).astype(np.float32)
    *_, (name, values) = calibrate.run(net, [x])
    assert (name,) == net.outputs
    np.testing.assert_allclose(values, model(x), rtol=1e-4, atol=1e-5)


class Own(layers.Conv2D):
    pass


class Subclassed(keras.Model):
    def call(self, x):
        return x


def bad_weights():
    model = sequential(layers.Conv2D(4, 3, name="conv"))
    kernel = model.layers[0].kernel
    kernel.assign(np.full(kernel.shape, np.nan))
    return model


def bad_variance():
    model = sequential(layers.Conv2D(4, 3), layers.BatchNormalization(name="norm"))
    model.layers[1].moving_variance.assign([-1.0] * 4)
    return model


def training_dropout():
    entry = keras.Input((4,))
    return keras.Model(entry, layers.Dropout(0.5, name="drop")(entry, training=True))


def other_sizes():
    entry = keras.Input((4, 4, 4))
    return keras.Model(entry, layers.Add(name="add")([entry, layers.Conv2D(1, 1)(entry)]))


def less_an_image():
    entry = keras.Input((4, 4, 4))
    pooled = layers.GlobalAveragePooling2D(keepdims=True)(entry)
    return keras.Model(entry, layers.Subtract(name="less")([pooled, entry]))


def masked_softmax():
    entry = keras.Input((4,))
    return keras.Model(entry, layers.Softmax(name="soft")(entry, mask=layers.Dense(4)(entry)))


def with_constant(function):
    entry = keras.Input((4, 4, 4))
    return keras.Model(entry, function(entry))


IMAGE = np.arange(64.0).reshape(4, 4, 4)


def rows_joined():
    entry = keras.Input((4, 4, 4))
    return keras.Model(entry, layers.Concatenate(axis=1, name="rows")([entry, entry]))


def early_softmax():
    return sequential(layers.Dense(4), layers.Softmax(name="soft"), layers.Dense(3, name="after"), shape=(5,))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: "model", TypeError, "Keras model; got str"),
        (
            lambda: keras.Sequential([layers.Dense(3)], name="net"),
            ValueError,
            "'net' isn't built.*keras.Input",
        ),
        (lambda: Subclassed(name="net"), ValueError, "'net' is a subclassed Subclassed.*functional"),
        (lambda: sequential(layers.Conv2D(4, 3), shape=(None, None, 3)), ValueError, "'image'.*fixed size"),
        (bad_weights, ValueError, "'conv'.*kernel holds NaN"),
        (bad_variance, ValueError, "'norm'.*moving variance"),
        (training_dropout, ValueError, "'drop'.*training=True"),
        (other_sizes, ValueError, r"'add'.*\(4, 4, 4\), \(4, 4, 1\)"),
        (
            lambda: sequential(
                layers.MaxPooling2D(), layers.Normalization(axis=1, mean=range(4), variance=[2.0] * 4, name="rows")
            ),
            ValueError,
            r"'rows'.*of the shape \(4, 4, 4\).*before all other layers",
        ),
        (
            lambda: sequential(layers.Normalization(mean=[np.nan] * 4, variance=[2.0] * 4, name="nan")),
            ValueError,
            "'nan'.*mean holds NaN",
        ),
        (masked_softmax, ValueError, "'soft'.*2 tensors"),
        (less_an_image, ValueError, r"'less'.*\(4, 4, 4\) from one pixel"),
        (lambda: with_constant(lambda x: layers.Add()([x * np.ones((2, 1, 1, 1)), x])), ValueError, r"\(2, 1, 1, 1\)"),
        (lambda: with_constant(lambda x: layers.Add()([x * IMAGE, x])), ValueError, "an input that nothing else reads"),
        (lambda: with_constant(lambda x: x + np.nan), ValueError, "constant holds NaN"),
        (lambda: with_constant(lambda x: 1.0 / x), ValueError, "divides by a tensor"),
        (early_softmax, ValueError, "'soft' is followed by 'after'"),
        (
            lambda: sequential(layers.DepthwiseConv2D(3, 2, dilation_rate=2, name="dw")),
            ValueError,
            r"'dw'.*strides \(2, 2\) and dilation_rate \(2, 2\)",
        ),
        (rows_joined, ValueError, "'rows'.*axis 1"),
        (lambda: sequential(Own(4, 3, name="own")), ValueError, "'own'.*Own.*supported are"),
        (
            lambda: sequential(layers.Conv2D(4, 3, activation=lambda x: x * 2, name="t")),
            ValueError,
            "'t'.*lambda.*one value",
        ),
        (
            lambda: sequential(layers.LayerNormalization(name="ln")),
            ValueError,
            "'ln'.*LayerNorm.*supported are",
        ),
        (
            lambda: sequential(layers.UpSampling2D(3, interpolation="bilinear", name="up")),
            ValueError,
            r"'up'.*\(3, 3\).*powers of two",
        ),
        (
            lambda: sequential(layers.Conv2DTranspose(4, 3, 2, output_padding=1, name="tr")),
            ValueError,
            "'tr'.*output_padding",
        ),
        (lambda: sequential(layers.Dense(4, name="dense")), ValueError, r"'dense'.*\(8, 8, 4\).*Flatten"),
        (lambda: sequential(layers.Reshape((4, 64), name="r"), shape=(256,)), ValueError, r"'r'.*\(4, 64\)"),
        (
            lambda: sequential(layers.AveragePooling2D(2, (2, 1), name="p")),
            ValueError,
            r"'p'.*\(2, 1\).*equal",
        ),
        (lambda: sequential(layers.Softmax(axis=1, name="s")), ValueError, "'s'.*axis 1"),
        (
            lambda: sequential(layers.MaxPooling2D(2, data_format="channels_first", name="cf")),
            ValueError,
            "'cf'.*channels first",
        ),
    ],
)
def test_refusals_name_the_layer_and_the_way_out(make, error, message):
    with pytest.raises(error, match=message):
        fold.flatten(make())


def test_names_made_while_folding_are_free():
    entry = keras.Input((64, 48, 3))
    pooled = layers.GlobalAveragePooling2D(name="g")(layers.Conv2D(3, 3, padding="same", name="g_windows")(entry))
    named = layers.Dense(3, name="bn_scale")(layers.ReLU()(pooled))
    x = layers.ReLU()(layers.BatchNormalization(name="bn")(layers.ReLU()(layers.Add()([pooled, named]))))
    net = fold.flatten(randomize(keras.Model(entry, x)))
    assert len(set(net.operations)) == len(net.operations)
    assert kinds(net).count("Convolution") == 2 and {"g_windows", "g_windows_1", "bn_scale_1"} <= set(net.operations)


def test_scales_of_several_axes_are_those_of_channels():
    net = fold.flatten(sequential(layers.Rescaling(np.full((1, 1, 4), 0.5, np.float32), [1.0, 2.0, 3.0, 4.0])))
    (affine,) = [op for op in net.operations.values() if isinstance(op, network.Affine)]
    assert np.array_equal(affine.scale, [0.5]) and np.array_equal(affine.offset, [1, 2, 3, 4])
