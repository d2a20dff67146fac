import csv
import io
import json
import math

import keras
import numpy as np
import pytest
from keras import layers

from bstf.quantization import quantize, report
from bstf.quantization.positions import half_even, to_grid


def build(kernel_scale=0.3):
    keras.utils.set_random_seed(0)
    entry = keras.Input((8, 8, 3), name="image")
    normal = {"kernel_initializer": keras.initializers.RandomNormal(stddev=kernel_scale), "bias_initializer": "ones"}
    a = layers.ReLU(name="relu")(layers.Conv2D(8, 3, padding="same", name="a", **normal)(entry))
    b = layers.DepthwiseConv2D(3, padding="same", name="b", bias_initializer="ones")(a)
    x = layers.AveragePooling2D(2, name="mean")(layers.Add(name="sum")([a, b]))
    x = layers.Dense(5, name="d", activation="softmax", **normal)(layers.Flatten(name="flat")(x))
    return keras.Model(entry, x, name="net")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(20, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def pair(images):
    model = build()
    return model, quantize(model, images, activations="non_overflow", compensate=False)


def decibels(exact, found):
    exact, found = np.asarray(exact, np.float64), np.asarray(found, np.float64)
    return 10 * np.log10(np.sum(exact**2) / np.sum((exact - found) ** 2))


def upto(model, name):
    return keras.Model(model.input, model.get_layer(name).output)


def test_noise_is_that_of_the_two_models_layers(pair, images):
    model, quantised = pair
    result = report(model, quantised, images)
    rows = {row.layer: row for row in result.layers}
    assert list(rows) == ["image", "a", "b", "sum", "mean", "d"]
    for layer, of_float in {"a": "relu", "b": "b", "sum": "sum", "mean": "mean"}.items():
        expected = decibels(upto(model, of_float)(images), upto(quantised, f"{layer}_grid")(images))
        assert rows[layer].sqnr == pytest.approx(expected, abs=1e-3)
    dense = model.get_layer("d")
    logits = np.asarray(upto(model, "flat")(images)) @ np.asarray(dense.kernel) + np.asarray(dense.bias)
    assert rows["d"].sqnr == pytest.approx(decibels(logits, upto(quantised, "d_grid")(images)), abs=1e-3)
    assert result.sqnr == pytest.approx(rows["d"].sqnr)
    assert result.images == 20


def test_positions_are_those_of_the_layers(pair, images):
    model, quantised = pair
    for row in report(model, quantised, images[:1]).layers:
        assert row.position == quantised.get_layer(f"{row.layer}_grid").position
        if row.layer in "abd":
            layer = quantised.get_layer(row.layer)
            assert (row.kernel_position, row.bias_position) == (layer.kernel_position, layer.bias_position)
        else:
            assert row.kernel_position is row.bias_position is None


def test_saturation_is_the_fraction_of_clipped_values(pair, images):
    model, quantised = pair
    wide = 4 * images  # beyond what the calibration saw
    for row in report(model, quantised, wide).layers:
        grid = quantised.get_layer(f"{row.layer}_grid")
        before = np.asarray(keras.Model(quantised.input, grid.input)(wide), np.float64)
        integers = np.floor(before * 2.0**row.position + 0.5)
        assert row.saturation == np.mean((integers > 127) | (integers < -128))
    assert report(model, quantised, wide).layers[0].saturation > 0
    assert report(model, quantised, images).layers[0].saturation == 0


def test_sensitivity_quantises_one_layer_alone(pair, images):
    model, quantised = pair
    rows = {row.layer: row for row in report(model, quantised, images, sensitivity=True).layers}
    # The same for the first convolution, by hand: its kernel, bias and output on grids, the rest in float.
    op, fixed = model.get_layer("a"), quantised.get_layer("a")
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    copy.get_layer("a").set_weights([fixed.kernel, fixed.bias])
    assert np.array_equal(fixed.kernel, to_grid(np.asarray(op.kernel), fixed.kernel_position, half_even))
    hidden = quantised.get_layer("a_grid")(upto(copy, "relu")(images))
    x = copy.get_layer("mean")(hidden + copy.get_layer("b")(hidden))
    dense = model.get_layer("d")

    def logits(x):
        return np.asarray(layers.Flatten()(x)) @ np.asarray(dense.kernel) + np.asarray(dense.bias)

    assert rows["a"].sensitivity == pytest.approx(decibels(logits(upto(model, "mean")(images)), logits(x)), abs=1e-2)
    assert all(row.sensitivity > report(model, quantised, images).sqnr for row in rows.values())


def test_equalised_models_are_compared_at_their_own_scales(images):
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3), name="image"),
            layers.Conv2D(8, 3, name="a"),
            layers.ReLU(name="relu"),
            layers.Conv2D(4, 3, name="b"),
        ]
    )
    scale = 2.0 ** np.arange(-3, 5)
    head, tail = model.get_layer("a"), model.get_layer("b")
    head.kernel.assign(head.kernel * scale)
    tail.kernel.assign(tail.kernel / scale[:, None])
    plain, equalised = (quantize(model, images, equalize=equal) for equal in (False, True))
    noise = {row.layer: row.sqnr for row in report(model, equalised, images).layers}
    assert min(noise.values()) > 25  # unequal scales would give less than 10
    assert noise["b"] > report(model, plain, images).sqnr + 5


