import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import bstf
from benchmarks import trainable_gamma
from benchmarks.records import Records
from bstf.datasets import Dataset
from bstf.penalties import BoxedGammaRatio


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 16, 64).astype("int32")
    images = rng.normal(size=(64, 16)).astype("float32") + 3 * np.eye(16, dtype="float32")[labels]
    images = images.reshape(64, 1, 1, 16)
    batches = tf.data.Dataset.from_tensor_slices((images, labels)).batch(16)
    return Dataset("blobs", batches, batches, (1, 1, 16), 16)


def network():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((1, 1, 16))
    x = keras.layers.Flatten()(keras.layers.Conv2D(32, 1, activation="relu")(inputs))
    return keras.Model(inputs, keras.layers.Dense(16, activation="softmax")(x))


def test_a_run_warms_up_chooses_and_retrains(data):
    known = trainable_gamma.methods([0.5], lasso=1e-4)
    assert len(known) == 9
    result = trainable_gamma.run(known["straight-through"], network(), data, ratio=0.5, epochs=2, warm_up=1)
    assert result["block_ratio"] == 0.5
    assert 0 <= result["accuracy"] <= 1 and np.isfinite(result["loss"])
    assert result["gamma_range"] > 0 and 0 <= result["same_as_l2"] <= 1
    json.dumps(result)


def test_methods_are_what_their_names_say():
    known = trainable_gamma.methods([1.0, 0.5], lasso=1e-4)
    assert known["l2"].prepare is None
    lasso = known["group lasso"].prepare(network(), 0.5)
    assert [layer.group_lasso for layer in lasso.layers if hasattr(layer, "block")] == [1e-4, 1e-4]
    (layer, _) = trainable_gamma.soft_layers(known["Γ, eq. 15 reversed x 0.5"].prepare(network(), 0.25))
    assert layer.gamma_regularizer.get_config() == BoxedGammaRatio(0.25, strength=0.5, sign=1).get_config()


def test_agreement_counts_blocks(data):
    dense = network()
    assert trainable_gamma.agreement(bstf.sparsify(dense, ratio=0.5), dense, 0.5) == 1
    assert trainable_gamma.agreement(bstf.sparsify(dense, ratio=0), dense, 0.5) == 0.5


def test_an_interrupted_file_is_mended_and_the_table_printed(tmp_path):
    record = {
        "dataset": "d", "network": "n", "method": "l2", "ratio": 0.5, "seed": 0, "dense_accuracy": 0.9,
        "accuracy": 0.8, "loss": 0.5, "same_as_l2": 1.0,
    }  # fmt: skip
    other = record | {"method": "straight-through", "accuracy": 0.85, "gamma_range": 0.25}
    path = tmp_path / "runs.jsonl"
    path.write_text(f'{json.dumps(record)}\n{json.dumps(other)}\n{{"dataset": "d", "met', encoding="utf-8")
    records = Records(path)
    assert records == [record, other] and path.read_text().endswith("}\n")
    made = trainable_gamma.table([*records, other | {"seed": 1}, record | {"seed": 1, "accuracy": 0.75}])
    columns = {column.header: list(column.cells) for column in made.columns}
    assert columns["method"] == ["l2", "straight-through"]
    assert columns["accuracy"] == ["77.50 ± 3.54", "85.00 ± 0.00"]
    assert columns["over l2"] == ["+0.00 ± 0.00", "+7.50 ± 3.54"]
    assert columns["range of Γ"] == ["", "0.250 ± 0.000"]
