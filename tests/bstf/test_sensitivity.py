"""Measurements against models sparsified for real, and allocations against a linear program."""

import json

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers
from scipy.optimize import linprog

import bstf
from bstf.allocation import allocate


def network(seed=0):
    keras.utils.set_random_seed(seed)
    inner = keras.Sequential(
        [keras.Input((6, 6, 8)), layers.Conv2D(32, 3, activation="relu", name="conv")], name="inner"
    )
    inputs = keras.Input((6, 6, 8))
    x = layers.BatchNormalization()(inner(inputs))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(40, 3, activation="relu", name="last")(x))
    model = keras.Model(inputs, layers.Dense(16, activation="softmax", name="class")(x), name="net")
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(24, 6, 6, 8)).astype("float32")
    return model, (x, model.predict(x, verbose=0).argmax(axis=1))


def evaluated(model, data):
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model.evaluate(*data, verbose=0)


def test_one_layer_at_a_time():
    model, (x, y) = network()
    before = model.get_weights()
    found = bstf.sensitivity(model, iter([(x[:10], y[:10]), (x[10:], y[10:])]), ratios=(0.25, 0.5))
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)
    assert [row.layer for row in found.rows] == ["inner/conv"] * 2 + ["last"] * 2 + ["class"] * 2
    loss, accuracy = evaluated(model, (x, y))
    assert found.base.loss == pytest.approx(loss, rel=1e-5) and found.base.accuracy == accuracy == 1.0
    for i, row in enumerate(found.rows):
        sparse = bstf.sparsify(model, ratio=(0.25, 0.5)[i % 2], layers=[row.layer])
        loss, accuracy = evaluated(sparse, (x, y))
        assert row.loss == pytest.approx(loss, rel=1e-4) and row.accuracy == pytest.approx(accuracy, abs=1e-6)
        assert row.ratio == next(one.ratio for one in bstf.report(sparse).layers if one.layer == row.layer)
    assert len({round(row.loss, 6) for row in found.rows}) > 3


def test_masked_layers_and_lora_count_what_they_compute():
    model, data = network()
    sparse = bstf.sparsify(model, ratio=0.25)
    sparse.get_layer("class").enable_lora(2)
    sparse.get_layer("class").lora_kernel_b.assign(np.ones((2, 16)))
    found = bstf.sensitivity(sparse, data, ratios=(0.6,), loss="sparse_categorical_crossentropy")
    for row in found.rows:
        loss, _ = evaluated(bstf.sparsify(sparse, ratio=0.6, layers=[row.layer]), data)
        assert row.loss == pytest.approx(loss, rel=1e-4), row.layer


def test_table_dict_and_plot(tmp_path):
    model, data = network()
    found = bstf.sensitivity(model, data, ratios=(0.5,), layers="last|class", importance="wanda")
    text = str(found)
    assert "Sensitivity of net" in text and "inner/conv" not in text
    assert all(f"{row.loss:.4f}" in text and f"{row.accuracy:.4f}" in text for row in found.rows)
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["layer"] == "last"
    figure = found.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "accuracy"]
    line = figure.axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), [found.base.loss, found.rows[0].loss])


def test_labels_that_are_not_classes_have_no_accuracy():
    model, (x, _) = network()
    found = bstf.sensitivity(model, (x, np.zeros((24, 16))), ratios=(0.5,), loss="mse")
    assert found.base.accuracy is None and "-" in str(found) and len(found.plot().axes) == 1


CURVES = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 10_000)), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None)
@given(curves=CURVES, share=st.floats(0, 1))
def test_allocation_is_the_optimum_of_the_linear_program(curves, share):
    """Convex curves: the cheapest way to save enough, by scipy."""
    saved, losses, price, gain = {}, {}, [], []
    for i, (steps, seed) in enumerate(curves):
        rng = np.random.default_rng(seed)
        gains, prices = rng.uniform(0.1, 2, steps), np.sort(rng.normal(size=steps))
        saved[str(i)] = np.concatenate([[0], np.cumsum(gains)])
        losses[str(i)] = 1 + np.concatenate([[0], np.cumsum(prices * gains)])
        price += list(prices * gains)
        gain += list(gains)
    needed = share * sum(gain)
    reached = allocate(saved, losses, needed)
    at = {path: np.interp(reached[path], range(len(saved[path])), saved[path]) for path in saved}
    cost = sum(np.interp(at[path], saved[path], losses[path]) - 1 for path in saved)
    assert sum(at.values()) == pytest.approx(needed, abs=1e-9)
    best = linprog(price, A_eq=[gain], b_eq=[needed], bounds=(0, 1))
    assert cost == pytest.approx(best.fun, abs=1e-7)


