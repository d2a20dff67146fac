"""bstf-train: trains a network, makes it block sparse, trains it back, quantises it and exports it."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from rich.console import Console
from rich.table import Table

from bstf import datasets, importance
from bstf.applications import small_resnet
from bstf.blocks import BlockShape
from bstf.conversion import is_graph, sparsify
from bstf.datasets import Dataset
from bstf.export import export
from bstf.quantization import quantize
from bstf.report import report
from bstf.selection import check_ratio

FLAGS = flags.FLAGS
SMALL_RESNET = "small_resnet"


def train(
    model: keras.Model,
    dataset: Dataset,
    *,
    epochs: int,
    learning_rate: float = 1e-3,
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
    steps = epochs * max(1, int(dataset.train.cardinality()))
    model.compile(
        optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, steps)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=not _ends_in_softmax(model)),
        metrics=["accuracy"],
    )
    # The data set shuffles itself; Keras warns when it is asked to.
    return model.fit(dataset.train, validation_data=dataset.test, epochs=epochs, verbose=verbose, shuffle=False)


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


def _ends_in_softmax(model: keras.Model) -> bool:
    last = model.layers[-1]
    if is_graph(last):
        return _ends_in_softmax(last)
    softmax = getattr(last, "activation", None) is keras.activations.softmax
    return softmax or isinstance(last, keras.layers.Softmax)


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
    flags.DEFINE_integer("epochs", 5, "Epochs of dense training; 0 takes the network as it is.", lower_bound=0)
    flags.DEFINE_integer("retrain_epochs", None, "Epochs after sparsifying; as --epochs by default.", lower_bound=0)
    flags.DEFINE_float("learning_rate", 1e-3, "Of the first step of both trainings.", lower_bound=0.0)
    flags.DEFINE_integer("batch_size", 64, "Images in a batch.", lower_bound=1)
    flags.DEFINE_integer("calibration", 64, "Training images to calibrate the quantisation with.", lower_bound=1)
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

    def sparsified() -> keras.Model:
        return sparsify(dense, block, FLAGS.ratio, importance=FLAGS.importance)

    quantize(sparsified(), images[:1])  # what can't be quantised is refused before hours of training
    output.mkdir(parents=True, exist_ok=True)
    _train_and_save(dense, "dense", FLAGS.epochs, data, output)
    sparse = sparsified()
    retrain_epochs = FLAGS.epochs if FLAGS.retrain_epochs is None else FLAGS.retrain_epochs
    _train_and_save(sparse, "sparse", retrain_epochs, data, output)

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


def _train_and_save(model: keras.Model, name: str, epochs: int, data: Dataset, output: Path) -> None:
    """Trains a model and saves it; the file appears when it is complete."""
    if epochs:
        print(f"Training the {name} network.")
        train(model, data, epochs=epochs, learning_rate=FLAGS.learning_rate)
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
