"""Data as batches, however the user holds it: arrays, tf.data, a PyDataset, any iterable; and their progress."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

_BATCH = 32  # examples at a time, when the data is one array
_QUIET_SECONDS = 2.0  # shorter work shows no progress bar


class Batch(NamedTuple):
    """Inputs and labels of the same examples, as tensors of the backend; `y` is None without labels."""

    x: Any
    y: Any
    size: int


class Progress:
    """A progress bar that appears once the work takes long, where somebody can see it."""

    def __init__(self, target: int | None, unit: str) -> None:
        self.target, self.unit = target, unit
        self.done, self.start = 0, time.monotonic()
        self.bar: keras.utils.Progbar | None = None
        self.seen = sys.stdout.isatty() or "ipykernel" in sys.modules

    def step(self) -> None:
        """Counts one more unit of work as done."""
        self.done += 1
        if self.seen and self.bar is None and time.monotonic() - self.start > _QUIET_SECONDS:
            self.bar = keras.utils.Progbar(self.target, unit_name=self.unit)
        if self.bar is not None:
            self.bar.update(self.done, finalize=False)

    def finish(self) -> None:
        """Ends the bar's line, if there is one."""
        if self.bar is not None:
            self.bar.update(self.done, finalize=True)


def batches(data: Any, *, labels: bool) -> Iterator[Batch]:
    """Reads data once, batch after batch; a batch is all that is held of it.

    Args:
        data: a tuple `(x, y)` of arrays, an array `x`, a `tf.data.Dataset` or `keras.utils.PyDataset`, or
            any iterable of batches `x` or `(x, y)`. For models with several inputs or outputs x and y are
            lists or dictionaries of arrays.
        labels: whether every batch must have labels.

    Yields:
        Batch, never empty.

    Raises:
        ValueError: no examples at all, endless data, missing labels, or not one label an example.
        TypeError: `data` is nothing of the above.
    """
    found = False
    for item in _pairs(data) if _is_pair(data) else raw_batches(data, "data"):
        batch = _batch(item, labels)
        if batch.size:
            found = True
            yield batch
    if not found:
        raise ValueError("data holds no examples; at least one is needed.")


def image_batches(calibration: Any, inputs: Mapping[str, tuple[int | None, ...]]) -> Iterator[list[np.ndarray]]:
    """Reads calibration images, once.

    Args:
        calibration: an array (n, height, width, channels), arrays `(x, y)`, a `tf.data.Dataset` or
            `keras.utils.PyDataset` or any iterable of batches `x` or `(x, y)`. For several inputs x is a tuple or list
            of arrays in their order, or a dictionary by name.
        inputs: shapes of an image by the inputs' names, None for a size that doesn't matter.

    Yields:
        Batches that aren't empty: of every input, float32 (n, *shape).

    Raises:
        ValueError: endless, of a wrong shape, not equally many for all inputs, or NaN or infinite values.
        TypeError: `calibration` is nothing of the above.
    """
    read = _images_of_one if len(inputs) == 1 else _images_of_several
    for arrays in read(calibration, list(inputs)):
        images = [_images(array, *one) for array, one in zip(arrays, inputs.items())]
        if len({len(one) for one in images}) > 1:
            raise ValueError(f"calibration holds {_shapes(images)}; all inputs need equally many images.")
        if len(images[0]):
            yield images


def _images_of_one(calibration: Any, names: list[str]) -> Iterator[list[Any]]:
    """Batches of a single input, without their labels."""
    if _is_pair(calibration) and np.ndim(calibration[1]) < np.ndim(calibration[0]):
        calibration = calibration[0]  # all images, and all labels
    for batch in raw_batches(calibration, "calibration"):
        images = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
        if isinstance(images, dict):
            raise TypeError("calibration batches are dictionaries; give the images alone or (images, labels).")
        yield [images]


def _images_of_several(calibration: Any, names: list[str]) -> Iterator[list[Any]]:
    """Batches of several inputs, without their labels."""
    arrays = _by_input(calibration, names, _is_array)
    if arrays is None and not isinstance(calibration, dict):
        for batch in raw_batches(calibration, "calibration"):
            yield _require_inputs(batch, names)
        return
    whole = [np.asarray(array) for array in arrays or _require_inputs(calibration, names)]
    if len({len(array) for array in whole}) > 1:
        raise ValueError(f"calibration holds {_shapes(whole)}; all inputs need equally many images.")
    for start in range(0, len(whole[0]), _BATCH):
        yield [array[start : start + _BATCH] for array in whole]


def _require_inputs(batch: Any, names: list[str]) -> list[Any]:
    arrays = _by_input(batch, names, lambda _: True)
    if arrays is None:
        got = f"the names {', '.join(map(repr, batch))}" if isinstance(batch, dict) else type(batch).__name__
        raise TypeError(
            f"calibration must hold images of the inputs {', '.join(map(repr, names))}: a tuple of arrays in this "
            f"order, or a dictionary by name; got {got}."
        )
    return arrays