def test_a_broken_layer_does_not_look_free():
    saved = {"broken": np.array([0.0, 1.0, 2.0, 3.0]), "tough": np.array([0.0, 1.0, 2.0, 3.0])}
    losses = {"broken": np.array([0.0, 5.0, 5.0, 5.0]), "tough": np.array([0.0, 1.0, 2.0, 3.0])}
    assert allocate(saved, losses, 3.0) == {"broken": 0.0, "tough": 3.0}
    assert allocate(saved, losses, 3.5) == {"broken": 0.5, "tough": 3.0}
    done = {"a": np.array([2.0, 4.0])}
    assert allocate(done, {"a": np.array([1.0, 2.0])}, 2.0) == {"a": 0.0}
    assert allocate(done, {"a": np.array([1.0, 2.0])}, 3.0) == {"a": 0.5}


@pytest.mark.parametrize("target", [0.4, 0.7])
@pytest.mark.parametrize("kind", ["target_macs", "target_bytes"])
@pytest.mark.parametrize("scope", ["layer", "column", "row"])
def test_auto_meets_its_target(kind, target, scope):
    model, data = network()
    sparse = bstf.sparsify(model, 4, "auto", data=data, scope=scope, **{kind: target})
    rows = bstf.report(sparse).layers
    dense = [row.dense_macs if kind == "target_macs" else np.prod(row.kernel) for row in rows]
    kept = sum(share * (1 - row.ratio) for share, row in zip(dense, rows)) / sum(dense)
    block = max(share / row.blocks for share, row in zip(dense, rows)) / sum(dense)
    assert kept <= target + 1e-9
    if scope == "layer":
        assert kept >= target - 3 * block


def test_dead_blocks_stay_dead_in_the_measurement():
    model, data = network()
    sparse = bstf.sparsify(model, 4, 0.5)
    sparse.compile(loss=model.loss)
    for row in bstf.sensitivity(sparse, data, block=4, ratios=(0, 0.25)).rows:
        assert row.ratio >= 0.4 and row.loss == pytest.approx(bstf.sensitivity(sparse, data, block=4).base.loss)


def test_auto_spares_the_layer_that_matters():
    """Of two layers of the same shape one has useless blocks; at half the weights it gives up the more."""
    inputs = keras.Input((16,))
    x = layers.Dense(16, use_bias=False, name="useless")(inputs)
    model = keras.Model(inputs, layers.Dense(16, use_bias=False, name="vital")(x))
    rng = np.random.default_rng(0)
    useless = rng.normal(size=(16, 16))
    useless[:, 4:] *= 1e-3
    model.get_layer("useless").kernel.assign(useless)
    model.get_layer("vital").kernel.assign(rng.normal(size=(16, 16)))
    x = rng.normal(size=(32, 16)).astype("float32")
    data = (x, model.predict(x, verbose=0))
    settings = {"data": data, "loss": "mse", "importance": "l2", "min_per_line": 0}
    auto = bstf.sparsify(model, 4, "auto", target_bytes=0.6, **settings)
    ratios = {row.layer: row.ratio for row in bstf.report(auto).layers}
    assert ratios["useless"] > 0.7 > ratios["vital"]
    even = bstf.sparsify(model, 4, 0.4, min_per_line=0)
    losses = []
    for one in (auto, even):
        one.compile("sgd", "mse")
        losses.append(one.evaluate(*data, verbose=0))
    assert losses[0] < losses[1]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"ratio": "auto"}, "needs a target: give target_macs or target_bytes"),
        ({"ratio": "auto", "target_macs": 0.5, "target_bytes": 0.5}, "one of them"),
        ({"ratio": 0.5, "target_macs": 0.5}, "use them with ratio='auto'"),
        ({"ratio": "auto", "target_macs": 0.5, "data": None}, "measures the loss of sparse layers: give data="),
        ({"ratio": "auto", "target_macs": 0.5, "scope": "global"}, "use one of them"),
        ({"ratio": "auto", "target_macs": 0.0}, r"target_macs is a fraction of the dense model, in \(0, 1\]; got 0.0"),
        (
            {"ratio": "auto", "target_bytes": 0.01},
            r"target_bytes=0.01 can't be met: with 90% .* 0\.\d+ of the dense 'net'",
        ),
        ({"ratio": "automatic"}, "ratio is the fraction of zero blocks"),
    ],
)
def test_bad_targets_are_sentences(arguments, sentence):
    model, data = network()
    with pytest.raises(ValueError, match=sentence):
        bstf.sparsify(model, **{"data": data, **arguments})


def test_bad_sensitivities_are_sentences():
    model, data = network()
    with pytest.raises(ValueError, match=r"No layer of 'net' that is selected can be sparse in 64x64 blocks"):
        bstf.sensitivity(model, data, block=64)
    with pytest.raises(ValueError, match="ratio is the fraction of zero blocks"):
        bstf.sensitivity(model, data, ratios=(0.5, 1.0))
    with pytest.raises(ValueError, match="data holds no examples"):
        bstf.sensitivity(model, [])
    open_size = keras.Sequential([keras.Input((None, None, 8)), layers.Conv2D(16, 3), layers.GlobalMaxPooling2D()])
    with pytest.raises(
        ValueError, match="target_macs needs the multiply-adds of layer 'conv2d.*', whose input has an open"
    ):
        bstf.sparsify(open_size, ratio="auto", target_macs=0.5, data=(data[0], np.zeros((24, 16))), loss="mse")
