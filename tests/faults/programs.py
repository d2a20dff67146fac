"""The programs that are killed: how each is run on a small case, and how what it leaves is read.

Nothing here computes with TensorFlow in the process that forks: a fork doesn't take its threads along.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import tensorflow as tf
from absl import flags
from tensorflow.core.protobuf import saved_model_pb2

import bstf
import bstf.train
import bstf_compiler
from benchmarks import accuracy, aie_sweep
from bstf_compiler import main as compiler
from bstf_compiler.files import is_leftover

# Of kills.py and limits.py; the programs have some of the same names.
OWN_FLAGS = ("program", "kills", "runs", "seed", "seconds", "output")
NAMES = ("export", "compile", "train", "sweep", "study")


@dataclass(frozen=True)
class Program:
    """A program.

    `run(place, version)` writes one of two outputs to a folder and returns the exit code. `read(place)` gives what
    tells whole outputs apart, None if there is none yet, and fails if there is half of one; `check(place)` fails if a
    file beside it is half written. `begins_anew`: it refuses to replace a whole output, so the folder is emptied.
    `write_seconds`: about how long it writes at a time.
    """

    name: str
    run: Callable[[Path, int], int]
    read: Callable[[Path], Any]
    check: Callable[[Path], None]
    begins_anew: bool
    write_seconds: float


def made(name: str, work: Path) -> Program:
    """A program by name; `work` is a folder for what it needs."""
    return _MAKERS[name](work)


# --- what is read ---


def files(place: Path) -> dict[str, bytes]:
    """The files of a folder by name, those that a killed writer left aside."""
    found = {}
    for folder, folders, names in os.walk(place):
        folders[:] = [name for name in folders if not is_leftover(Path(name))]
        for path in (Path(folder) / name for name in names):
            found[path.relative_to(place).as_posix()] = path.read_bytes()
    return found


def saved_model(folder: Path) -> str | None:
    """What tells a SavedModel from another: its blocks and all its weights; TensorFlow checks their sums."""
    if not folder.exists():
        return None
    model = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    assert "serving_default" in model.meta_graphs[0].signature_def
    reader = tf.train.load_checkpoint(str(folder / "variables" / "variables"))
    sums = hashlib.sha256(json.dumps(json.loads((folder / "assets.extra" / "bstf.json").read_text())).encode())
    for name in sorted(reader.get_variable_to_shape_map()):
        value = np.array(reader.get_tensor(name))
        if name.startswith("variables/"):  # the others are the same once more, in any order
            sums.update(name.encode() + value.tobytes())
    return sums.hexdigest()


def weights(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a .keras or .weights.h5 file by name."""
    found = {}

    def add(name: str, entry: Any) -> None:
        if isinstance(entry, h5py.Dataset) and entry.dtype.kind == "f":
            found[name] = np.array(entry)

    if file.suffix == ".keras":
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None
            json.loads(archive.read("config.json"))
            with archive.open("model.weights.h5") as stream, h5py.File(stream) as content:
                content.visititems(add)
    else:
        with h5py.File(file) as content:
            content.visititems(add)
    return found


def _sum(arrays: dict[str, np.ndarray]) -> str:
    """What tells networks from another: a checksum of their weights."""
    sums = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        sums.update(name.encode() + value.tobytes())
    return sums.hexdigest()


def whole(place: Path) -> None:
    """Fails if a file of a training or study is half written."""
    for name, content in files(place).items():
        if name.endswith((".keras", ".h5")):
            weights(place / name)
        elif name.endswith(".json"):
            json.loads(content)
        elif name.endswith(".jsonl"):
            for line in content.split(b"\n")[:-1]:
                json.loads(line)
        elif name.endswith(".csv"):
            assert content.endswith(b"\n") and content.count(b"\n") > 1
        elif name.endswith(".png"):
            assert content.endswith(b"IEND\xaeB`\x82")
    for folder in (place / "int8", place / "float"):
        saved_model(folder)


# --- the programs ---


def _network(side: int = 8, classes: int = 3) -> keras.Model:
    keras.utils.set_random_seed(0)
    image = keras.Input((side, side, 3))
    x = keras.layers.Conv2D(16, 3, strides=2, activation="relu")(image)
    x = keras.layers.Conv2D(32, 1, activation="relu")(x)
    return keras.Model(image, keras.layers.Dense(classes)(keras.layers.GlobalAveragePooling2D()(x)))


