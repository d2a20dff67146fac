"""Published weights of PyTorch models: read without PyTorch, laid out as Keras' layers have them."""

import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, BinaryIO

import keras
import numpy as np
from keras import layers

# Of ImageNet's RGB images in [0, 1]: most of PyTorch's published models were trained on (image - MEAN) / STD.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file that torch.save wrote before version 1.6
_DTYPES = {"FloatStorage": np.dtype("<f4"), "DoubleStorage": np.dtype("<f8"), "LongStorage": np.dtype("<i8")}
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def read(path: str | PathLike) -> dict[str, np.ndarray]:
    """Reads the weights of a PyTorch model by their names.

    Args:
        path: an `.npz` file, or a `state_dict` that `torch.save` wrote before PyTorch 1.6. Nothing in a pickle is
            called but what builds dictionaries and arrays.

    Returns:
        Arrays by name, in PyTorch's layouts: a convolution's weight is (cout, cin / groups, height, width).

    Raises:
        OSError: the file can't be read.
        ValueError: it is neither of these, or is damaged.

    Example:
        >>> weights = read("efficientnet-lite0.pth")
    """
    try:
        if str(path).endswith(".npz"):
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        with open(path, "rb") as file:
            return _state_dict(file)
    except OSError:
        raise
    except Exception as error:  # of the pickle and zip modules: whatever damaged bytes lead to
        raise ValueError(
            f"'{path}' holds no weights that can be read here - an .npz file, or a state_dict that torch.save wrote "
            f"before PyTorch 1.6: {error}"
        ) from error


def dotted(name: str) -> str:
    """PyTorch's name of a layer, `layer1.0.conv1`, from Keras' `layer1_0_conv1`: Keras on torch takes no dots."""
    return re.sub(r"_(\d+)_", r".\1.", name)


def load(model: keras.Model, path: str | PathLike, name_of: Callable[[str], str] = dotted) -> None:
    """Sets all weights of a model from a file of PyTorch's.

    Args:
        model: of convolutions, depthwise convolutions, batch normalisations and dense layers.
        path: as in `read`.
        name_of: gives PyTorch's name of a layer from Keras'.

    Raises:
        OSError: the file can't be read.
        ValueError: it has other weights than the model; the model is unchanged.

    Example:
        >>> load(model, "cifar_resnet20.npz")
    """
    found = read(path)
    values: list[tuple[keras.Layer, list[np.ndarray]]] = []
    for layer in model.layers:
        if not layer.weights:
            continue
        name = name_of(layer.name)
        mine = [_take(found, f"{name}.{part}", path, model) for part in _parts(layer)]
        if mine[0].ndim == layer.weights[0].ndim:
            mine[0] = _laid_out(layer, mine[0])
        if not all(np.issubdtype(value.dtype, np.floating) for value in mine):
            raise ValueError(f"'{path}' has weights for layer '{layer.name}' of '{model.name}' that are no numbers.")
        if [value.shape for value in mine] != [tuple(weight.shape) for weight in layer.weights]:
            shapes = ", ".join(str(value.shape) for value in mine)
            raise ValueError(f"'{path}' has other shapes than layer '{layer.name}' of '{model.name}': {shapes}.")
        values.append((layer, mine))
    left = [name for name in found if not name.endswith("num_batches_tracked")]
    if left:
        raise ValueError(f"'{path}' has weights for which '{model.name}' has no layer, such as {left[0]}.")
    for layer, mine in values:
        layer.set_weights(mine)


def _parts(layer: keras.Layer) -> tuple[str, ...]:
    """PyTorch's names of a layer's weights, in Keras' order."""
    if isinstance(layer, layers.BatchNormalization):
        return _BATCH_NORM
    return ("weight", "bias") if layer.use_bias else ("weight",)


def _laid_out(layer: keras.Layer, value: np.ndarray) -> np.ndarray:
    """A first weight of PyTorch's in Keras' layout."""
    if isinstance(layer, layers.DepthwiseConv2D):
        return value.transpose(2, 3, 0, 1)  # (cout, 1, height, width)
    if isinstance(layer, layers.Conv2D):
        return value.transpose(2, 3, 1, 0)
    return value.T  # of a dense layer; that of a batch normalisation has one axis


def _take(found: dict[str, np.ndarray], name: str, path: str | PathLike, model: keras.Model) -> np.ndarray:
    if name not in found:
        raise ValueError(f"'{path}' has no {name}, which '{model.name}' needs.")
    return found.pop(name)


class _View:
    """What a pickle says of a tensor, before the bytes of its storage are known."""

    def __init__(self, storage: tuple[str, str, int], offset: int, size: tuple[int, ...], stride: tuple[int, ...]):
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    def array(self, storages: Mapping[str, np.ndarray]) -> np.ndarray:
        storage = storages[self.storage[1]]
        last = self.offset + sum((size - 1) * step for size, step in zip(self.size, self.stride))
        negative = len(self.size) != len(self.stride) or min((*self.size, *self.stride, self.offset), default=0) < 0
        count = math.prod(self.size)
        if negative or count > len(storage) or (count and last >= len(storage)):
            raise ValueError("a tensor lies outside its storage")
        strides = [step * storage.itemsize for step in self.stride]
        return np.lib.stride_tricks.as_strided(storage[self.offset :], self.size, strides).copy()


class _Unpickler(pickle.Unpickler):
    """Builds dictionaries of `_View`s and refuses to call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *rest: _View(storage, offset, size, stride)
        if module == "torch" and name in _DTYPES:
            return name
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}")

    def persistent_load(self, pid: Any) -> tuple[str, str, int]:
        kind, dtype, key, _, count, view = pid
        if kind != "storage" or view is not None:
            raise pickle.UnpicklingError(f"unknown storage {pid!r}")
        return dtype, key, count


def _state_dict(file: BinaryIO) -> dict[str, np.ndarray]:
    """Reads the five pickles - magic number, version, types, dictionary, keys - and the storages behind them."""
    if _Unpickler(file).load() != _MAGIC:
        raise ValueError("it doesn't begin as such a file does")
    _Unpickler(file).load()
    if not _Unpickler(file).load()["little_endian"]:
        raise ValueError("its numbers are big-endian")
    views = _Unpickler(file).load()
    kinds = {view.storage[1]: view.storage for view in views.values()}
    storages = {}
    for key in _Unpickler(file).load():
        dtype, _, count = kinds[key]
        stored = int.from_bytes(file.read(8), "little")
        data = file.read(count * _DTYPES[dtype].itemsize) if stored == count else b""
        if len(data) != count * _DTYPES[dtype].itemsize:
            raise ValueError("it is cut short or damaged")
        storages[key] = np.frombuffer(data, _DTYPES[dtype])
    return {name: view.array(storages) for name, view in views.items()}
