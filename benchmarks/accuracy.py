"""How much accuracy block sparsity costs, and what wins it back: the study behind Table I of the paper.

    python -m benchmarks.accuracy --network=resnet20 --weights=cifar_resnet20.npz --dataset=cifar10 --study=headline \
        --output=DIR

A trial makes the network sparse, trains it and tests it. All trials of a network begin with the same weights - those
given, trained on the data set for --start_epochs - and train for as many epochs by the same rule (SGD with Nesterov
momentum 0.9, the learning rate rising for a tenth of the steps and then falling to zero along a cosine). So does the
dense network that they are compared with. Every finished trial is a line of trials.jsonl and a file of weights, and a
second run goes on where the first one stopped.
"""

from __future__ import annotations

import concurrent.futures
import csv
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from absl import flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import bstf
from benchmarks import harness
from benchmarks.records import Records
from benchmarks.trials import STUDIES, Trial, file_name
from bstf import applications, console, datasets, recovery, training
from bstf.applications.published import MEAN, STD
from bstf.checkpoints import Checkpoint, save_weights
from bstf_compiler.files import replacing

FLAGS = flags.FLAGS
_CONSOLE = Console(width=130)
_LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Network(NamedTuple):
    """A dense network, and what its published weights expect: `prepare` takes RGB images in [0, 1]."""

    build: Callable[[str | None], keras.Model]
    prepare: Callable[[Any], Any]
    augment: tuple[str, ...]


def _cifar(depth: int) -> Network:
    return Network(
        lambda weights: applications.cifar_resnet(depth, weights=weights),
        lambda images: (images - np.float32(MEAN)) / np.float32(STD),
        ("flip", "pad_crop"),
    )


def _imagenet(name: str, module: Any) -> Network:
    return Network(
        lambda weights: getattr(module, name)(weights=weights or "imagenet", classifier_activation=None),
        lambda images: module.preprocess_input(images * 255),
        ("flip", "resized_crop"),
    )


NETWORKS = {f"resnet{depth}": _cifar(depth) for depth in (8, 20, 32, 44, 56, 110)} | {
    "ResNet50": _imagenet("ResNet50", keras.applications.resnet50),
    "VGG16": _imagenet("VGG16", keras.applications.vgg16),
    "InceptionV3": _imagenet("InceptionV3", keras.applications.inception_v3),
}


@dataclass(frozen=True)
class Setting:
    """What all trials have in common: the network, the data, how it is trained. Fields are those of the flags."""

    network: str
    weights: str | None
    dataset: str
    data_dir: str | None
    classes: tuple[int, ...]
    limit: int | None
    batch_size: int
    learning_rate: float
    start_epochs: int
    calibration: int
    precision: str

    def dense(self) -> keras.Model:
        """The dense network, images to logits of the classes."""
        model = NETWORKS[self.network].build(self.weights)
        if self.classes:
            model = keras.Model(model.input, keras.ops.take(model.output, self.classes, axis=-1), name=model.name)
        return model

    def data(self, model: keras.Model, seed: int = 0) -> datasets.Dataset:
        """Images as the network expects them; those to train with are augmented."""
        network = NETWORKS[self.network]
        data = datasets.load(
            self.dataset,
            data_dir=self.data_dir,
            image_size=model.input_shape[1:3],
            classes=self.classes or None,
            limit=self.limit,
            augment=network.augment,
            batch_size=self.batch_size,
            seed=seed,
        )
        if data.classes != model.output_shape[-1]:
            raise ValueError(
                f"{self.network} knows {model.output_shape[-1]} classes and '{self.dataset}' has {data.classes}: "
                "choose another data set, or some of the classes with --classes."
            )
        parts = {
            name: getattr(data, name).map(_on_images(network.prepare)) for name in ("train", "test", "calibration")
        }
        return replace(data, **parts, epochs=lambda first: data.epochs(first).map(_on_images(network.prepare)))


def _on_images(prepare: Callable[[Any], Any]) -> Callable[[Any, Any], tuple[Any, Any]]:
    return lambda images, labels: (prepare(images), labels)


