"""Training on several devices, with what Keras has: tf.distribute on one machine, Keras on JAX on many.

All replicas hold all weights and all Γ. Each sees its part of every batch; gradients, and so all weights, are
equal everywhere. Γ is chosen from weights, and from images that all have, so it is equal everywhere too.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from bstf.files import replacing

NONE, MIRRORED, JAX = "none", "mirrored", "jax"
KINDS = (NONE, MIRRORED, JAX)


@contextlib.contextmanager
def distributed(
    kind: str,
    *,
    devices: Sequence[str] | None = None,
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
) -> Iterator[None]:
    """What is built and trained inside is on several devices.

    Args:
        kind: "none": on one; "mirrored": on several of this machine, by `tf.distribute.MirroredStrategy`; "jax":
            on those of several processes, by `keras.distribution.DataParallel`. The same program runs in each
            process, on the same machine or on others; Keras must run on JAX, and not have computed anything yet.
        devices: names of TensorFlow's, such as "GPU:0", for "mirrored"; None for all GPUs.
        coordinator: "host:port" of process 0, for "jax". None, also for the next two, for what the variables
            KERAS_DISTRIBUTION_JOB_ADDRESSES, KERAS_DISTRIBUTION_NUM_PROCESSES and KERAS_DISTRIBUTION_PROCESS_ID
            say, as in `keras.distribution.initialize`; without these, one process uses all of its devices.
        processes: how many there are.
        process_id: which one this is, from 0 on.

    Raises:
        ValueError: Keras runs on another backend, or the processes can't be told apart.
        ConnectionError: JAX couldn't go on, for instance since another process was killed.

    Example:
        >>> with distributed("mirrored", devices=["GPU:0", "GPU:1"]):
        ...     train(bstf.sparsify(model, ratio=0.5), data, epochs=5)
    """
    given = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
    if kind != JAX and any(value is not None for value in given.values()):
        names = ", ".join(name for name, value in given.items() if value is not None)
        raise ValueError(f"{names}: only processes of the kind '{JAX}' find each other.")
    if kind == NONE:
        yield
    elif kind == MIRRORED:
        _check_backend("tensorflow", kind)
        with tf.distribute.MirroredStrategy(devices).scope():
            yield
    elif kind == JAX:
        _check_backend("jax", kind)
        _initialize(**given)
        # Datasets are sharded where they are read, image by image: Keras would read all and cut batches.
        with keras.distribution.DataParallel(auto_shard_dataset=False).scope(), _stopped_together():
            yield
    else:
        raise ValueError(f"There is no distribution '{kind}': it is one of {', '.join(KINDS)}.")


def _check_backend(wanted: str, kind: str) -> None:
    backend = keras.backend.backend()
    if backend != wanted:
        raise ValueError(
            f"The distribution '{kind}' needs Keras on {wanted}, and it runs on {backend}: start the program with "
            f"KERAS_BACKEND={wanted} in its environment."
        )


def _initialize(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    given = [value is not None for value in (coordinator, processes, process_id)]
    if any(given) and not all(given):
        raise ValueError("Processes find each other by coordinator (host:port), processes and process_id: give all.")
    if all(given):
        if not 0 <= process_id < processes:
            raise ValueError(f"process_id must be in [0, {processes}), the number of processes; got {process_id}.")
        if not coordinator.rpartition(":")[2].isdecimal() or not coordinator.rpartition(":")[0]:
            raise ValueError(f"coordinator must be host:port, such as 10.0.0.1:1234; got '{coordinator}'.")
    if any(given) or "KERAS_DISTRIBUTION_JOB_ADDRESSES" in os.environ:
        try:
            keras.distribution.initialize(coordinator, processes, process_id)
        except RuntimeError as error:  # nobody there, or too late
            raise ValueError(f"The processes didn't find each other: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def _stopped_together() -> Iterator[None]:
    import jax  # only where Keras runs on it

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise ConnectionError(
            f"JAX stopped: {str(error).splitlines()[0]}. If another process has gone, start all of them again: a "
            "training with checkpoints goes on after its last complete epoch."
        ) from error


def shard() -> tuple[int, int]:
    """(index, count) of this process among those that train together: `shard` of `bstf.datasets.load`."""
    if not _on_many():
        return 0, 1
    import jax  # only where Keras runs on it

    return jax.process_index(), jax.process_count()


def is_chief() -> bool:
    """Whether this process is the one of all whose files stay."""
    return shard()[0] == 0


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to instead of another, where the file appears when it is complete.

    All processes must write, since weights that are on all of them may take all of them to read; one file stays.
    """
    if is_chief():
        with replacing(path) as partial:
            yield partial
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch) / path.name


def replicas() -> int:
    """How many replicas of the model there are."""
    if _on_many():
        return keras.distribution.distribution().num_model_replicas
    return tf.distribute.get_strategy().num_replicas_in_sync


def check_batch(batch_size: int) -> None:
    """Raises a ValueError if a training batch can't be divided among the devices."""
    if batch_size % replicas():
        raise ValueError(f"batch_size={batch_size} can't be divided among {replicas()} devices: take a multiple.")


def check_equal(value: Any, sentence: str) -> None:
    """Raises a ValueError with a sentence unless all processes are here with equal values; waits for them."""
    if shard()[1] > 1:
        from jax.experimental import multihost_utils  # only where Keras runs on it

        digest = np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint32)
        try:
            multihost_utils.assert_equal(digest, sentence)
        except AssertionError as error:
            raise ValueError(sentence) from error


def check_trainable(model: keras.Model) -> None:
    """Raises a ValueError if Keras can't fit a model under the strategy it was built in."""
    strategies = tf.distribute.get_strategy(), getattr(model, "distribute_strategy", None)
    if any(isinstance(one, tf.distribute.MultiWorkerMirroredStrategy) for one in strategies):
        raise ValueError(
            f"Keras 3 can't fit '{model.name}' under MultiWorkerMirroredStrategy: on several machines train with Keras "
            "on JAX (KERAS_BACKEND=jax), keras.distribution.initialize and keras.distribution.DataParallel, as "
            "bstf-train --distribute=jax does."
        )


def for_validation(data: tf.data.Dataset) -> tf.data.Dataset:
    """Batches that every device gets its part of: up to one image a device of the last batch is left out.

    Every process takes all batches, and so each image counts as often as any other.
    """
    if not _on_many():
        return data
    import jax  # only where Keras runs on it

    local = jax.local_device_count()
    if local == 1:
        return data
    cut = data.map(lambda x, y: (x[: tf.shape(x)[0] // local * local], y[: tf.shape(y)[0] // local * local]))
    return cut.filter(lambda x, y: tf.shape(x)[0] > 0)


def _on_many() -> bool:
    return keras.backend.backend() == "jax" and keras.distribution.distribution() is not None
