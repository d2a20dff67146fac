"""bstf-train: trains a network, makes it block sparse, trains it back, quantises it and exports it.

Examples, all flags being --name=value:

  5,000 real digits, a small ResNet, half of the 8x8 blocks zero:
    bstf-train --output=build/digits

  A published network, given as a .keras file, on photos in photos/train/CLASS/*.jpg and photos/test/CLASS/*.jpg:
    bstf-train --network=resnet50.keras --dataset=photos --image_size=224 --augment=resized_crop,flip \\
        --mean=0.485,0.456,0.406 --std=0.229,0.224,0.225 --epochs=0 --retrain_epochs=20 --output=build/photos

  CIFAR-10, sparse step by step while it is trained back with the dense network as its teacher:
    bstf-train --dataset=cifar10 --augment=pad_crop,flip --schedule=cubic --distill=0.9 --epochs=30 --output=build/cifar

  A quick look, with three classes and 100 training images of each:
    bstf-train --dataset=cifar10 --classes=cat,dog,3 --limit_per_class=100 --epochs=2 --output=build/look

  All GPUs of one machine:
    bstf-train --distribute=mirrored --output=build/digits

  Two machines that share the folder /shared; the same on the second one with --process_id=1. Then, since only
  TensorFlow quantises and exports, the second command, with the same --block:
    KERAS_BACKEND=jax bstf-train --distribute=jax --coordinator=10.0.0.1:1234 --processes=2 --process_id=0 \\
        --output=/shared/run
    bstf-train --network=/shared/run/sparse.keras --ratio=0 --epochs=0 --output=build/run

  For another program, in a pipe:
    bstf-train --output=build/digits --json | jq '.networks[] | .name, .accuracy'

A run that was interrupted or killed goes on after its last complete epoch when it is started again with the same flags.

Exit codes: 0 all went well, 1 something went wrong (a sentence on stderr says what), 2 the command line is wrong, 130
interrupted.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import keras
import tensorflow as tf
from absl import flags
from rich.console import Console
from rich.table import Table

from bstf import console, datasets, distribution, importance
from bstf.augmentation import AUGMENTATIONS
from bstf.blocks import BlockShape
from bstf.conversion import sparsify
from bstf.datasets import Dataset
from bstf.export import export
from bstf.files import is_leftover, make_folder
from bstf.progress import EpochLog
from bstf.quantization import quantize
from bstf.recovery import recover
from bstf.report import report
from bstf.selection import SCOPES, check_ratio
from bstf.training import GRADUAL, SMALL_RESNET, accuracy, gradual, loss_of, network, train

FLAGS = flags.FLAGS
ONE_SHOT = "one-shot"
# What may differ when an interrupted run goes on.
_PLACES = ("output", "distribute", "coordinator", "processes", "process_id", "tensorboard", "quiet", "json")
_SETTINGS, _LAST = "flags.json", "sparsity.csv"


def define_flags() -> None:
    """Defines the program's flags; not at import, so that other programs can use this module's functions."""
    flags.DEFINE_string("network", SMALL_RESNET, f"'{SMALL_RESNET}', a name of keras.applications, or a .keras file.")
    flags.DEFINE_string(
        "dataset",
        datasets.MNIST5K,
        f"'{datasets.MNIST5K}', 'fashion_mnist', a folder with a sub-folder of images a class (or with such folders "
        "train and test), a folder of IDX files, or a name of TensorFlow Datasets.",
    )
    flags.DEFINE_string("data_dir", None, "Where TensorFlow Datasets has its files; its own default otherwise.")
    flags.DEFINE_integer("image_size", None, "Height and width to resize the images to.", lower_bound=1)
    flags.DEFINE_list("classes", None, "Classes to take, by name or label, as --classes=cat,dog; all by default.")
    flags.DEFINE_integer("limit", None, "Training images to take at most, chosen at random.", lower_bound=1)
    flags.DEFINE_integer("limit_per_class", None, "Training images of each class to take at most.", lower_bound=1)
    flags.DEFINE_list(
        "augment",
        [],
        f"What is done to training images at random, of {', '.join(AUGMENTATIONS)}: --augment=pad_crop,flip for small "
        "images, --augment=resized_crop,flip for photos.",
    )
    flags.DEFINE_list("mean", None, "Subtracted from images in [0, 1]: one number, or one a channel.")
    flags.DEFINE_list("std", None, "What images are divided by then: one number, or one a channel.")
    flags.DEFINE_float("ratio", 0.5, "Fraction of blocks that become zero, in [0, 1).")
    flags.DEFINE_list("block", ["8"], "Block: one size, or input channels,output channels.")
    flags.DEFINE_string("importance", "l2", f"How blocks are compared: {', '.join(importance.CRITERIA)}.")
    flags.DEFINE_enum(
        "scope", "layer", SCOPES, "Which blocks compete: those of a layer, of all, of a column or row of Γ."
    )
    flags.DEFINE_enum(
        "schedule",
        ONE_SHOT,
        [ONE_SHOT, *GRADUAL],
        "When blocks become zero: all before the retraining, or during it, as --schedule=cubic over its first half "
        "or --schedule=steps, 5 % of the blocks every two epochs.",
    )
    flags.DEFINE_boolean(
        "recover",
        False,
        "Fit the kernels that are left to the dense network's outputs on the calibration images before the "
        "retraining, as with --recover --calibration=512 --retrain_epochs=0.",
    )
    flags.DEFINE_float(
        "distill",
        0.0,
        "Share of the dense network's answers in the loss of the retraining, in [0, 1], as --distill=0.9; 0 takes the "
        "labels alone.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    flags.DEFINE_integer("epochs", 5, "Epochs of dense training; 0 takes the network as it is.", lower_bound=0)
    flags.DEFINE_integer("retrain_epochs", None, "Epochs after sparsifying; as --epochs by default.", lower_bound=0)
    flags.DEFINE_float("learning_rate", 1e-3, "Of the first step of both trainings.", lower_bound=0.0)
    flags.DEFINE_integer("batch_size", 64, "Images in a batch, of all devices together.", lower_bound=1)
    flags.DEFINE_integer(
        "calibration", 64, "Training images for --importance, --recover and the quantisation.", lower_bound=1
    )
    flags.DEFINE_integer("seed", 0, "Of weights and of the images' order.", lower_bound=0)
    flags.DEFINE_enum(
        "distribute",
        distribution.NONE,
        distribution.KINDS,
        "Several devices: the GPUs of this machine (mirrored), or those of several processes, on one machine or many, "
        "in each of which this program runs (jax, with KERAS_BACKEND=jax in the environment).",
    )
    flags.DEFINE_string("coordinator", None, "host:port of process 0, for --distribute=jax.")
    flags.DEFINE_integer("processes", None, "How many processes train together, for --distribute=jax.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0 on.", lower_bound=0)
    flags.DEFINE_boolean("tensorboard", False, "Write logs for TensorBoard; needs pip install 'bstf[tensorboard]'.")
    flags.DEFINE_string(
        "output",
        None,
        "Folder for the results: new, empty, or of an interrupted run with the same flags, which then goes on. Several "
        "processes share it. Needed.",
        required=True,
    )
    flags.DEFINE_boolean("quiet", False, "Print nothing but errors.")
    flags.DEFINE_boolean("json", False, "Print one JSON object at the end, instead of tables and sentences.")


def main(_: Sequence[str]) -> int:
    """Runs the program; returns its exit code. What the input gets wrong is one sentence on stderr."""
    try:
        _road()
    except (ValueError, TypeError, OSError, ImportError, tf.errors.OpError) as error:
        print(f"bstf-train: {error}", file=sys.stderr)
        return console.ERROR
    except MemoryError:
        print(
            "bstf-train: there is not enough memory; give a smaller --batch_size or --image_size. What is in "
            f"'{FLAGS.output}' is complete.",
            file=sys.stderr,
        )
        return console.ERROR
    except KeyboardInterrupt:
        print(
            f"bstf-train: interrupted; what is in '{FLAGS.output}' is complete, and the same command goes on with it.",
            file=sys.stderr,
        )
        return console.INTERRUPTED
    return 0


def _road() -> None:
    """Trains dense, sparsifies and trains back, on all devices; then quantises and exports, on one."""
    output = Path(FLAGS.output)
    _check_output(output)
    block = _block(FLAGS.block)
    check_ratio(FLAGS.ratio)
    importance.get(FLAGS.importance)
    if FLAGS.tensorboard:
        _check_tensorboard()
    keras.utils.set_random_seed(FLAGS.seed)
    how = {name: FLAGS[name].value for name in ("coordinator", "processes", "process_id")}
    with distribution.distributed(FLAGS.distribute, **how):
        data = _data()
        _training(output, data, block)
        chief = distribution.is_chief()
    if chief:
        _results(output, data)


def _training(output: Path, data: Dataset, block: BlockShape) -> None:
    """Leaves dense.keras and sparse.keras; what an earlier run of the same flags left is taken over."""
    dense = network(FLAGS.network, data)
    images = data.images(FLAGS.calibration)
    retrain_epochs = FLAGS.epochs if FLAGS.retrain_epochs is None else FLAGS.retrain_epochs
    callbacks = _callbacks(data, retrain_epochs, dense)
    if _quantises():
        quantize(sparsify(dense, block, FLAGS.ratio), images[:1])  # what can't be is refused before hours of training
    found = _open(output)
    dense = _trained(dense, "dense", FLAGS.epochs, data, output, found)
    if "sparse.keras" in found:
        return
    one_shot = {"ratio": FLAGS.ratio, **_comparison(data, dense)} if not callbacks else {"ratio": 0.0}
    sparse = sparsify(dense, block, **one_shot)
    if FLAGS.recover:
        _say(f"Recovering the outputs of the sparse network: its test accuracy is {accuracy(sparse, data):.4f},")
        recover(sparse, images, dense)
        _say(f"and then {accuracy(sparse, data):.4f}.")
    teaching = {"teacher": dense, "soft_weight": FLAGS.distill} if FLAGS.distill else {}
    _trained(sparse, "sparse", retrain_epochs, data, output, found, callbacks=callbacks, **teaching)


def _results(output: Path, data: Dataset) -> None:
    """Exports, measures and tells; writes each file when it is complete."""
    rows = [(name, keras.models.load_model(output / f"{name}.keras", compile=False)) for name in ("dense", "sparse")]
    files = {name: [f"{name}.keras"] for name, _ in rows}
    sparse = rows[1][1]
    if _quantises():
        export(sparse, output / "float")
        _say("Quantising.")
        quantised = quantize(sparse, data.images(FLAGS.calibration))
        export(quantised, output / "int8")
        rows.append(("sparse INT8", quantised))
        files |= {"sparse": ["sparse.keras", "float"], "sparse INT8": ["int8"]}
    sparsity = report(sparse)
    found = [
        {
            "name": name,
            "accuracy": accuracy(model, data),
            "files": [str(output / file) for file in files[name]],
        }
        for name, model in rows
    ]
    if FLAGS.json:
        print(json.dumps({"output": str(output), "networks": found, "sparsity": sparsity.to_dict()}, indent=1))
    elif not FLAGS.quiet:
        print(sparsity)
        table = Table("network", "test accuracy", "written to")
        for one in found:
            table.add_row(one["name"], f"{one['accuracy']:.4f}", ", ".join(one["files"]))
        Console().print(table)
    if not _quantises():
        _say(
            f"Keras runs on {keras.backend.backend()}, and only TensorFlow quantises and exports. This does: "
            f"KERAS_BACKEND=tensorflow bstf-train --network={output / 'sparse.keras'} --ratio=0 --epochs=0 "
            f"--block={','.join(FLAGS.block)}, with "
            "the flags of the data and another --output."
        )
    sparsity.to_csv(output / _LAST)


def _say(sentence: str) -> None:
    """Prints once, however many processes there are; nothing where only results or errors are wanted."""
    if distribution.is_chief() and not FLAGS.quiet and not FLAGS.json:
        print(sentence, flush=True)


def _quantises() -> bool:
    return keras.backend.backend() == "tensorflow"


def _data() -> Dataset:
    distribution.check_batch(FLAGS.batch_size)
    return datasets.load(
        FLAGS.dataset,
        batch_size=FLAGS.batch_size,
        image_size=(FLAGS.image_size, FLAGS.image_size) if FLAGS.image_size else None,
        classes=FLAGS.classes,
        limit=FLAGS.limit,
        limit_per_class=FLAGS.limit_per_class,
        augment=FLAGS.augment,
        mean=_numbers("mean"),
        std=_numbers("std"),
        seed=FLAGS.seed,
        data_dir=FLAGS.data_dir,
        shard=distribution.shard(),
        drop_remainder=FLAGS.distribute != distribution.NONE,  # every device needs images of every batch
    )


def _comparison(data: Dataset, model: keras.Model) -> dict[str, Any]:
    """How blocks are compared, as arguments of `sparsify` and `BlockSparsity`."""
    found = {"importance": FLAGS.importance, "scope": FLAGS.scope}
    if importance.needs_data(FLAGS.importance):
        batches = -(-FLAGS.calibration // FLAGS.batch_size)
        images = data.train if data.calibration is None else data.calibration
        found |= {"data": images.take(batches), "loss": loss_of(model)}
    return found


def _callbacks(data: Dataset, epochs: int, model: keras.Model) -> list[keras.callbacks.Callback]:
    """What makes the network sparser during the retraining; nothing if it is sparse before."""
    if FLAGS.distill and not epochs:
        raise ValueError("--distill is about the retraining, which has no epochs: give --retrain_epochs.")
    if FLAGS.schedule == ONE_SHOT:
        return []
    if FLAGS.recover:
        raise ValueError(f"--recover needs all zero blocks before the retraining: --schedule={ONE_SHOT}.")
    return [gradual(FLAGS.schedule, FLAGS.ratio, epochs, data, **_comparison(data, model))]


def _trained(
    model: keras.Model,
    name: str,
    epochs: int,
    data: Dataset,
    output: Path,
    found: Sequence[str],
    callbacks: Sequence[keras.callbacks.Callback] = (),
    **kwargs: Any,
) -> keras.Model:
    """Trains a model and saves it, or loads it if it was found; more arguments are those of `train`."""
    path, checkpoint = output / f"{name}.keras", output / f".checkpoint-{name}"
    if path.name in found:
        return keras.models.load_model(path, compile=False)
    chief = distribution.is_chief()
    if epochs:
        _say(f"Training the {name} network on {distribution.replicas()} device(s).")
        boards = [keras.callbacks.TensorBoard(output / "logs" / name)] if FLAGS.tensorboard and chief else []
        how = {"learning_rate": FLAGS.learning_rate, "checkpoint": checkpoint, "verbose": 0}
        with EpochLog(name, lines=chief and not FLAGS.quiet and not FLAGS.json, bar=chief and not FLAGS.quiet) as log:
            train(model, data, epochs=epochs, callbacks=[*callbacks, *boards, log], **how, **kwargs)
    with distribution.whole_file(path) as partial:
        model.save(partial)
    distribution.check_equal(name, "The processes have trained different networks.")  # all have left the folder
    if chief:
        shutil.rmtree(checkpoint, ignore_errors=True)
    return model


# --- checks ---


def _settings() -> dict[str, Any]:
    return {one.name: one.value for one in FLAGS.get_flags_for_module(__name__) if one.name not in _PLACES}


def _check_output(output: Path) -> None:
    """Raises a ValueError unless the output folder is new, empty or of an interrupted run with the same flags."""
    if not output.exists() or (output.is_dir() and all(map(is_leftover, output.iterdir()))):
        return
    if not (output / _SETTINGS).is_file():
        raise ValueError(f"--output={output} exists and isn't an empty folder: name another one.")
    if (output / _LAST).exists():
        raise ValueError(f"--output={output} holds a finished run: name another folder.")
    before = json.loads((output / _SETTINGS).read_text(encoding="utf-8"))
    differing = [name for name, value in _settings().items() if before.get(name, value) != value]
    if differing:
        raise ValueError(
            f"--output={output} holds an interrupted run with {differing[0]}={before[differing[0]]!r}, and not "
            f"{FLAGS[differing[0]].value!r}: give the same flags to go on with it, or name another folder."
        )


def _open(output: Path) -> list[str]:
    """Makes the folder and notes the flags in it; returns the names of what was there, the same in all processes."""
    files = sorted(one.name for one in output.iterdir() if not is_leftover(one)) if output.exists() else []
    distribution.check_equal(
        (_settings(), files),
        f"The processes have other flags, or see other files in {output}: it must be a shared folder.",
    )
    make_folder(output)
    with distribution.whole_file(output / _SETTINGS) as partial:
        partial.write_text(json.dumps(_settings(), indent=1), encoding="utf-8")
    return files


def _check_tensorboard() -> None:
    try:
        import tensorboard  # noqa: F401 - optional: only the logs need it
    except ImportError as error:
        raise ImportError("--tensorboard needs its package: pip install 'bstf[tensorboard]'.") from error


def _numbers(name: str) -> list[float] | None:
    words = FLAGS[name].value
    try:
        return None if words is None else [float(word) for word in words]
    except ValueError as error:
        raise ValueError(f"--{name} must be numbers, like 0.5 or 0.485,0.456,0.406; got {','.join(words)}.") from error


def _block(words: Sequence[str]) -> BlockShape:
    try:
        sizes = [int(word) for word in words]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 2):
        raise ValueError(f"--block must be one number or two, like 8 or 8,4; got {','.join(words)}.")
    return BlockShape.of(sizes[0] if len(sizes) == 1 else sizes)


def run() -> NoReturn:
    """Entry point of the console program."""
    console.run("bstf-train", __doc__, main, define_flags)


if __name__ == "__main__":
    run()
