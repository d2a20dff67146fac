"""One of two processes that train together; run by test_distribution.

Arguments: host:port of process 0, this process's number, a folder, "once" or "again". "once": one training in one
piece, then another with checkpoints that the test kills. "again": goes on with the second. Each writes a line an epoch:
training, epoch, a hash of Γ, a hash of all weights.
"""

import hashlib
import sys
import time
from pathlib import Path

import keras
import numpy as np

import bstf
from bstf import datasets, distribution
from bstf.schedules import Cubic
from bstf.training import train

EPOCHS = 5


def main(coordinator, process_id, folder, start):
    keras.utils.set_random_seed(0)
    with distribution.distributed("jax", coordinator=coordinator, processes=2, process_id=int(process_id)):
        where = distribution.shard()
        data = datasets.load(str(folder / "idx"), batch_size=32, limit=130, augment=["pad_crop"], shard=where)
        assert data.train.element_spec[0].shape[0] in (None, 16) and where == (int(process_id), 2)
        if start == "once":
            fit(data, folder, "whole")
        fit(data, folder, "killed", checkpoint=folder / "checkpoint", seconds=0.15)
    print("done", flush=True)


def fit(data, folder, name, seconds=0.0, **kwargs):
    keras.utils.set_random_seed(1)
    inputs = keras.Input(data.input_shape)
    x = keras.layers.Conv2D(16, 3, strides=2, activation="relu")(inputs)
    x = keras.layers.BatchNormalization()(keras.layers.Conv2D(16, 3)(x))
    outputs = keras.layers.Dense(10)(keras.layers.Flatten()(x))
    sparse = bstf.sparsify(keras.Model(inputs, outputs), block=4, ratio=0)
    calibration = data.calibration.take(2)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    sparsity = bstf.callbacks.BlockSparsity(
        Cubic(0.5, end=12, every=2), "taylor", unit="step", data=calibration, loss=loss
    )  # fmt: skip
    log = Log(folder / f"{name}-{distribution.shard()[0]}.txt", seconds)
    train(sparse, data, epochs=EPOCHS, learning_rate=0.01, callbacks=[sparsity, log], verbose=0, **kwargs)


class Log(keras.callbacks.Callback):
    def __init__(self, path, seconds):
        super().__init__()
        self.path, self.seconds = path, seconds

    def on_epoch_end(self, epoch, logs=None):
        weights = {weight.path: keras.ops.convert_to_numpy(weight) for weight in self.model.weights}
        weights |= {v.path: keras.ops.convert_to_numpy(v) for v in self.model.optimizer.variables}
        gammas = {path: value for path, value in weights.items() if path.endswith("gamma")}
        with self.path.open("a") as file:
            print(epoch, digest(gammas), digest(weights), sum(int((g == 0).sum()) for g in gammas.values()), file=file)

    def on_train_batch_begin(self, batch, logs=None):
        time.sleep(self.seconds)  # so that the test can kill in the middle of an epoch


def digest(arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(value).tobytes() for value in arrays.values())).hexdigest()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4])
