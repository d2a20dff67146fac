"""Names of an exported model's layers are those of the loaded graph, so bstf.json is checked against every layer."""

import json

import keras
import numpy as np
import pytest

import bstf
import bstf_compiler

layers = keras.layers


def nested_and_shared():
    """Layers of default names, models in models, a layer and a model that are called twice."""
    keras.utils.clear_session()
    image = keras.Input((8, 8, 8))
    innermost = keras.Sequential([keras.Input((8, 8, 8)), layers.Conv2D(8, 1)])
    inner = keras.Sequential([keras.Input((8, 8, 8)), layers.Conv2D(8, 3, padding="same"), innermost])
    twice = layers.Conv2D(8, 3, padding="same")
    x = inner(layers.Conv2D(8, 3, padding="same")(image))
    x = inner(twice(layers.ReLU()(twice(x))))
    return keras.Model(image, layers.Dense(3)(layers.Flatten()(x)))


@pytest.mark.parametrize("fixed", [False, True])
def test_every_layer_of_bstf_json_is_checked(fixed, tmp_path):
    model = nested_and_shared()
    if fixed:
        model = bstf.quantize(model, np.random.default_rng(0).normal(size=(4, 8, 8, 8)).astype(np.float32))
    bstf.export(model, tmp_path)
    path = tmp_path / "assets.extra" / "bstf.json"
    text = path.read_text(encoding="utf-8")
    bstf_compiler.load(tmp_path)
    recorded = json.loads(text)
    assert len(recorded["layers"]) == (8 if fixed else 5)
    for name in recorded["layers"]:
        changed = json.loads(text)
        changed["layers"][name]["gamma"] = ["0" * len(row) for row in changed["layers"][name]["gamma"]]
        path.write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(ValueError, match=f"layer '{name}'.*other zero blocks"):
            bstf_compiler.load(tmp_path)
    for name in recorded["positions"]:
        path.write_text(json.dumps(recorded | {"positions": {name: 99}}), encoding="utf-8")
        with pytest.raises(ValueError, match=f"layer '{name}:grid'.*position 99"):
            bstf_compiler.load(tmp_path)
