"""Export of a model to a SavedModel folder of plain layers, with its blocks and positions beside it."""

import json
import os
import re
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from bstf.blocks import BlockShape, nonzero_blocks
from bstf.conversion import densify
from bstf.files import make_folder, replacing
from bstf.places import effective_kernel, is_masked, places
from bstf.quantization.fixed_point import FixedPoint, FixedPointConv2D, FixedPointDense

_DEFAULT_BLOCK = BlockShape(8, 8)  # of layers that were never made sparse
_KINDS = {"conv2d": keras.layers.Conv2D, "dense": keras.layers.Dense}
_ROUNDING = {"activations": "half_up", "weights": "half_even", "biases": "half_even"}  # of bstf.quantize
_SCOPE = re.compile(r"[A-Za-z0-9_.\\/>-]+")  # of a TensorFlow name scope
_SAVED_MODEL_ENTRIES = {
    "saved_model.pb",
    "fingerprint.pb",
    "variables",
    "assets",
    "assets.extra",
    "keras_metadata.pb",
}


def export(model: keras.Model, path: str | os.PathLike) -> None:
    """Writes a SavedModel that needs neither bstf nor Keras to be read.

    Masked layers become plain ones with the zeros in their weights. In a quantised model the grids are
    FakeQuantWithMinMaxArgs operations. The folder's `assets.extra/bstf.json` lists by layer name the kind
    of kernel, the block shape, Γ (which blocks hold a weight that isn't zero) and the positions. The
    signature `serving_default` takes float32 images (batch, height, width, channels) for any batch.

    Args:
        model: a built Sequential or functional model, float or from `bstf.quantize`. It stays untouched.
        path: folder to write; missing parents are made. A SavedModel that is there already is replaced, at
            once, when the new one is complete.

    Raises:
        TypeError: `model` isn't a Keras model.
        ValueError: `model` isn't built, or is a subclassed model; or Keras doesn't run on TensorFlow.
        FileExistsError: `path` is a file, or a folder with other things than a SavedModel in it.

    Example:
        >>> bstf.export(bstf.quantize(model, images), "build/model")
    """
    path = Path(os.path.abspath(path))
    _check_model(model)
    _check_outputs(model)
    _check_names(model)
    _check_target(path)
    plain = densify(model) if any(is_masked(layer) for layer in model._flatten_layers()) else model
    description = json.dumps(describe(model), indent=1)
    make_folder(path.parent)
    with replacing(path) as written:
        _save(plain, written)
        extra = written / "assets.extra"
        extra.mkdir(exist_ok=True)
        (extra / "bstf.json").write_text(description, encoding="utf-8")


def describe(model: keras.Model) -> dict[str, Any]:
    """Blocks and positions of a model, as `bstf.json` holds them.

    Args:
        model: a built Sequential or functional model.

    Returns:
        A dictionary of JSON types: `format`, `version`, `fixed_point`, `input_positions` (by input layer),
        `layers` (by layer; a layer of a nested model is `<nested model>/<layer>`) and `positions` (by
        FixedPoint layer). A fixed-point model has `rounding` too: that of activations, which a device must do
        alike, and those with which its weights and biases were made.
    """
    layers = dict(places(model))
    positions = {name: layer.position for name, layer in layers.items() if isinstance(layer, FixedPoint)}
    return {
        "format": "bstf",
        "version": 1,
        "fixed_point": bool(positions),
        **({"rounding": _ROUNDING} if positions else {}),
        "input_positions": _input_positions(model),
        "layers": {name: entry for name, layer in layers.items() if (entry := _describe_layer(layer))},
        "positions": positions,
    }


def _save(model: keras.Model, folder: Path) -> None:
    """Writes what `keras.Model.export` does, the inference `serve`, its signature and the variables, in less time.

    Keras traces the model several times, looks through all objects of all layers, and writes every weight twice.
    """
    saved = tf.__internal__.tracking.AutoTrackable()
    for kind in ("variables", "trainable_variables", "non_trainable_variables"):
        setattr(saved, kind, [variable.value for variable in getattr(model, kind)])
    # Traced by `save`: what is traced before would be traced once more.
    saved.serve = tf.function(model, input_signature=_signature(model), autograph=False)
    tf.saved_model.save(saved, str(folder), signatures={tf.saved_model.DEFAULT_SERVING_SIGNATURE_DEF_KEY: saved.serve})


