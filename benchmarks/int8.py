"""What INT8 costs in accuracy: the networks of an accuracy study, in float32 and quantised, on all test images.

    python -m benchmarks.int8 --study=DIR --data_dir=DIR --output=DIR

Reads the weights that `benchmarks.accuracy` left: those all trials began with, and each trial's own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
from absl import flags
from rich.console import Console

import bstf
from benchmarks import harness
from benchmarks.accuracy import Setting, weights_file
from bstf import console, training

FLAGS = flags.FLAGS


def networks(folder: Path, setting: Setting) -> Iterator[tuple[str, keras.Model]]:
    """The trained networks of a study, by name."""
    if (start := folder / "start.weights.h5").exists():
        dense = setting.dense()
        dense.load_weights(start)
        yield "dense, start", dense
    for line in (folder / "trials.jsonl").read_text(encoding="utf-8").splitlines()[1:]:
        record = json.loads(line)
        weights = weights_file(folder, record["trial"], record["seed"])
        if weights.exists():
            model = setting.dense()
            model = bstf.sparsify(model, block=tuple(record["block"]), ratio=0) if record["ratio"] else model
            model.load_weights(weights)
            yield f"{record['trial']}, seed {record['seed']}", model


def measure(name: str, model: keras.Model, setting: Setting) -> dict[str, Any]:
    """Accuracy of a network as it is and quantised with images of the training set; fractions of the test images."""
    data = setting.data(model)
    quantised = bstf.quantize(model, data.images(FLAGS.images))
    found = {"network": setting.network, "weights": name, "float32": training.accuracy(model, data)}
    found["int8"] = training.accuracy(quantised, data)
    return found | {"points_lost": round(100 * (found["float32"] - found["int8"]), 2)}


def main(argv: Sequence[str]) -> None:
    """Measures the studies' networks and prints a table."""
    log = harness.Log(Path(FLAGS.output), "int8")
    log.header({"machine": harness.machine()})
    try:
        for folder in map(Path, FLAGS.study):
            saved = json.loads((folder / "trials.jsonl").open(encoding="utf-8").readline() or "{}").get("setting")
            if saved is None:
                raise ValueError(f"'{folder}' holds no study of benchmarks.accuracy")
            setting = Setting(**saved | {"classes": tuple(saved["classes"])})
            own = {"data_dir": FLAGS.data_dir or setting.data_dir, "weights": None}
            for name, model in networks(folder, replace(setting, **own)):
                log.add(measure(name, model, replace(setting, **own)))
                log.write_csv()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if not log.records:
        sys.exit("error: these studies have left no weights")
    columns = {name: lambda one, name=name: str(one[name]) for name in log.records[0]}
    Console(width=140).print(harness.table("INT8 against float32", log.records, columns))


def define_flags() -> None:
    """Defines the flags of the program."""
    flags.DEFINE_multi_string("study", None, "Folder of an accuracy study; may be given again.", required=True)
    flags.DEFINE_string("data_dir", None, "Where TensorFlow Datasets keeps the data set; none for the study's own.")
    flags.DEFINE_integer("images", 256, "Training images to quantise with.", lower_bound=1)
    flags.DEFINE_string("output", None, "Folder for the results.", required=True)


if __name__ == "__main__":
    console.run("int8", __doc__, main, define_flags)