def test_every_kind_of_grid_has_a_row(images):
    entry = keras.Input((8, 8, 3), name="image")
    x = layers.Rescaling(0.5, name="rescaled")(entry)
    x = layers.Conv2DTranspose(4, 2, 2, name="transposed")(x)
    y = layers.Activation("sigmoid", name="sigmoid")(x)
    x = layers.Subtract(name="difference")([layers.Multiply(name="product")([x, y]), y])
    x = layers.UpSampling2D(2, interpolation="bilinear", name="larger")(x)
    x = layers.Concatenate(name="both")([x, x])
    model = keras.Model(entry, layers.GlobalMaxPooling2D(name="max")(x))
    quantised = quantize(model, images, compensate=False)
    result = report(model, quantised, images[:4], sensitivity=True)
    names = {layer.name.removesuffix("_grid") for layer in quantised.layers if layer.name.endswith("_grid")}
    assert {row.layer for row in result.layers} == names >= {"rescaled", "transposed", "sigmoid", "difference", "both"}
    expected = decibels(model(images[:4]), quantised(images[:4]))
    assert result.sqnr == pytest.approx(expected, abs=1e-2)
    assert min(row.sensitivity for row in result.layers) > result.sqnr > 15


def test_an_exact_layer_has_infinite_sqnr(images):
    model = keras.Sequential([keras.Input((2,), name="x"), layers.Dense(2, name="d")])
    model.get_layer("d").set_weights([np.eye(2), np.zeros(2)])
    x = np.array([[0.5, -1.0], [0.25, 0.0]], np.float32)
    result = report(model, quantize(model, x), x, sensitivity=True)
    assert {row.sqnr for row in result.layers} == {math.inf}
    assert "exact" in str(result)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["layers"][0]["sqnr"] is None


def test_table_dictionary_and_csv(pair, images, tmp_path):
    result = report(*pair, images, sensitivity=True)
    text = str(result)
    for row in result.layers:
        assert any(row.layer in line and f"{row.sqnr:.1f}" in line for line in text.splitlines())
    assert json.loads(json.dumps(result.to_dict()))["layers"][1]["layer"] == "a"
    written = result.to_csv(tmp_path / "noise.csv")
    assert (tmp_path / "noise.csv").read_text() == written
    rows = list(csv.DictReader(io.StringIO(written)))
    assert [row["layer"] for row in rows] == [row.layer for row in result.layers]
    assert float(rows[1]["sqnr"]) == result.layers[1].sqnr
    assert "alone" not in str(report(*pair, images))


def test_wrong_models_are_refused(pair, images):
    model, quantised = pair
    with pytest.raises(ValueError, match=r"'net' isn't a fixed-point model.*bstf.quantize"):
        report(model, model, images)
    other = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(8, 3, name="other")])
    with pytest.raises(ValueError, match=r"'other'.*isn't in 'net'.*made of"):
        report(other, quantised, images)
    resized = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(7, 3, name="a")])
    with pytest.raises(ValueError, match=r"'a' has a kernel of shape \(3, 3, 3, 7\).*\(3, 3, 3, 8\)"):
        report(resized, quantised, images)
    with pytest.raises(ValueError, match="no images"):
        report(model, quantised, images[:0])
