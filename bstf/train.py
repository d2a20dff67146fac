"""bstf-train: trains a network, makes it block sparse, trains it back, quantises it and exports it."""

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from rich.console import Console
from rich.table import Table

from bstf import datasets, importance
from bstf.applications import small_resnet
from bstf.blocks import BlockShape
from bstf.callbacks import BlockSparsity
from bstf.conversion import sparsify
from bstf.datasets import Dataset
from bstf.distillation import Distiller, ends_in_softmax
from bstf.export import export
from bstf.quantization import quantize
from bstf.recovery import recover
from bstf.report import report
from bstf.schedules import Cubic, Steps
from bstf.selection import SCOPES, check_ratio

FLAGS = flags.FLAGS
SMALL_RESNET = "small_resnet"
ONE_SHOT = "one-shot"
GRADUAL = ("cubic", "steps")


def train(
    model: keras.Model,
    dataset: Dataset,
    *,
    epochs: int,
    learning_rate: float = 1e-3,
    teacher: keras.Model | None = None,
    soft_weight: float = 0.9,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    verbose: int | str = "auto",
) -> keras.callbacks.History:
    """Trains a classifier with Adam, its learning rate falling to zero along a cosine.

    The model is compiled anew, so its optimizer has nothing in its slots: what is zero in a masked model
    stays zero, slots included.

    Args:
        model: images to classes, probabilities or (without a softmax at the end) logits.
        dataset: what to train with; its test images are for the validation after each epoch.
        epochs: passes over the training images, at least 1.
        learning_rate: of the first step.
        teacher: a classifier whose answers `model` learns too, with `bstf.Distiller`.
        soft_weight: the teacher's share of the loss, in [0, 1].
        callbacks: more of Keras' callbacks, such as `bstf.callbacks.BlockSparsity`.
        verbose: of `keras.Model.fit`; the default is Keras' progress bar.

    Returns:
        Keras' history, with "loss", "accuracy", "val_loss" and "val_accuracy" of each epoch.

    Raises:
        ValueError: `epochs` is less than 1, or the model doesn't fit the data set.

    Example:
        >>> train(model, datasets.load("mnist5k"), epochs=5)
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1; got {epochs}.")
    check_fit(model, dataset)
    steps = _steps(dataset, epochs)
    trained = model if teacher is None else Distiller(model, teacher, soft_weight=soft_weight)
    trained.compile(
        optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, steps)),
        loss=_loss(model),
        metrics=["accuracy"],
    )
    # The data set shuffles itself; Keras warns when it is asked to.
    return trained.fit(
        dataset.train,
        validation_data=dataset.test,
        epochs=epochs,
        callbacks=list(callbacks),
        verbose=verbose,
        shuffle=False,
    )


def gradual(name: str, ratio: float, epochs: int, dataset: Dataset, **kwargs: Any) -> BlockSparsity:
    """The callback that makes a model sparser while it is retrained.

    Args:
        name: "cubic": to the ratio over the first half of the training steps, in up to 50 changes; "steps": 5 %
            of the blocks every two epochs, as in the paper's section III-C.
        ratio: the fraction of zero blocks at the end.
        epochs: of the retraining.
        dataset: what it is retrained with.
        **kwargs: of `bstf.callbacks.BlockSparsity`, such as `importance`.

    Returns:
        The callback.

    Raises:
        ValueError: there is no such schedule, or the retraining is too short for it.

    Example:
        >>> train(sparse, data, epochs=10, callbacks=[gradual("cubic", 0.5, 10, data)])
    """
    if name not in GRADUAL:
        raise ValueError(f"There is no schedule '{name}': give one of {', '.join(GRADUAL)}.")
    if epochs < 1:
        raise ValueError(f"The schedule '{name}' takes blocks during the retraining, which has no epochs.")
    if name == "cubic":
        end = max(1, _steps(dataset, epochs) // 2)
        return BlockSparsity(Cubic(ratio, end=end, every=max(1, end // 50)), unit="step", **kwargs)
    schedule = Steps(ratio)
    needed = schedule.every * (math.ceil(ratio / schedule.fraction - 1e-9) - 1) + 1
    if epochs < needed:
        raise ValueError(
            f"The schedule 'steps' reaches the ratio {ratio} in {needed} epochs, and the retraining has {epochs}: "
            "give it more epochs, or take 'cubic'."
        )
    return BlockSparsity(schedule, **kwargs)


def _steps(dataset: Dataset, epochs: int) -> int:
    return epochs * max(1, int(dataset.train.cardinality()))


def accuracy(model: keras.Model, dataset: Dataset) -> float:
    """The fraction of the test images whose class a model finds; it need not be compiled.

    Args:
        model: images to one number a class.
        dataset: gives the test images.

    Returns:
        0 to 1.

    Example:
        >>> accuracy(bstf.quantize(model, dataset.images(64)), dataset)
    """
    right = [np.argmax(model.predict_on_batch(x), axis=-1) == np.asarray(y) for x, y in dataset.test]
    return float(np.concatenate(right).mean())


def network(name: str, dataset: Dataset) -> keras.Model:
    """Builds or loads a network for a data set.

    Args:
        name: "small_resnet", a name of `keras.applications` such as "ResNet50" (built with random weights),
            or the path of a `.keras` file.
        dataset: gives the image shape and the number of classes.

    Returns:
        The network.

    Raises:
        ValueError: there is no such network, or it doesn't fit the data set.
        FileNotFoundError: there is no such file.

    Example:
        >>> network("ResNet50", datasets.load("cifar10"))
    """
    if name.endswith(".keras"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"There is no file '{name}' to load the network from.")
        model = keras.models.load_model(name, compile=False)
    elif name == SMALL_RESNET:
        model = small_resnet(dataset.input_shape, dataset.classes)
    elif name[:1].isupper() and callable(getattr(keras.applications, name, None)):
        build = getattr(keras.applications, name)
        model = build(weights=None, input_shape=dataset.input_shape, classes=dataset.classes)
    else:
        raise ValueError(
            f"There is no network '{name}': give '{SMALL_RESNET}', a name of keras.applications such as "
            "'ResNet50', or a .keras file."
        )
    check_fit(model, dataset)
    return model


def check_fit(model: keras.Model, dataset: Dataset) -> None:
    """Raises a ValueError if a model takes other images than a data set's or has another number of outputs."""
    shapes = model.input_shape, model.output_shape
    if not all(isinstance(shape, tuple) for shape in shapes):
        raise ValueError(f"'{model.name}' must have one input and one output to be trained as a classifier.")
    taken, given = shapes[0][1:], dataset.input_shape
    if len(taken) != 3 or any(size not in (None, wanted) for size, wanted in zip(taken, given)):
        raise ValueError(f"'{model.name}' takes images {taken}, but those of '{dataset.name}' are {given}.")
    if shapes[1][1:] != (dataset.classes,):
        raise ValueError(
            f"'{model.name}' has outputs {shapes[1][1:]}, but '{dataset.name}' has {dataset.classes} classes."
        )


