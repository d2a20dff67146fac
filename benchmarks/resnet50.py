"""ResNet50 down the whole road, dense and sparse: sizes, times on an array, and equality of every layer.

    python -m benchmarks.resnet50 --output=benchmarks/results/resnet50

Random weights (the times depend on shapes and zero blocks only) and random images. Writes results.json, layers.csv and
layers.png; ends with a non-zero exit if the simulation differs from the integer reference or from Keras anywhere, or if
zero blocks make a layer slower, or don't make one faster that weights or multiply-adds held up.
"""

from __future__ import annotations

import csv
import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import bstf
import bstf_compiler
from bstf_compiler import console, integer
from bstf_compiler.files import replacing

FLAGS = flags.FLAGS
_CONSOLE = Console()


class Stopwatch:
    """Runs steps, says so, and keeps how many seconds each took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, step: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = step()
        self.seconds[name] = time.perf_counter() - start
        _CONSOLE.print(f"{name}: {self.seconds[name]:.2f} s")
        return result


def warm_up() -> None:
    """Compiles the compiler's own kernels on a small network, so that the times below are those of the work."""
    image = keras.Input((9, 9, 8))
    x = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(image)
    x = keras.layers.MaxPooling2D(2)(keras.layers.Add()([image, x]))
    x = keras.layers.Dense(8)(keras.layers.GlobalAveragePooling2D()(x))
    images = np.random.default_rng(0).normal(size=(2, 9, 9, 8)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        bstf.export(bstf.quantize(keras.Model(image, x), images), Path(folder) / "model")
        program = bstf_compiler.compile(bstf_compiler.load(Path(folder) / "model"), "aie2_2x2")
    program.simulate(images)
    program.estimate()


def study(size: int, ratio: float, device: str) -> dict[str, Any]:
    """Runs both networks; returns everything that is reported."""
    keras.utils.set_random_seed(0)
    model = keras.applications.ResNet50(weights=None, input_shape=(size, size, 3))
    images = np.random.default_rng(0).normal(size=(8, size, size, 3)).astype(np.float32)
    warm_up()
    results: dict[str, Any] = {
        "network": f"ResNet50, {size}x{size}, random weights",
        "device": device,
        "ratio": ratio,
        "machine": f"{platform.processor() or platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("tensorflow", "keras", "numba", "numpy")},
    }
    programs = {}
    for name in ("dense", "sparse"):
        clock = Stopwatch()
        _CONSOLE.rule(name)
        network = clock("sparsify", lambda: bstf.sparsify(model, ratio=ratio)) if name == "sparse" else model
        fixed = clock("quantize", lambda network=network: bstf.quantize(network, images))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            clock("export", lambda fixed=fixed, path=path: bstf.export(fixed, path))
            graph = clock("load", lambda path=path: bstf_compiler.load(path))
        program = clock("compile", lambda graph=graph: bstf_compiler.compile(graph, device))
        estimate = clock("estimate", program.estimate)
        traced = clock("simulate", lambda program=program: program.trace(images[:1]))
        results[name] = {
            "seconds_of_steps": clock.seconds,
            "estimated_seconds": estimate.total_seconds,
            "weight_bytes": program.weight_bytes,
            "effective_macs": sum(layer.macs for layer in estimate.layers),
            "different_layers": differences(graph, fixed, traced, images[:1]),
            "compared_layers": len(traced),
        }
        programs[name] = estimate
    results["layers"] = [
        {
            "name": dense.name,
            "op": dense.op,
            "dense_seconds": dense.seconds,
            "sparse_seconds": sparse.seconds,
            "dense_bound": dense.bound,
            "sparse_bound": sparse.bound,
            "dense_macs": dense.macs,
            "sparse_macs": sparse.macs,
        }
        for dense, sparse in zip(programs["dense"].layers, programs["sparse"].layers, strict=True)
    ]
    return results


def differences(graph: Any, fixed: keras.Model, traced: dict[str, np.ndarray], image: np.ndarray) -> list[str]:
    """Layers whose simulated output isn't the integer reference's, and the last one if it isn't Keras'."""
    expected = integer.trace(graph, image)
    wrong = [name for name, value in traced.items() if not np.array_equal(value, expected[name])]
    last = list(traced)[-1]
    keras_output = keras.Model(fixed.input, fixed.get_layer(f"{last}_grid").output).predict(image, verbose=0)
    simulated = integer.dequantize(traced[last], graph.tensors[last].position)
    if not np.array_equal(simulated.reshape(keras_output.shape), keras_output):
        wrong.append(f"{last} (Keras)")
    return wrong


def unhelped(layers: list[dict[str, Any]]) -> list[str]:
    """Layers that are slower for their zero blocks by over a hundredth (a program of fewer calls may take a trifle
    longer), or not faster though weights or multiply-adds held them up.
    """
    return [
        layer["name"]
        for layer in layers
        if layer["sparse_seconds"] > 1.01 * layer["dense_seconds"]
        or (
            layer["sparse_macs"] < layer["dense_macs"]
            and layer["dense_bound"] in ("LOADW", "LOADWM", "COMP")
            and layer["sparse_seconds"] == layer["dense_seconds"]
        )
    ]


def table(results: dict[str, Any]) -> Table:
    """What the study found, dense beside sparse."""
    made = Table(title=f"{results['network']} on {results['device']}, ratio {results['ratio']}")
    made.add_column("")
    for name in ("dense", "sparse", "sparse / dense"):
        made.add_column(name, justify="right")
    dense, sparse = results["dense"], results["sparse"]
    for label, key, scale, unit in (
        ("estimated time, one image", "estimated_seconds", 1e3, "ms"),
        ("weights in DDR", "weight_bytes", 2**-20, "MiB"),
        ("effective multiply-adds", "effective_macs", 1e-9, "G"),
    ):
        values = [dense[key], sparse[key]]
        made.add_row(label, *(f"{value * scale:.3f} {unit}" for value in values), f"{values[1] / values[0]:.3f}")
    for step in ("compile", "estimate", "simulate"):
        values = [one["seconds_of_steps"][step] for one in (dense, sparse)]
        made.add_row(f"{step}, on this machine", *(f"{value:.1f} s" for value in values), "")
    return made


def write(results: dict[str, Any], folder: Path) -> None:
    """results.json, layers.csv and layers.png."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    layers = results["layers"]
    table = folder / "layers.csv"
    with replacing(table) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, layers[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(layers)
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    places = np.arange(len(layers))
    for offset, name, colour in ((-0.2, "dense", "#999999"), (0.2, "sparse", "#0072B2")):
        axes.bar(places + offset, [layer[f"{name}_seconds"] * 1e6 for layer in layers], 0.4, label=name, color=colour)
    axes.set_xticks(places, [layer["name"] for layer in layers], rotation=90, fontsize=5)
    axes.set_ylabel("estimated time, µs")
    axes.set_title(f"{results['network']} on {results['device']}", fontsize=9)
    axes.legend()
    with replacing(folder / "layers.png") as temporary:
        figure.savefig(temporary, dpi=150)


def define_flags() -> None:
    """The flags of the program."""
    flags.DEFINE_integer("size", 224, "height and width of the images, in pixels", lower_bound=32)
    flags.DEFINE_float("ratio", 0.5, "fraction of blocks that are zero", lower_bound=0.0, upper_bound=0.99)
    flags.DEFINE_string("device", "aie2_4x4", "name of a device, or path of a device file")
    flags.DEFINE_string("output", None, "folder for results.json, layers.csv and layers.png", required=True)


def main(_: Sequence[str]) -> int:
    """Runs the study."""
    results = study(FLAGS.size, FLAGS.ratio, FLAGS.device)
    write(results, Path(FLAGS.output))
    _CONSOLE.print(table(results))
    wrong = [name for network in ("dense", "sparse") for name in results[network]["different_layers"]]
    compared = sum(results[network]["compared_layers"] for network in ("dense", "sparse"))
    print(f"resnet50: simulation equals integer reference in {compared - len(wrong)} of {compared} layers")
    without_use = unhelped(results["layers"])
    print(
        f"resnet50: zero blocks help, or do no harm, in {len(results['layers']) - len(without_use)} of "
        f"{len(results['layers'])} layers"
    )
    return 1 if wrong or without_use else 0


if __name__ == "__main__":
    console.run("resnet50", __doc__, main, define_flags)
