"""Training a classifier on a data set: dense, or block sparse along a schedule; on one device or several."""

import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import keras
import numpy as np

from bstf import distribution
from bstf.applications import small_resnet
from bstf.callbacks import BlockSparsity
from bstf.checkpoints import Checkpoint
from bstf.datasets import Dataset, readable
from bstf.distillation import Distiller, ends_in_softmax
from bstf.schedules import Cubic, Steps
from bstf.suggestion import suggestion

SMALL_RESNET = "small_resnet"
GRADUAL = ("cubic", "steps")


def train(
    model: keras.Model,
    dataset: Dataset,
    *,
    epochs: int,
    learning_rate: float = 1e-3,
    teacher: keras.Model | None = None,
    soft_weight: float = 0.9,
    checkpoint: str | PathLike | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    verbose: int | str = "auto",
) -> keras.callbacks.History:
    """Trains a classifier with Adam, its learning rate falling to zero along a cosine.

    The model is compiled anew, so its optimizer has nothing in its slots: what is zero in a masked model
    stays zero, slots included. Inside `bstf.distribution.distributed`, where the model must have been built,
    it trains on several devices.

    Args:
        model: images to classes, probabilities or (without a softmax at the end) logits.
        dataset: what to train with; its test images are for the validation after each epoch.
        epochs: passes over the training images, at least 1.
        learning_rate: of the first step.
        teacher: a classifier whose answers `model` learns too, with `bstf.Distiller`.
        soft_weight: the teacher's share of the loss, in [0, 1].
        checkpoint: a folder of this training alone, for a `bstf.checkpoints.Checkpoint` after each epoch. If it
            holds one already, the training goes on from there, as if it had never stopped.
        callbacks: more of Keras' callbacks, such as `bstf.callbacks.BlockSparsity`.
        verbose: of `keras.Model.fit`; the default is Keras' progress bar.

    Returns:
        Keras' history, with "loss", "accuracy", "val_loss" and "val_accuracy" of each epoch.

    Raises:
        ValueError: `epochs` is less than 1, the model doesn't fit the data set, an image can't be read, or Keras
            can't train under the present tf.distribute strategy.

    Example:
        >>> train(model, datasets.load("mnist5k"), epochs=5)
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1; got {epochs}.")
    check_fit(model, dataset)
    distribution.check_trainable(model)
    steps = steps_per_epoch(dataset)
    trained = model if teacher is None else Distiller(model, teacher, soft_weight=soft_weight)
    trained.compile(
        optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, steps * epochs)),
        loss=loss_of(model),
        metrics=["accuracy"],
    )
    saver = None if checkpoint is None else Checkpoint(checkpoint)
    first = 0 if saver is None else saver.restore(trained)
    with readable(dataset):
        return trained.fit(
            dataset.train.repeat() if dataset.epochs is None else dataset.epochs(first),
            steps_per_epoch=steps,
            validation_data=distribution.for_validation(dataset.test),
            initial_epoch=first,
            epochs=epochs,
            callbacks=[*callbacks, *([saver] if saver else [])],
            verbose=verbose,
            shuffle=False,  # the data set shuffles itself; Keras warns when it is asked to
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
        end = epochs * steps_per_epoch(dataset) // 2
        if not end:
            raise ValueError("The schedule 'cubic' needs two training steps or more: give more epochs.")
        return BlockSparsity(Cubic(ratio, end=end, every=max(1, end // 50)), unit="step", **kwargs)
    schedule = Steps(ratio)
    needed = schedule.every * (math.ceil(ratio / schedule.fraction - 1e-9) - 1) + 1
    if epochs < needed:
        raise ValueError(
            f"The schedule 'steps' reaches the ratio {ratio} in {needed} epochs, and the retraining has {epochs}: "
            "give it more epochs, or take 'cubic'."
        )
    return BlockSparsity(schedule, **kwargs)


def steps_per_epoch(dataset: Dataset) -> int:
    """The number of training batches, or a ValueError if that isn't known."""
    steps = int(dataset.train.cardinality())
    if steps < 1:
        raise ValueError(
            f"'{dataset.name}' doesn't say how many training batches it has: tell by "
            "data.apply(tf.data.experimental.assert_cardinality(n)), n at least 1."
        )
    return steps


def loss_of(model: keras.Model) -> keras.Loss:
    """The cross-entropy of a classifier with integer labels, from probabilities or logits as the model ends."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=not ends_in_softmax(model))


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
    with readable(dataset):
        # Each of several replicas answers for the whole batch: the first one's answers do.
        found = [(model.predict_on_batch(x.numpy())[: len(y)], y.numpy()) for x, y in dataset.test]
    right = [np.argmax(outputs, axis=-1) == labels for outputs, labels in found]
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
    elif name in _networks():
        build = getattr(keras.applications, name)
        model = build(weights=None, input_shape=dataset.input_shape, classes=dataset.classes)
    else:
        raise ValueError(
            f"There is no network '{name}'{suggestion(name, _networks())}: give '{SMALL_RESNET}', a name of "
            "keras.applications such as 'ResNet50', or a .keras file."
        )
    check_fit(model, dataset)
    return model


def _networks() -> list[str]:
    """The networks that can be built by name."""
    models = [name for name in dir(keras.applications) if name[:1].isupper()]
    return [SMALL_RESNET, *(name for name in models if callable(getattr(keras.applications, name)))]


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
