"""Which networks go the whole road: sparsify, quantise, export, load, integer run - and whether all numbers agree.

    python -m benchmarks.coverage --output=DIR

Networks have random weights (seed 0) and small images; the last layer of a classifier gives logits. For each one: the
refusing sentence or "ok", layers that became sparse, layers whose outputs are equal in Keras' fixed-point model and in
the integer graph that was read from its SavedModel, whether TensorFlow's run of the SavedModel gives the same outputs
and the program for an array the same layers in simulation, the signal-to-noise ratio of the outputs against the float
model, seconds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import flags
from rich.console import Console

import bstf
import bstf_compiler
from benchmarks import harness
from bstf import applications
from bstf.quantization.fixed_point import FixedPoint
from bstf_compiler import Graph, console, integer
from bstf_compiler.files import replacing
from bstf_compiler.main import first_difference

FLAGS = flags.FLAGS
layers = keras.layers
_IMAGES = 4


def _of_keras(name: str, size: int = 64) -> Callable[[], keras.Model]:
    def build() -> keras.Model:
        network = getattr(keras.applications, name)
        options = {} if name == "NASNetMobile" else {"classifier_activation": None}
        return network(weights=None, input_shape=(size, size, 3), **options)

    return build


def _u_net(up: Callable[[int], keras.layers.Layer]) -> Callable[[], keras.Model]:
    """Ronneberger et al. 2015 in small: three resolutions, joined by concatenation."""

    def convolutions(x: Any, width: int, strides: int = 1) -> Any:
        for step in (strides, 1):
            x = layers.Conv2D(width, 3, step, padding="same", use_bias=False)(x)
            x = layers.ReLU()(layers.BatchNormalization()(x))
        return x

    def build() -> keras.Model:
        image = keras.Input((64, 64, 3))
        fine = convolutions(image, 16)
        middle = convolutions(fine, 32, 2)
        x = up(32)(convolutions(middle, 64, 2))
        x = up(16)(convolutions(layers.Concatenate()([x, middle]), 32))
        x = convolutions(layers.Concatenate()([x, fine]), 16)
        return keras.Model(image, layers.Conv2D(1, 1, activation="sigmoid")(x))

    return build


def _nested() -> keras.Model:
    """A model inside a Sequential, and two outputs."""
    trunk = applications.small_resnet((32, 32, 3), classes=10, widths=(16, 32), depth=1)
    trunk = keras.Model(trunk.input, trunk.get_layer("pool").output, name="trunk")
    image = keras.Input((32, 32, 3))
    features = keras.Sequential([keras.Input((32, 32, 3)), trunk], name="features")(image)
    hidden = layers.Dense(16, activation="relu", name="hidden")(features)
    outputs = {"what": layers.Dense(10, name="what")(hidden), "where": layers.Dense(4, "tanh", name="where")(features)}
    return keras.Model(image, outputs, name="nested")


def _two_inputs() -> keras.Model:
    """A photo and a depth map of half its size."""
    photo, depth = keras.Input((64, 64, 3), name="photo"), keras.Input((32, 32, 1), name="depth")
    colours = layers.Conv2D(16, 3, 2, padding="same", activation="relu")(layers.Rescaling(1 / 127.5, -1)(photo))
    shape = layers.Conv2D(16, 3, padding="same", activation="relu")(depth)
    x = layers.Conv2D(32, 3, 2, padding="same", activation="relu")(layers.Concatenate()([colours, shape]))
    x = layers.Conv2D(32, 3, padding="same", activation="relu")(x)
    return keras.Model([photo, depth], layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def _prepared() -> keras.Model:
    """Reds and blues exchanged and a mean image subtracted before a network, as published ones want it."""
    image = keras.Input((32, 32, 3))
    mean = np.random.default_rng(0).uniform(-0.2, 0.2, (32, 32, 3))
    x = keras.ops.flip(layers.Rescaling(1 / 127.5, -1)(image), axis=-1) - mean
    return keras.Model(image, applications.cifar_resnet(20)(x))


NETWORKS = {
    **{name: _of_keras(name) for name in ("ResNet50", "ResNet50V2", "VGG16")},
    "InceptionV3": _of_keras("InceptionV3", 96),
    "Xception": _of_keras("Xception", 96),
    **{name: _of_keras(name) for name in ("MobileNet", "MobileNetV2", "MobileNetV3Small")},
    **{name: _of_keras(name) for name in ("DenseNet121", "EfficientNetB0")},
    "NASNetMobile": _of_keras("NASNetMobile", 224),
    "ConvNeXtTiny": _of_keras("ConvNeXtTiny"),
    "EfficientNetLite0": lambda: applications.efficientnet_lite0((64, 64, 3)),
    "CIFAR ResNet-20": lambda: applications.cifar_resnet(20),
    "CIFAR ResNet-56": lambda: applications.cifar_resnet(56),
    "ResNet-20, BGR, mean image": _prepared,
    "U-Net, transposed": _u_net(lambda width: layers.Conv2DTranspose(width, 2, 2)),
    "U-Net, bilinear": _u_net(lambda _: layers.UpSampling2D(2, interpolation="bilinear")),
    "nested, two outputs": _nested,
    "two inputs": _two_inputs,
}


def cover(name: str) -> dict[str, Any]:
    """Takes a network the whole road; returns its record."""
    began = time.perf_counter()
    keras.utils.set_random_seed(0)
    model = NETWORKS[name]()
    images = _images(model)
    _settle(model, images)
    record: dict[str, Any] = {"network": name}
    try:
        sparse = bstf.sparsify(model, block=8, ratio=0.5)
        found = bstf.report(sparse)
        record["sparse_layers"] = sum(row.gamma is not None for row in found.layers)
        record["layers"] = len(found.layers)
        quantised = bstf.quantize(sparse, images)
        with tempfile.TemporaryDirectory() as folder:
            bstf.export(quantised, Path(folder) / "model")
            graph = bstf_compiler.load(Path(folder) / "model")
            saved_model = tf.saved_model.load(Path(folder) / "model")
            entries = [images[one.name] for one in quantised.inputs] if isinstance(images, dict) else images
            loaded = _outputs(saved_model.serve(entries))
    except ValueError as error:
        return record | {"result": str(error), "seconds": round(time.perf_counter() - began)}
    equal, compared = _equal_layers(quantised, graph, images)
    predicted, computed = _outputs(quantised.predict(images, verbose=0)), _outputs(integer.run(graph, images))
    same = all(np.array_equal(*pair) for pair in zip(loaded, predicted, strict=True))
    for name, one, other in zip(graph.outputs, loaded, computed, strict=True):
        # A softmax is of floats, and NumPy's differs from TensorFlow's in the last bits.
        same &= (np.array_equal if graph.tensors[name].position is not None else np.allclose)(one, other)
    ok = same and equal == compared > 0
    record |= {"result": "ok" if ok else "NOT EQUAL", "equal": equal, "compared": compared, "saved_model": same}
    record["array"] = _on_array(graph, keras.tree.map_structure(lambda array: array[:1], images))
    worst = min(bstf.quantization.report(sparse, quantised, images).layers, key=lambda layer: layer.sqnr)
    record |= {"worst_sqnr_db": round(worst.sqnr, 1), "worst_layer": worst.layer}
    record["output_sqnr_db"] = round(_output_sqnr(sparse, graph, images), 1)
    return record | {"seconds": round(time.perf_counter() - began)}


def _images(model: keras.Model) -> np.ndarray | dict[str, np.ndarray]:
    """Smooth random images, for noise says little about positions; in the range that the network's front expects."""
    rng = np.random.default_rng(0)
    images = {}
    for entry in model.inputs:
        height, width, channels = entry.shape[1:]
        coarse = rng.normal(size=(_IMAGES, 8, 8, channels)).astype(np.float32)
        smooth = keras.ops.convert_to_numpy(keras.ops.image.resize(coarse, (height, width), "bicubic"))
        readers = [node.operation for node in entry._keras_history.operation._outbound_nodes]
        scaled = any(isinstance(layer, layers.Rescaling) for layer in readers)
        images[entry.name] = np.clip(127 + 64 * smooth, 0, 255) if scaled else smooth
    return images if len(images) > 1 else images[model.inputs[0].name]