def _in_order() -> None:
    """Computes in one thread and in one order: equal runs have equal results, bit for bit."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.experimental.enable_op_determinism()


def _export(work: Path) -> Program:
    def run(place: Path, version: int) -> int:
        bstf.export(bstf.sparsify(_network(), ratio=(0.25, 0.5)[version]), place / "model")
        return 0

    return Program("export", run, lambda place: saved_model(place / "model"), lambda place: None, False, 1.5)


def _with_flags(module: Any, program: str, **values: Any) -> int:
    """Runs a program's main with these flags, in a process that needs no others."""
    for flag in set(OWN_FLAGS) & set(flags.FLAGS):
        delattr(flags.FLAGS, flag)
    module.define_flags()
    flags.FLAGS([program, *(f"--{name}={value}" for name, value in values.items())])
    return module.main([program]) or 0


def _compile(work: Path) -> Program:
    def run(place: Path, version: int) -> int:
        if not (work / "model").exists():
            model = bstf.quantize(_network(), np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32))
            bstf.export(model, work / "model")
        device = ("aie2_1x1", "aie2_2x2")[version]
        return _with_flags(compiler, "bstf-compile", model=work / "model", device=device, output=place / "program")

    def read(place: Path) -> str | None:
        if not (place / "program").exists():
            return None
        bstf_compiler.Program.load(place / "program")
        found = files(place / "program")
        return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()

    return Program("compile", run, read, lambda place: None, False, 2.5)


def _images(folder: Path, classes: int, count: int, side: int) -> Path:
    """Photos of one colour a class, with noise."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        colour = rng.integers(0, 255, 3)
        (folder / f"{label}").mkdir(parents=True)
        for index in range(count):
            image = np.clip(colour + rng.normal(0, 60, (side, side, 3)), 0, 255)
            keras.utils.save_img(folder / f"{label}" / f"{index}.png", image, scale=False)
    return folder


def _train(work: Path) -> Program:
    images = _images(work / "images", 2, 16, 12)

    def run(place: Path, version: int) -> int:
        _in_order()
        how = {
            "dataset": images,
            "epochs": 0,
            "retrain_epochs": 2,
            "batch_size": 16,
            "image_size": 12,
            "calibration": 8,
            "network": work / "small.keras",
        }
        if not (work / "small.keras").exists():
            _network(12, 2).save(work / "small.keras")
        return _with_flags(bstf.train, "bstf-train", output=place, **how)

    def read(place: Path) -> tuple[str | None, ...] | None:
        if not (place / "sparsity.csv").exists():
            return None
        sums = [_sum(weights(place / f"{name}.keras")) for name in ("dense", "sparse")]
        return *sums, saved_model(place / "int8"), saved_model(place / "float")

    return Program("train", run, read, whole, True, 0.3)


def _sweep(work: Path) -> Program:
    def run(place: Path, version: int) -> int:
        how = {"networks": "small_resnet", "devices": "aie2_1x1,aie2_2x1,aie2_2x2", "ratios": "0,0.5"}
        return _with_flags(aie_sweep, "aie_sweep", side_divisor=2, jobs=1, output=place, **how)

    return Program("sweep", run, lambda place: _text(place / "sweep.csv"), whole, True, 0.2)


class _Here(futures.Executor):
    """Runs tasks at once in this process, so that a kill ends all there is."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, task: Callable, /, *args: Any, **kwargs: Any) -> futures.Future:
        result: futures.Future = futures.Future()
        try:
            result.set_result(task(*args, **kwargs))
        except Exception as error:
            result.set_exception(error)
        return result


def _study(work: Path) -> Program:
    images = _images(work / "images", 2, 24, 8)

    def run(place: Path, version: int) -> int:
        _in_order()
        accuracy.concurrent.futures.ProcessPoolExecutor = _Here
        accuracy.STUDIES["short"] = lambda epochs: [accuracy.Trial(ratio=0), accuracy.Trial(epochs=2)]
        accuracy.NETWORKS["small"] = accuracy.Network(lambda weights: _network(8, 2), lambda images: images, ("flip",))
        how = {"network": "small", "dataset": images, "study": "short", "start_epochs": 2, "batch_size": 8}
        return _with_flags(accuracy, "accuracy", output=place, calibration=16, **how)

    def read(place: Path) -> tuple[str, ...] | None:
        table = _text(place / "summary.csv")
        # Trials come in the order in which they ended.
        return table and (
            *sorted(table.splitlines()),
            *(_sum(weights(file)) for file in sorted((place / "weights").iterdir())),
        )

    return Program("study", run, read, whole, True, 0.3)


def _text(file: Path) -> str | None:
    return file.read_text() if file.exists() else None


_MAKERS = {"export": _export, "compile": _compile, "train": _train, "sweep": _sweep, "study": _study}