def run(setting: Setting, trial: Trial, folder: Path, start: Path | None, tensorboard: bool) -> dict[str, Any]:
    """Makes the network sparse, trains and tests it.

    Args:
        setting: what all trials share.
        trial: what to do.
        folder: of the study: an interrupted trial goes on from what it left there.
        start: a file with the weights to begin with; None for the published ones.
        tensorboard: whether to write logs for TensorBoard.

    Returns:
        The trial's record: its fields, `before` and `accuracy` (before and after the training, fractions of the test
        images), `zero_blocks` and `macs` (fractions of the dense network's), `device`, `seconds`.
    """
    began = time.perf_counter()
    record, model = _trained(setting, trial, folder, start, tensorboard)
    (folder / "weights").mkdir(exist_ok=True)
    save_weights(model, weights_file(folder, trial.name, trial.seed))
    return record | {"device": _device(), "seconds": round(time.perf_counter() - began)}


def weights_file(folder: Path, trial: str, seed: int) -> Path:
    """The weights that the trial of this name leaves in the folder of its study."""
    return folder / "weights" / f"{file_name(trial, seed)}.weights.h5"


def begin(setting: Setting, folder: Path) -> Path:
    """Trains the published network on the data set for all trials to begin with; returns the file of its weights."""
    file = folder / "start.weights.h5"
    if not file.exists():
        record, model = _trained(setting, Trial(ratio=0, epochs=setting.start_epochs), folder, None, False)
        _CONSOLE.print(f"start: {record['before']:.2%} as published, {record['accuracy']:.2%} trained on the data set")
        save_weights(model, file)
    return file


def _trained(
    setting: Setting, trial: Trial, folder: Path, start: Path | None, tensorboard: bool
) -> tuple[dict[str, Any], keras.Model]:
    keras.utils.set_random_seed(trial.seed)
    dense = setting.dense()
    if start is not None:
        dense.load_weights(start)
    data = setting.data(dense, trial.seed)
    model = _sparse(setting, trial, dense, data) if trial.ratio else dense
    record = {"trial": trial.name, **asdict(trial), "before": training.accuracy(model, data)}
    if not trial.epochs:
        return record | {"accuracy": record["before"]}, model
    name = file_name(trial.name, trial.seed)
    callbacks: list[keras.callbacks.Callback] = []
    epoch_steps = training.steps_per_epoch(data)
    steps = trial.epochs * epoch_steps
    if trial.ratio and trial.schedule != "one-shot":
        how = {"importance": trial.importance, "scope": trial.scope}
        callbacks.append(training.gradual(trial.schedule, trial.ratio, trial.epochs, data, **how))
    if tensorboard:
        callbacks.append(keras.callbacks.TensorBoard(folder / "tensorboard" / name))
    teacher = dense
    if trial.teacher == "trained":
        teacher = setting.dense()
        teacher.load_weights(weights_file(folder, trial.dense.name, trial.seed))
    _set_precision([model, teacher], setting.precision)
    learner = model if trial.teacher == "none" else bstf.Distiller(model, teacher)
    warm = max(1, steps // 10)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - warm), warmup_target=setting.learning_rate, warmup_steps=warm
    )
    learner.compile(keras.optimizers.SGD(rate, momentum=0.9, nesterov=True), _LOSS)
    saver = Checkpoint(folder / "interrupted" / name)
    first = saver.restore(learner)
    learner.fit(
        data.epochs(first),
        steps_per_epoch=epoch_steps,
        initial_epoch=first,
        epochs=trial.epochs,
        callbacks=[*callbacks, saver],
        verbose=0,
        shuffle=False,
    )
    shutil.rmtree(saver.folder, ignore_errors=True)
    _set_precision([model], "float32")
    return record | {"accuracy": training.accuracy(model, data)} | _left(model, trial), model