def _settle(model: keras.Model, images: Any) -> None:
    """Gives batch normalisations the statistics of the images, as after a training, and scales of their own."""
    rng = np.random.default_rng(0)
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, layers.BatchNormalization)]
    for norm in norms:
        for weight in norm.trainable_weights:
            weight.assign(weight + rng.uniform(-0.3, 0.3, weight.shape))
    if norms:
        bstf.recovery.reestimate_batch_norm(model, images)


def _outputs(values: Any) -> list[np.ndarray]:
    return [np.asarray(value) for value in keras.tree.flatten(values)]


def _equal_layers(quantised: keras.Model, graph: Graph, images: integer.Images) -> tuple[int, int]:
    """How many tensors on grids the Keras model and the graph both have, and how many of them are equal."""
    traced = integer.trace(graph, images)
    grids = {layer.name.removesuffix("_grid"): layer for layer in quantised.layers if isinstance(layer, FixedPoint)}
    names = [name for name in grids if name in traced and graph.tensors[name].position is not None]
    values = keras.Model(quantised.inputs, [grids[name].output for name in names]).predict(images, verbose=0)
    equal = 0
    for name, value in zip(names, values):
        own = integer.dequantize(traced[name], graph.tensors[name].position)
        equal += np.array_equal(own.reshape(value.shape), value)
    return equal, len(names)


