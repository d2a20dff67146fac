import keras
import numpy as np
import pytest
from keras import layers

from bstf.blocks import nonzero_blocks
from bstf.layers import MaskedConv2D, MaskedDense
from bstf.quantization import equalize as room
from bstf.quantization.calibrate import run
from bstf.quantization.equalize import equalize, pairs
from bstf.quantization.fold import flatten


def unequal(model, seed=0):
    """Random weights whose output channels differ by factors up to 30."""
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        values = rng.normal(size=variable.shape) * (0.3 if len(variable.shape) > 1 else 0.1)
        variable.assign(values * rng.uniform(0.1, 3.0, variable.shape[-1]))
    return model


def build(*middle, size=9, channels=6, tail=None):
    stack = [keras.Input((size, size, 3), name="image"), layers.Conv2D(channels, 3, name="head"), *middle]
    return unequal(keras.Sequential([*stack, tail or layers.Conv2D(5, 2, name="tail")]))


def assert_same_function(model, images):
    before, after = (dict(run(net, [images])) for net in (flatten(model), equalize(flatten(model))))
    last = list(before)[-1]
    scale = np.abs(before[last]).max()
    np.testing.assert_allclose(after[last], before[last], atol=1e-5 * scale)


MIDDLES = {
    "none": (lambda: [], None),
    "relu": (lambda: [layers.ReLU()], None),
    "relu_pad_max": (
        lambda: [layers.ReLU(), layers.ZeroPadding2D(((1, 0), (0, 2))), layers.MaxPooling2D(2)],
        None,
    ),
    "average": (lambda: [layers.AveragePooling2D(3, 2, "same"), layers.ReLU()], None),
    "flatten": (lambda: [layers.ReLU(), layers.Flatten()], lambda: layers.Dense(4, name="tail")),
    "global_max": (lambda: [layers.GlobalMaxPooling2D()], lambda: layers.Dense(4, name="tail")),
    "global_average": (
        lambda: [layers.GlobalAveragePooling2D(keepdims=True)],
        lambda: layers.Conv2D(4, 1, name="tail"),
    ),
    "depthwise": (
        lambda: [layers.ReLU()],
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, name="tail"),
    ),
    "crop_resize": (
        lambda: [layers.Cropping2D(1), layers.UpSampling2D(2, interpolation="bilinear"), layers.ReLU()],
        None,
    ),
    "transposed": (lambda: [layers.ReLU()], lambda: layers.Conv2DTranspose(5, 2, 2, name="tail")),
    "grouped": (lambda: [layers.ReLU()], lambda: layers.Conv2D(8, 3, groups=2, name="tail")),
}


@pytest.mark.parametrize("kind", MIDDLES)
def test_both_layers_get_the_same_largest_weights_and_the_function_stays(kind):
    middle, tail = MIDDLES[kind]
    model = build(*middle(), tail=tail and tail())
    images = np.random.default_rng(1).normal(size=(3, 9, 9, 3)).astype(np.float32)
    assert_same_function(model, images)
    ((head, tail),) = pairs(equalize(flatten(model)))
    # By hand, on the kernels as Keras lays them out.
    ranges = np.abs(head.kernel).max(axis=(0, 1, 2))
    if kind == "flatten":
        inputs = np.abs(tail.kernel).reshape(49, 6, 4).max(axis=(0, 2))
    elif tail.kernel.ndim == 2:
        inputs = np.abs(tail.kernel).max(axis=1)
    elif kind == "depthwise":
        inputs = np.abs(tail.kernel).reshape(3, 3, 6, 2).max(axis=(0, 1, 3))
    elif kind == "grouped":
        both = np.abs(tail.kernel).max(axis=(0, 1))
        inputs = np.concatenate([both[:, :4].max(axis=1), both[:, 4:].max(axis=1)])
    else:
        inputs = np.abs(tail.kernel).max(axis=(0, 1, 3))
    np.testing.assert_allclose(ranges, inputs, rtol=1e-5)


