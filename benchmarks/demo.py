"""The whole road on real digits: train, make sparse, train back, quantise, export, compile, simulate, estimate.

    python -m benchmarks.demo --output=build/demo

Writes build/demo/index.html, a page to open in a browser, and all that it is about. Exit code 0 only if simulation and
integer reference agree on all images.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import track
from rich.table import Table

import bstf
import bstf_compiler
from benchmarks import demo_page
from bstf import datasets
from bstf.applications import small_resnet
from bstf.progress import EpochLog
from bstf.training import accuracy, train
from bstf_compiler import console
from bstf_compiler.aie.estimate import Estimate, LayerEstimate
from bstf_compiler.aie.report import Panel, gammas_of, write_report
from bstf_compiler.aie.timeline import timeline_png
from bstf_compiler.files import replacing

FLAGS = flags.FLAGS
DEVICE = "aie2_4x4"
_FILES = ("index.html", "results.json")  # of an earlier demo, which may be replaced


@dataclass(frozen=True)
class Recipe:
    """What the demo trains, and for how long.

    Attributes:
        widths: channels of each stage of the network.
        depth: residual blocks of each stage.
        epochs: of the dense training.
        retrain_epochs: of the training after the blocks became zero.
        learning_rate: of the first step of both trainings.
        ratio: fraction of 8x8 blocks that become zero.
        calibration: training images that the quantisation sees.
        images: test images to simulate, spread evenly over the test images.
        seed: of weights and of the order of the training images.
    """

    widths: tuple[int, ...] = (16, 32, 64)
    depth: int = 2
    epochs: int = 5
    retrain_epochs: int = 5
    learning_rate: float = 3e-3
    ratio: float = 0.5
    calibration: int = 128
    images: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Compiled:
    """A network at the end of the road."""

    quantised: keras.Model
    graph: bstf_compiler.Graph
    program: bstf_compiler.Program
    estimate: Estimate


@dataclass(frozen=True)
class Simulation:
    """A program's execution beside the integer reference.

    Attributes:
        classes: what the program finds in each image.
        compared: the layer outputs that are compared, and "returned": what the program returns.
        differing: by number of an image those of them that differ; images without a difference aren't in it.
    """

    classes: np.ndarray
    compared: list[str]
    differing: dict[int, list[str]]


def demonstrate(output: Path, recipe: Recipe, data: datasets.Dataset) -> bool:
    """Goes the whole road, prints a table and writes a page about it.

    Args:
        output: folder to write; it appears when everything in it is complete. An earlier demo is replaced.
        recipe: what to train.
        data: images to train and test with.

    Returns:
        Whether the simulation equals the integer reference on every image.

    Raises:
        ValueError: `output` holds something else, or there are fewer test images than the recipe simulates.
    """
    say = _clock()
    images, labels = _spread(data, recipe.images)
    with _whole_folder(output) as folder:
        dense, sparse = _trained(recipe, data, say)
        calibration = data.images(recipe.calibration)
        compiled = {}
        for name, model in (("dense", dense), ("sparse", sparse)):
            say(f"Quantising, exporting and compiling the {name} network.")
            compiled[name] = _compiled(model, calibration, folder / name)
        say(f"Simulating {recipe.images} test images on the sparse program.")
        simulation = _simulated(compiled["sparse"], images)
        say("Measuring accuracies and writing the page.")
        results = {
            "dataset": data.name,
            "device": DEVICE,
            "recipe": asdict(recipe),
            "networks": [
                *(_float_row(name, model, data) for name, model in (("dense", dense), ("sparse", sparse))),
                *(_int8_row(f"{name} INT8", one, data) for name, one in compiled.items()),
                _simulated_row(compiled["sparse"], simulation.classes == labels),
            ],
            "layers": _layers(compiled["dense"].estimate, compiled["sparse"].estimate),
            "simulation": {
                "images": len(images),
                "equal": len(images) - len(simulation.differing),
                "compared": simulation.compared,
                "differing": simulation.differing,
            },
        }
        _write(folder, results, compiled)
    Console().print(_table(results))
    print(f"Page: {Path(output) / 'index.html'}")
    equal, count = results["simulation"]["equal"], len(images)
    print(f"demo: simulation equals integer reference on {equal} of {count} images", flush=True)
    return equal == count


# --- the road ---


def _trained(
    recipe: Recipe, data: datasets.Dataset, say: Callable[[str], None]
) -> tuple[keras.Model, keras.Model]:  # fmt: skip
    """The dense network, and its block-sparse copy trained back."""
    keras.utils.set_random_seed(recipe.seed)
    say(f"Training the dense network, {recipe.epochs} epochs.")
    dense = small_resnet(data.input_shape, data.classes, recipe.widths, recipe.depth)
    with EpochLog("dense") as log:
        train(dense, data, epochs=recipe.epochs, learning_rate=recipe.learning_rate, verbose=0, callbacks=[log])
    say(f"Making {recipe.ratio:.0%} of the 8x8 blocks zero and training back, {recipe.retrain_epochs} epochs.")
    sparse = bstf.sparsify(dense, block=8, ratio=recipe.ratio)
    with EpochLog("sparse") as log:
        train(
            sparse, data, epochs=recipe.retrain_epochs, learning_rate=recipe.learning_rate, verbose=0, callbacks=[log]
        )
    print(bstf.report(sparse))
    return dense, sparse


def _compiled(model: keras.Model, calibration: np.ndarray, folder: Path) -> Compiled:
    """Quantises a network, exports it, reads the export back and compiles that; writes export and program."""
    quantised = bstf.quantize(model, calibration)
    bstf.export(quantised, folder / "model")
    graph = bstf_compiler.load(folder / "model")
    program = bstf_compiler.compile(graph, device=DEVICE)
    program.write(folder / "program", graph=graph)
    return Compiled(quantised, graph, program, program.estimate())


def _simulated(compiled: Compiled, images: np.ndarray) -> Simulation:
    """Executes the program and compares each layer output and what it returns with the integer reference."""
    program, graph = compiled.program, compiled.graph
    classes, compared, differing = [], [], {}
    terminal = Console(stderr=True)
    shown = {"console": terminal, "transient": True, "disable": not terminal.is_terminal}
    for number in track(range(len(images)), "simulating", **shown):
        image = images[number : number + 1]
        returned = program.simulate(image)
        classes.append(int(np.argmax(returned)))
        simulated = {**program.trace(image), "returned": returned}
        integer = bstf_compiler.integer
        reference = {**integer.trace(graph, image), "returned": integer.run(graph, image)}
        compared = list(simulated)
        if wrong := [name for name in compared if not np.array_equal(simulated[name], reference.get(name))]:
            differing[number] = wrong
    return Simulation(np.array(classes), compared, differing)


# --- the numbers ---


def _row(name: str, right: float, images: int, weight_bytes: int, macs: int, seconds: float | None) -> dict[str, Any]:
    return {
        "name": name,
        "accuracy": right,
        "images": images,
        "weight_bytes": weight_bytes,
        "macs": macs,
        "seconds": seconds,
    }


def _float_row(name: str, model: keras.Model, data: datasets.Dataset) -> dict[str, Any]:
    weights = bstf.densify(model).get_weights()  # without Γ, which isn't a weight
    kept = sum(int(np.count_nonzero(weight)) * weight.itemsize for weight in weights)
    return _row(name, accuracy(model, data), _count(data), kept, bstf.report(model).macs, None)


def _int8_row(name: str, compiled: Compiled, data: datasets.Dataset) -> dict[str, Any]:
    macs = bstf.report(compiled.quantised).macs
    right, seconds = accuracy(compiled.quantised, data), compiled.estimate.total_seconds
    return _row(name, right, _count(data), compiled.program.weight_bytes, macs, seconds)


def _simulated_row(compiled: Compiled, right: np.ndarray) -> dict[str, Any]:
    macs = sum(layer.macs for layer in compiled.estimate.layers)
    seconds = compiled.estimate.total_seconds
    return _row("simulated", float(right.mean()), len(right), compiled.program.weight_bytes, macs, seconds)


def _layers(dense: Estimate, sparse: Estimate) -> list[dict[str, Any]]:
    """Estimates of each layer in both programs, which have the same layers."""
    other = {layer.name: layer for layer in sparse.layers}
    return [
        {"name": layer.name, "op": layer.op, "dense": _times(layer), "sparse": _times(other[layer.name])}
        for layer in dense.layers
    ]


def _times(layer: LayerEstimate) -> dict[str, Any]:
    return {"seconds": layer.seconds, "bound": layer.bound, "macs": layer.macs, "bytes": layer.bytes}


def _count(data: datasets.Dataset) -> int:
    return sum(len(labels) for _, labels in data.test)


def _spread(data: datasets.Dataset, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` test images and their labels, at even distances, as the test images may stand in order of classes."""
    images, labels = (np.concatenate([part.numpy() for part in parts]) for parts in zip(*data.test))
    if not 1 <= count <= len(images):
        raise ValueError(f"'{data.name}' has {len(images)} test images; {count} of them can't be simulated.")
    chosen = np.arange(count) * len(images) // count
    return images[chosen], labels[chosen]