def _on_array(graph: Graph, image: integer.Images) -> str:
    """Whether the simulated program gives the integer graph's values in every layer; or why there is none."""
    try:
        program = bstf_compiler.compile(graph, FLAGS.device)
    except ValueError as error:
        return str(error)
    return first_difference(program, graph, image) or "ok"


def _output_sqnr(model: keras.Model, graph: Graph, images: integer.Images) -> float:
    """Signal-to-noise ratio of the outputs in dB, the lowest of several."""
    both = model.predict(images, verbose=0), integer.run(graph, images)
    wanted, found = (keras.tree.flatten(values) for values in both)
    ratios = [np.square(a).mean() / max(np.square(a - b).mean(), 1e-30) for a, b in zip(wanted, found)]
    return float(10 * np.log10(min(ratios)))


def main(argv: Sequence[str]) -> None:
    """Covers the networks asked for, and prints what is known of all."""
    harness.check_networks(FLAGS.network, NETWORKS)
    log = harness.Log(Path(FLAGS.output), "coverage")
    log.header({"machine": harness.machine()})
    for name in FLAGS.network or NETWORKS:
        keras.backend.clear_session()
        log.add(cover(name))
        log.write_csv()
    columns = {
        "network": lambda one: one["network"],
        "result": lambda one: one["result"].split(":")[0],
        "layers": lambda one: f"{one.get('sparse_layers', '')} of {one.get('layers', '')}",
        "equal": lambda one: f"{one['equal']} of {one['compared']}" if "equal" in one else "",
        "in TensorFlow": lambda one: ("ok" if one["saved_model"] else "NOT EQUAL") if "saved_model" in one else "",
        "on the array": lambda one: one.get("array", "").split(":")[0],
        "worst layer, dB": lambda one: f"{one['worst_sqnr_db']} {one['worst_layer']}" if "worst_layer" in one else "",
        "output, dB": lambda one: str(one.get("output_sqnr_db", "")),
        "s": lambda one: str(one["seconds"]),
    }
    with replacing(Path(FLAGS.output) / "coverage.md") as temporary:
        temporary.write_text(_markdown(log.records, columns), encoding="utf-8")
    Console(width=140).print(harness.table("networks", log.records, columns))


def _markdown(records: list[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    """The records as a Markdown table, a network a line."""
    rows = [list(columns), ["---"] * len(columns), *([value(one) for value in columns.values()] for one in records)]
    return "".join(f"| {' | '.join(cell.replace('|', ' ') for cell in row)} |\n" for row in rows)


def define_flags() -> None:
    """Defines the flags of the program."""
    flags.DEFINE_multi_string("network", [], "A network; may be given again; none for all.")
    flags.DEFINE_string("device", "aie2_4x4", "Device to compile for and simulate.")
    flags.DEFINE_string("output", None, "Folder for the results.", required=True)


if __name__ == "__main__":
    console.run("coverage", __doc__, main, define_flags)