def define_flags() -> None:
    """Defines the program's flags; not at import, so that other programs can use this module's functions."""
    flags.DEFINE_string("network", SMALL_RESNET, f"'{SMALL_RESNET}', a name of keras.applications, or a .keras file.")
    flags.DEFINE_string(
        "dataset",
        datasets.MNIST5K,
        f"'{datasets.MNIST5K}', a folder of images, or a TensorFlow Datasets name.",
    )
    flags.DEFINE_integer("image_size", None, "Height and width to resize the images to.", lower_bound=1)
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
    flags.DEFINE_integer("batch_size", 64, "Images in a batch.", lower_bound=1)
    flags.DEFINE_integer(
        "calibration", 64, "Training images for --importance, --recover and the quantisation.", lower_bound=1
    )
    flags.DEFINE_integer("seed", 0, "Of weights and of the images' order.", lower_bound=0)
    flags.DEFINE_string("output", None, "New or empty folder for the results.", required=True)


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit code. What the input gets wrong is one sentence on stderr."""
    try:
        if len(argv) > 1:
            raise ValueError(f"{argv[1]!r} isn't a flag; all arguments are --name=value, see --help.")
        _road()
    except (ValueError, TypeError, OSError, ImportError, tf.errors.OpError) as error:
        print(f"bstf-train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"bstf-train: interrupted; what is in '{FLAGS.output}' is complete.", file=sys.stderr)
        return 130
    return 0


def _road() -> None:
    """Trains dense, sparsifies, trains back, quantises, exports; writes each result when it is complete."""
    output = Path(FLAGS.output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"--output={output} exists and isn't an empty folder: name another one.")
    block = _block(FLAGS.block)
    check_ratio(FLAGS.ratio)
    importance.get(FLAGS.importance)
    keras.utils.set_random_seed(FLAGS.seed)
    size = (FLAGS.image_size, FLAGS.image_size) if FLAGS.image_size else None
    data = datasets.load(FLAGS.dataset, batch_size=FLAGS.batch_size, image_size=size, seed=FLAGS.seed)
    dense = network(FLAGS.network, data)
    images = data.images(FLAGS.calibration)

    retrain_epochs = FLAGS.epochs if FLAGS.retrain_epochs is None else FLAGS.retrain_epochs
    callbacks = _callbacks(data, retrain_epochs, dense)

    quantize(sparsify(dense, block, FLAGS.ratio), images[:1])  # what can't be is refused before hours of training
    output.mkdir(parents=True, exist_ok=True)
    _train_and_save(dense, "dense", FLAGS.epochs, data, output)
    one_shot = {"ratio": FLAGS.ratio, **_comparison(data, dense)} if not callbacks else {"ratio": 0.0}
    sparse = sparsify(dense, block, **one_shot)
    if FLAGS.recover:
        print(f"Recovering the outputs of the sparse network: its test accuracy is {accuracy(sparse, data):.4f},")
        recover(sparse, images, dense)
        print(f"and then {accuracy(sparse, data):.4f}.")
    teaching = {"teacher": dense, "soft_weight": FLAGS.distill} if FLAGS.distill else {}
    _train_and_save(sparse, "sparse", retrain_epochs, data, output, callbacks=callbacks, **teaching)

    export(sparse, output / "float")
    print("Quantising.")
    quantised = quantize(sparse, images)
    export(quantised, output / "int8")
    sparsity = report(sparse)
    sparsity.to_csv(output / "sparsity.csv")
    print(sparsity)
    table = Table("network", "test accuracy", "written to")
    for name, one, path in (
        ("dense", dense, "dense.keras"),
        ("sparse", sparse, "sparse.keras, float"),
        ("sparse INT8", quantised, "int8"),
    ):
        table.add_row(name, f"{accuracy(one, data):.4f}", ", ".join(str(output / p) for p in path.split(", ")))
    Console().print(table)


def _comparison(data: Dataset, model: keras.Model) -> dict[str, Any]:
    """How blocks are compared, as arguments of `sparsify` and `BlockSparsity`."""
    found = {"importance": FLAGS.importance, "scope": FLAGS.scope}
    if importance.needs_data(FLAGS.importance):
        batches = -(-FLAGS.calibration // FLAGS.batch_size)
        found |= {"data": data.train.take(batches), "loss": _loss(model)}
    return found


def _loss(model: keras.Model) -> keras.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=not ends_in_softmax(model))


def _callbacks(data: Dataset, epochs: int, model: keras.Model) -> list[keras.callbacks.Callback]:
    """What makes the network sparser during the retraining; nothing if it is sparse before."""
    if FLAGS.distill and not epochs:
        raise ValueError("--distill is about the retraining, which has no epochs: give --retrain_epochs.")
    if FLAGS.schedule == ONE_SHOT:
        return []
    if FLAGS.recover:
        raise ValueError(f"--recover needs all zero blocks before the retraining: --schedule={ONE_SHOT}.")
    return [gradual(FLAGS.schedule, FLAGS.ratio, epochs, data, **_comparison(data, model))]


def _train_and_save(model: keras.Model, name: str, epochs: int, data: Dataset, output: Path, **kwargs: Any) -> None:
    """Trains a model and saves it; the file appears when it is complete. More arguments are those of `train`."""
    if epochs:
        print(f"Training the {name} network.")
        train(model, data, epochs=epochs, learning_rate=FLAGS.learning_rate, **kwargs)
    partial = output / f".partial-{name}.keras"
    try:
        model.save(partial)
        os.replace(partial, output / f"{name}.keras")
    finally:
        partial.unlink(missing_ok=True)


def _block(words: Sequence[str]) -> BlockShape:
    try:
        sizes = [int(word) for word in words]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 2):
        raise ValueError(f"--block must be one number or two, like 8 or 8,4; got {','.join(words)}.")
    return BlockShape.of(sizes[0] if len(sizes) == 1 else sizes)


def run() -> None:
    """Entry point of the console program."""
    define_flags()
    for flag in FLAGS.get_flags_for_module(__name__):
        FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # else --help of the installed script lists none
    app.run(main)


if __name__ == "__main__":
    run()