def test_a_depthwise_convolution_in_the_middle_shares_one_range_of_each_channel(monkeypatch):
    monkeypatch.setattr(room, "STEPS", 60)
    model = build(layers.ReLU(), layers.DepthwiseConv2D(3, name="middle"), layers.ReLU())
    before = [op.kernel for op in flatten(model).operations.values() if hasattr(op, "kernel")]
    after = [op.kernel for op in equalize(flatten(model)).operations.values() if hasattr(op, "kernel")]

    def ranges(head, middle, tail):
        kernels = np.abs(head), np.abs(middle), np.abs(tail)
        return [kernel.max(axis=axes) for kernel, axes in zip(kernels, ((0, 1, 2), (0, 1, 2), (0, 1, 3)))]

    expected = np.cbrt(np.prod(ranges(*before), axis=0))  # the only ranges that are equal and keep their product
    for found in ranges(*after):
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert_same_function(model, np.random.default_rng(1).normal(size=(3, 9, 9, 3)).astype(np.float32))


def test_zero_blocks_stay_exactly_zero():
    entry = keras.Input((5, 5, 16), name="image")
    x = MaskedConv2D(24, 3, name="a")(entry)
    x = MaskedDense(8, name="b")(layers.Flatten()(layers.ReLU()(layers.BatchNormalization()(x))))
    model = unequal(keras.Model(entry, x))
    rng = np.random.default_rng(0)
    for name, shape in (("a", (2, 3)), ("b", (27, 1))):
        model.get_layer(name).set_gamma(rng.integers(0, 2, shape))
    before, after = flatten(model), equalize(flatten(model))
    assert not np.array_equal(after.operations["a"].kernel, before.operations["a"].kernel)
    for name in "ab":
        old, new = before.operations[name], after.operations[name]
        assert np.array_equal(nonzero_blocks(new.kernel, new.block), nonzero_blocks(old.kernel, old.block))
        assert not np.signbit(new.kernel[old.kernel == 0]).any()


def residual():
    entry = keras.Input((8, 8, 4), name="image")
    a = layers.Conv2D(4, 3, padding="same", name="a")(entry)
    b = layers.Conv2D(4, 3, padding="same", name="b", activation="relu6")(a)
    c = layers.Conv2D(4, 3, padding="same", name="c")(b)
    d = layers.Conv2D(4, 3, padding="same", name="d")(layers.Add(name="add")([c, a]))
    e = layers.Conv2D(4, 3, padding="same", name="e")(d)
    return keras.Model(entry, [d, e])


def test_no_pair_through_relu6_forks_sums_and_outputs():
    assert [(head.name, tail.name) for head, tail in pairs(flatten(residual()))] == []


@pytest.mark.parametrize(
    ("head", "tail", "expected"),
    [
        (1.0, 4.0, 2.0),
        (4.0, 1.0, 0.5),
        (1e-3, 1.0, 10.0),  # clipped
        (1.0, 1e-3, 0.1),
        (0.01, 0.08, 1.0),  # negligible: a sum below 0.1
        (0.0, 4.0, 1.0),  # a dead channel, whose bias would grow in every step
        (4.0, 0.0, 1.0),
    ],
)
def test_scales(head, tail, expected):
    assert room._scales(np.array([head]), np.array([tail])).item() == pytest.approx(expected)


def test_a_negative_output_scale_never_appears_and_relu_keeps_its_sign():
    network = equalize(flatten(build(layers.ReLU())))
    original = flatten(build(layers.ReLU()))
    for name in ("head", "tail"):
        old, new = original.operations[name].kernel, network.operations[name].kernel
        assert np.array_equal(np.sign(old), np.sign(new))


def test_overflow_names_the_layer():
    model = build()
    model.get_layer("head").bias.assign(np.full(6, 3e38))
    model.get_layer("tail").kernel.assign(np.full((2, 2, 6, 5), 1e3))
    with pytest.raises(ValueError, match=r"'head' overflows.*too large"):
        equalize(flatten(model))