# --- what is written and printed ---


def _write(folder: Path, results: dict[str, Any], compiled: dict[str, Compiled]) -> None:
    panels = [Panel(name, one.program, one.estimate) for name, one in compiled.items()]
    timeline_png([panel.estimate for panel in panels], folder / "timeline.png", [panel.title for panel in panels])
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    layers = [layer["name"] for layer in results["layers"]]
    write_report(
        folder / "index.html",
        panels,
        gammas_of(compiled["sparse"].graph, layers),
        demo_page.sections(results),
        demo_page.files(compiled),
        f"A block-sparse ResNet for {results['dataset']}",
    )


def _table(results: dict[str, Any]) -> Table:
    table = Table(title=f"{results['dataset']} on {results['device']}", caption=demo_page.NOTE, caption_justify="left")
    for index, heading in enumerate(demo_page.HEADINGS):
        table.add_column(heading, justify="right" if index else "left")
    for row in results["networks"]:
        table.add_row(*demo_page.cells(row))
    return table


def _clock() -> Callable[[str], None]:
    """A function that prints what begins now after the seconds so far."""
    start = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - start:5.0f} s  {what}", flush=True)

    return say


@contextlib.contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A new folder that becomes `target` if all goes well, and is gone if not."""
    target = Path(target).absolute()
    free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not free and not all((target / name).is_file() for name in _FILES):
        raise ValueError(f"--output={target} exists and isn't an earlier demo: name another folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as made:
        made.mkdir()
        yield made


# --- the program ---


def define_flags(values: flags.FlagValues = FLAGS) -> None:
    """Defines the program's flags; not at import, so that tests can use this module's functions."""
    output, seed = "Folder for the page; an earlier demo there is replaced.", "Of weights and of the images' order."
    flags.DEFINE_string("output", "build/demo", output, flag_values=values)
    flags.DEFINE_integer("seed", 0, seed, lower_bound=0, flag_values=values)


def main(_: Sequence[str]) -> int:
    """Runs the program; returns its exit code: 0 only if simulation and integer reference agree on all images."""
    try:
        equal = demonstrate(Path(FLAGS.output), Recipe(seed=FLAGS.seed), datasets.load(seed=FLAGS.seed))
    except (ValueError, OSError, ImportError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; nothing was written.", file=sys.stderr)
        return 130
    return 0 if equal else 1


if __name__ == "__main__":
    console.run("demo", __doc__, main, define_flags)