def _check_model(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(f"export needs a Keras model; got {type(model).__name__}.")
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"Keras runs on {keras.backend.backend()}, and only TensorFlow exports: save model {model.name!r} as a "
            ".keras file, and load and export it with KERAS_BACKEND=tensorflow in the environment."
        )
    if isinstance(model, keras.Sequential):
        if not model.built or not model.inputs:
            raise ValueError(f"model {model.name!r} isn't built; give it a keras.Input as its first layer.")
    elif not getattr(model, "inputs", None):
        raise ValueError(
            f"model {model.name!r} is a subclassed {type(model).__name__}; write it as a functional "
            "or Sequential model to export it."
        )


def _check_outputs(model: keras.Model) -> None:
    """TensorFlow names outputs that are one tensor, or in one list or dictionary."""
    structure = getattr(model, "_outputs_struct", None)  # a Sequential gives one tensor
    entries = structure.values() if isinstance(structure, dict) else structure
    if isinstance(structure, (dict, list, tuple)) and any(isinstance(one, (dict, list, tuple)) for one in entries):
        raise ValueError(
            f"model {model.name!r} gives lists or dictionaries inside others, which a SavedModel's signature can't "
            "name; give one list or dictionary of tensors."
        )


def _check_names(model: keras.Model) -> None:
    for name, _ in places(model):
        if not _SCOPE.fullmatch(name):
            raise ValueError(
                f"layer {name!r} has a name that TensorFlow can't write; use letters, digits and _ . - > only."
            )


def _check_target(path: Path) -> None:
    above = next(folder for folder in path.parents if folder.exists())
    if not above.is_dir():
        raise FileExistsError(f"{path} can't be written: {above} isn't a folder; give another path.")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise FileExistsError(f"{path} exists and isn't a folder; give another path or remove it.")
    if not path.exists():
        return
    entries = {entry.name for entry in path.iterdir()}
    if entries and "saved_model.pb" not in entries:
        raise FileExistsError(f"{path} exists and isn't a SavedModel; give another path or remove it.")
    others = sorted(entries - _SAVED_MODEL_ENTRIES)
    if others:
        raise FileExistsError(
            f"{path} holds {others[0]!r}, which isn't part of a SavedModel and would be lost; give another "
            "path or move it."
        )


def _signature(model: keras.Model) -> Any:
    """Float32 inputs of any batch, whatever the model was built with."""

    def spec(tensor: Any) -> tf.TensorSpec:
        return tf.TensorSpec((None, *tensor.shape[1:]), tf.float32, tensor.name)

    if isinstance(model, keras.Sequential):
        return [spec(model.inputs[0])]
    return [keras.tree.map_structure(spec, model._inputs_struct)]


def _describe_layer(layer: keras.layers.Layer) -> dict[str, Any] | None:
    kind = next((kind for kind, base in _KINDS.items() if isinstance(layer, base)), None)
    if kind is None or getattr(layer, "groups", 1) != 1:  # a grouped kernel has no plane of blocks
        return None
    kernel = effective_kernel(layer)
    block = getattr(layer, "block", _DEFAULT_BLOCK)
    gamma = nonzero_blocks(kernel, block)
    entry = {
        "kind": kind,
        "block": list(block),
        "kernel_shape": list(kernel.shape),
        "gamma": ["".join("1" if kept else "0" for kept in row) for row in gamma],
    }
    if isinstance(layer, (FixedPointConv2D, FixedPointDense)):
        entry |= {"kernel_position": layer.kernel_position, "bias_position": layer.bias_position}
    return entry


def _input_positions(model: keras.Model) -> dict[str, int]:
    """Positions of inputs that go straight to a FixedPoint layer."""
    entries = {layer.name: layer for layer in model.layers if isinstance(layer, keras.layers.InputLayer)}
    found = {}
    for name, layer in entries.items():
        for node in layer._outbound_nodes:
            if isinstance(node.operation, FixedPoint):
                found[name] = node.operation.position
    return found