def _device() -> str:
    """What Keras computes with, such as "jax, NVIDIA H200"."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax  # only where Keras runs on it

        return f"{backend}, {jax.devices()[0].device_kind}"
    return f"{backend}, {keras.distribution.list_devices()[0]}"


def _sparse(setting: Setting, trial: Trial, dense: keras.Model, data: datasets.Dataset) -> keras.Model:
    """The network before its training: zero blocks, and what recovery makes of those that are left."""
    if trial.schedule != "one-shot":
        return bstf.sparsify(dense, block=trial.block, ratio=0)
    if trial.permute:
        dense = bstf.permute(dense, trial.block, trial.ratio)
    sparse = bstf.sparsify(
        dense,
        block=trial.block,
        ratio=trial.ratio,
        importance=trial.importance,
        scope=trial.scope,
        data=data.calibration.take(-(-setting.calibration // setting.batch_size)),
        loss=_LOSS,
    )
    images = data.images(setting.calibration)
    if "obs" in trial.recovery:
        recovery.obs_update(sparse, images, dense)
    if "batch_norm" in trial.recovery:
        size = setting.batch_size
        recovery.reestimate_batch_norm(sparse, [images[i : i + size] for i in range(0, len(images), size)])
    return sparse


def _set_precision(models: Sequence[keras.Model], policy: str) -> None:
    """What layers compute in; all but the last, whose logits the loss needs in float32."""
    for model in models:
        for layer in model.layers[:-1]:
            layer.dtype_policy = policy


def _left(model: keras.Model, trial: Trial) -> dict[str, float]:
    """What the blocks that are left are of the dense network: the zero ones as a fraction, and the multiply-adds."""
    if not trial.ratio:
        return {"zero_blocks": 0.0, "macs": 1.0}
    counted = bstf.report(model, trial.block)
    return {"zero_blocks": round(counted.ratio, 4), "macs": round(counted.macs / counted.dense_macs, 4)}


class Study:
    """The trials of a study: those that a file has already are not run again."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting, self.folder = setting, folder
        self._file = Records(folder / "trials.jsonl")
        if not self._file:
            self._file.add({"setting": asdict(setting), "machine": harness.machine()})
        first, *self.records = self._file
        if first["setting"] != json.loads(json.dumps(asdict(setting))):
            raise ValueError(
                f"'{self._file.path}' is a study of another setting, {first['setting']}: give another --output."
            )

    def run(self, trials: Sequence[Trial], workers: int, tensorboard: bool) -> None:
        """Runs the trials, `workers` at a time in processes that share the cores; a line for each one that ends."""
        done = {(record["trial"], record["seed"]) for record in self.records}
        left = [trial for trial in trials if (trial.name, trial.seed) not in done]
        _CONSOLE.print(f"{len(trials) - len(left)} trials are in '{self._file.path}', {len(left)} to run")
        if not left:
            return
        if workers > 1:
            threads = str(max(1, (os.cpu_count() or 1) // workers))
            names = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS")
            os.environ.update(dict.fromkeys(names, threads))
            # Otherwise each takes the whole GPU.
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
            os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool:
            start = pool.submit(begin, self.setting, self.folder).result() if self.setting.start_epochs else None
            failed = []
            for last in (False, True):  # whom a trained network teaches comes after it
                part = [trial for trial in left if (trial.teacher == "trained") == last]
                failed += self._finish(
                    [pool.submit(run, self.setting, trial, self.folder, start, tensorboard) for trial in part]
                )
        if failed:
            raise failed[0]

    def _finish(self, tasks: Sequence[concurrent.futures.Future]) -> list[BaseException]:
        """Waits for trials and keeps the record of each; returns what others failed with."""
        failed = []
        for task in concurrent.futures.as_completed(tasks):
            if error := task.exception():
                failed.append(error)
                continue
            record = task.result()
            self.records.append(record)
            self._file.add(record)
            _CONSOLE.print(
                f"{record['trial']}, seed {record['seed']}: {record['before']:.2%} -> {record['accuracy']:.2%} "
                f"({record['seconds']} s)",
                highlight=False,
            )
        return failed

    def summary(self) -> list[dict[str, Any]]:
        """A row for each kind of trial: accuracies of all seeds, their mean, points lost against the dense network."""
        rows = []
        for name in dict.fromkeys(record["trial"] for record in self.records):
            found = [record for record in self.records if record["trial"] == name]
            of_dense = Trial(epochs=found[0]["epochs"]).dense.name
            dense = [record["accuracy"] for record in self.records if record["trial"] == of_dense]
            mean = statistics.fmean(record["accuracy"] for record in found)
            rows.append(
                {
                    "trial": name,
                    "seeds": len(found),
                    "before": statistics.fmean(record["before"] for record in found),
                    "accuracy": mean,
                    "lost": 100 * (statistics.fmean(dense) - mean) if dense else None,
                    "all": [record["accuracy"] for record in found],
                }
            )
        return rows

    def report(self) -> None:
        """Prints the table; writes it and a plot beside the trials."""
        rows = self.summary()
        table = Table(title=f"{self.setting.network} on {self.setting.dataset}")
        for column in ("trial", "seeds", "before training", "after", "points lost"):
            table.add_column(column, justify="left" if column == "trial" else "right")
        for row in rows:
            lost = "" if row["lost"] is None else f"{row['lost']:.2f}"
            table.add_row(row["trial"], str(row["seeds"]), f"{row['before']:.2%}", f"{row['accuracy']:.2%}", lost)
        _CONSOLE.print(table)
        table = self.folder / "summary.csv"
        with replacing(table) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        self._plot(rows)

    def _plot(self, rows: Sequence[dict[str, Any]]) -> None:
        figure = Figure(figsize=(9, 1.2 + 0.3 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for place, row in enumerate(reversed(rows)):
            axes.plot([row["before"] * 100], [place], "|", color="0.6", markersize=9)
            axes.plot([100 * one for one in row["all"]], [place] * row["seeds"], "o", color="C0", markersize=5)
        axes.set_yticks(range(len(rows)), [row["trial"] for row in reversed(rows)])
        axes.set_xlabel(
            f"top-1 accuracy of {self.setting.network} on {self.setting.dataset}, % (grey: before training)"
        )
        axes.grid(axis="x", alpha=0.3)
        with replacing(self.folder / "accuracy.png") as temporary:
            figure.savefig(temporary, dpi=120)


def main(argv: Sequence[str]) -> None:
    """Runs the studies asked for and prints what is known so far."""
    values = {one.name: getattr(FLAGS, one.name) for one in fields(Setting)}
    chosen = [trial for name in FLAGS.study for trial in STUDIES[name](FLAGS.epochs)]
    trials = [replace(trial, seed=seed) for seed in range(FLAGS.seeds) for trial in dict.fromkeys(chosen)]
    try:
        setting = Setting(**values | {"classes": tuple(map(int, FLAGS.classes))})
        study = Study(setting, Path(FLAGS.output))
        study.run(trials, FLAGS.workers, FLAGS.tensorboard)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    study.report()


def define_flags() -> None:
    """Defines the flags of the program."""
    flags.DEFINE_enum("network", "resnet20", NETWORKS, "Network.")
    flags.DEFINE_string("weights", None, "File with its weights; none for those of Keras, of an ImageNet network.")
    flags.DEFINE_string("dataset", "cifar10", "Data set, as `bstf.datasets.load` knows it.")
    flags.DEFINE_string("data_dir", None, "Where TensorFlow Datasets keeps it.")
    flags.DEFINE_list("classes", [], "Labels of the classes to take, 0,217,... for a part of ImageNet; none for all.")
    flags.DEFINE_integer("limit", None, "Training images to take; none for all.", lower_bound=1)
    flags.DEFINE_multi_enum("study", ["headline"], STUDIES, "Which trials; may be given again.")
    flags.DEFINE_integer("epochs", 4, "Epochs of each trial.", lower_bound=0)
    flags.DEFINE_integer("start_epochs", 3, "Epochs that the dense network trains before all trials.", lower_bound=0)
    flags.DEFINE_integer("seeds", 1, "How often each trial is made.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 128, "Images in a batch.", lower_bound=1)
    flags.DEFINE_float("learning_rate", 0.05, "The largest of the training.", lower_bound=0)
    flags.DEFINE_integer("calibration", 1000, "Images for the recovery and for criteria that need data.", lower_bound=1)
    flags.DEFINE_string("precision", "float32", "Keras dtype policy of the training; tests are in float32.")
    flags.DEFINE_integer("workers", 1, "Trials at a time, in processes that share the cores.", lower_bound=1)
    flags.DEFINE_bool("tensorboard", False, "Write logs for TensorBoard, which must be installed.")
    flags.DEFINE_string("output", None, "Folder for the results.", required=True)


if __name__ == "__main__":
    console.run("accuracy", __doc__, main, define_flags)