def _by_input(batch: Any, names: list[str], is_array: Callable[[Any], bool]) -> list[Any] | None:
    """An array for each input: of a dictionary, of a sequence, or of one of both beside labels."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], (tuple, list, dict)):
        batch = batch[0]  # and labels
    if isinstance(batch, dict):
        return [batch[name] for name in names] if set(names) <= set(batch) else None
    if isinstance(batch, (tuple, list)) and len(batch) == len(names) and all(map(is_array, batch)):
        return list(batch)
    return None


def _images(array: Any, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """Images of an input as float32, if that is what the array holds."""
    try:
        images = np.asarray(array, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise TypeError(f"calibration holds {type(array).__name__}, which isn't an array of images.") from error
    fits = images.ndim == len(shape) + 1 and all(
        wanted in (None, size) for wanted, size in zip(shape, images.shape[1:])
    )
    if not fits:
        raise ValueError(
            f"calibration holds a batch of shape {images.shape}; the input {name!r} needs batches "
            f"(n, {', '.join(map(str, shape))})."
        )
    if not np.isfinite(images).all():
        raise ValueError("calibration holds NaN or infinite values; clean the images first.")
    return images


def raw_batches(data: Any, name: str) -> Iterable[Any]:
    """The batches that data consists of, as they are; an array is cut into some.

    Args:
        data: an array, a `tf.data.Dataset`, a `keras.utils.PyDataset` or an iterable of batches.
        name: what the caller calls it, for the errors.

    Raises:
        ValueError: a dataset without end.
        TypeError: `data` is nothing of the above.
    """
    if isinstance(data, keras.utils.PyDataset):
        return (data[i] for i in range(data.num_batches))
    if _is_array(data):
        return (data[i : i + _BATCH] for i in range(0, len(data), _BATCH))
    if hasattr(data, "cardinality") and int(data.cardinality()) == -1:
        raise ValueError(f"{name} is an endless dataset; limit it, for instance with .take(8).")
    no_batches = isinstance(data, (str, bytes, dict)) or hasattr(data, "shape")
    if no_batches or not isinstance(data, Iterable):
        raise TypeError(
            f"{name} is a {type(data).__name__}; give an array (n, height, width, channels), a "
            "tf.data.Dataset or an iterable of batches."
        )
    return data


def number_of_batches(data: Any) -> int | None:
    """How many batches there will be, where that is known."""
    if isinstance(data, keras.utils.PyDataset):
        return data.num_batches
    if _is_pair(data):
        return number_of_batches(keras.tree.flatten(data[0])[0])
    if _is_array(data):
        return -(-len(data) // _BATCH)
    if hasattr(data, "cardinality"):
        return max(int(data.cardinality()), 0) or None
    sized = isinstance(data, Sized) and not hasattr(data, "shape")  # NumPy's numbers claim a length
    return len(data) if sized else None


def _is_array(data: Any) -> bool:
    """Whether it is one array, of NumPy or of a framework, and not a number."""
    return len(getattr(data, "shape", ())) > 0


def _is_pair(data: Any) -> bool:
    """Whether it is all examples and all labels, `(x, y)`, and not a tuple of such batches."""
    return isinstance(data, tuple) and len(data) == 2 and not any(isinstance(half, tuple) for half in data)


def _pairs(data: tuple[Any, Any]) -> Iterator[tuple[Any, Any]]:
    x, y = keras.tree.map_structure(np.asarray, data)
    lengths = {len(array) if array.ndim else 0 for array in keras.tree.flatten((x, y))}
    if len(lengths) != 1:
        raise ValueError(f"data is {_shapes(x)} with labels {_shapes(y)}: there must be one label an example.")
    for start in range(0, lengths.pop(), _BATCH):
        rows = slice(start, start + _BATCH)
        yield keras.tree.map_structure(lambda array, rows=rows: array[rows], (x, y))


def _batch(item: Any, labels: bool) -> Batch:
    if isinstance(item, tuple) and len(item) == 1:
        item = item[0]
    x, y, *weights = item if isinstance(item, tuple) else (item, None)
    if weights:
        raise ValueError("data has batches of more than (x, y); weights of the examples can't be used here.")
    if y is None and labels:
        raise ValueError("data has a batch without labels, which a loss needs: give batches (x, y).")
    x = keras.tree.map_structure(_tensor, x)
    y = None if y is None else keras.tree.map_structure(_tensor, y)
    arrays = keras.tree.flatten(x) + ([] if y is None else keras.tree.flatten(y))
    lengths = {int(array.shape[0]) if len(array.shape) else None for array in arrays}
    if len(lengths) != 1 or None in lengths:
        raise ValueError(f"data has a batch {_shapes(x)} with labels {_shapes(y)}: there must be one label an example.")
    return Batch(x, y, lengths.pop())


def _tensor(array: Any) -> Any:
    return array if keras.ops.is_tensor(array) else ops.convert_to_tensor(np.asarray(array))


def _shapes(arrays: Any) -> str:
    return ", ".join(str(tuple(array.shape)) for array in keras.tree.flatten(arrays) if array is not None)
