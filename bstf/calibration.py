"""Calibration images, in any of the forms users have them in, as checked batches; and progress over them."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import keras
import numpy as np

BATCH = 32  # images at a time, when calibration is one array
QUIET_SECONDS = 2.0  # shorter work shows no progress bar


class Progress:
    """A progress bar that appears once work takes long, where somebody can see it.

    Args:
        target: the number of steps, None where it isn't known.
        unit: what a step is.
    """

    def __init__(self, target: int | None, unit: str = "operation") -> None:
        self.done, self.start = 0, time.monotonic()
        self.target, self.unit = target, unit
        self.bar: keras.utils.Progbar | None = None
        self.seen = sys.stdout.isatty() or "ipykernel" in sys.modules

    def step(self) -> None:
        """Counts a step."""
        self.done += 1
        if self.seen and self.bar is None and time.monotonic() - self.start > QUIET_SECONDS:
            self.bar = keras.utils.Progbar(self.target, unit_name=self.unit)
        if self.bar is not None:
            self.bar.update(self.done, finalize=False)

    def finish(self) -> None:
        """Ends the bar's line."""
        if self.bar is not None:
            self.bar.update(self.done, finalize=True)


def image_batches(calibration: Any, shape: tuple[int | None, ...], name: str) -> Iterator[np.ndarray]:
    """Reads calibration images, once.

    Args:
        calibration: an array (n, height, width, channels), a `tf.data.Dataset` or `keras.utils.PyDataset`
            or any iterable of batches `x` or `(x, y)`.
        shape: of an image, None for a size that doesn't matter.
        name: of the input they are for.

    Yields:
        Batches that aren't empty, float32 (n, *shape).

    Raises:
        ValueError: endless, of a wrong shape, or NaN or infinite values.
        TypeError: `calibration` is nothing of the above.
    """
    for batch in _raw_batches(calibration):
        images = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
        if isinstance(images, dict):
            raise TypeError("calibration batches are dictionaries; give the images alone or (images, labels).")
        try:
            images = np.asarray(images, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise TypeError(f"calibration holds {type(images).__name__}, which isn't an array of images.") from error
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
        if len(images):
            yield images


def number_of_batches(calibration: Any) -> int | None:
    """How many batches there will be, where that is known."""
    if isinstance(calibration, keras.utils.PyDataset):
        return calibration.num_batches
    if _is_array(calibration):
        return -(-len(calibration) // BATCH)
    if hasattr(calibration, "cardinality"):
        return max(int(calibration.cardinality()), 0) or None
    sized = isinstance(calibration, Sized) and not hasattr(calibration, "shape")  # NumPy's numbers claim a length
    return len(calibration) if sized else None


def _raw_batches(calibration: Any) -> Iterable[Any]:
    if isinstance(calibration, keras.utils.PyDataset):
        return (calibration[i] for i in range(calibration.num_batches))
    if _is_array(calibration):
        return (calibration[i : i + BATCH] for i in range(0, len(calibration), BATCH))
    if hasattr(calibration, "cardinality") and int(calibration.cardinality()) == -1:
        raise ValueError("calibration is an endless dataset; limit it, for instance with .take(8).")
    no_batches = isinstance(calibration, (str, bytes, dict)) or hasattr(calibration, "shape")
    if no_batches or not isinstance(calibration, Iterable):
        raise TypeError(
            f"calibration is a {type(calibration).__name__}; give an array (n, height, width, channels), a "
            "tf.data.Dataset or an iterable of batches."
        )
    return calibration


def _is_array(calibration: Any) -> bool:
    """Whether it is one array, of NumPy or of a framework, and not a number."""
    return len(getattr(calibration, "shape", ())) > 0
