"""A training on two replicas in one process; run by test_distribution, for devices are made when a process starts.

The argument is a folder of IDX files. Prints a JSON object of what it found.
"""

import json
import sys

import keras
import numpy as np
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
workers = tf.distribute.MultiWorkerMirroredStrategy()

import bstf  # noqa: E402 - a strategy for several workers must be the first thing that TensorFlow makes
from bstf import datasets, distribution  # noqa: E402
from bstf.schedules import Cubic  # noqa: E402
from bstf.training import accuracy, train  # noqa: E402


def model():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((14, 14, 1))
    x = keras.layers.Conv2D(8, 3, strides=2, activation="relu", name="first")(inputs)
    x = keras.layers.BatchNormalization()(keras.layers.Conv2D(8, 3, strides=2, name="conv")(x))
    return keras.Model(inputs, keras.layers.Dense(10, name="dense")(keras.layers.Flatten()(x)))


def replicas_equal(variables):
    """Whether both copies of every variable have the same values; those of Γ too."""
    copies = [variable.value.values for variable in variables if hasattr(variable.value, "values")]
    assert all(len(one) == 2 for one in copies) and len(copies) > 10, len(copies)
    return all(np.array_equal(first, second) for first, second in copies)


class Watch(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        variables = [*self.model.weights, *self.model.optimizer.variables]
        # Each replica has seen other images, and so the statistics of others; they are joined when they are read.
        found["equal"] &= replicas_equal([v for v in variables if "moving" not in v.path])


found = {"equal": True}
data = datasets.load(sys.argv[1], batch_size=32, limit=330, augment=["pad_crop"])
with workers.scope():
    refused = model()
    try:
        train(refused, data, epochs=1, verbose=0)
    except ValueError as error:
        found["refused"] = str(error)
with distribution.distributed("mirrored", devices=["CPU:0", "CPU:1"]):
    found["replicas"] = distribution.replicas()
    dense = model()
    train(dense, data, epochs=2, learning_rate=0.01, verbose=0)
    sparse = bstf.sparsify(dense, block=4, ratio=0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # 330 images are 10 batches and one of 10, which two replicas share, too.
    images = data.calibration.take(2)
    sparsity = bstf.callbacks.BlockSparsity(Cubic(0.5, end=15), "taylor", unit="step", data=images, loss=loss)
    train(sparse, data, epochs=2, learning_rate=0.01, callbacks=[sparsity, Watch()], verbose=0)
    found["iterations"] = int(keras.ops.convert_to_numpy(sparse.optimizer.iterations))
    found["gammas"] = {name: np.asarray(sparse.get_layer(name).gamma).tolist() for name in ("conv", "dense")}
    found["sacred"] = True
    for layer in (sparse.get_layer("conv"), sparse.get_layer("dense")):
        kernel = layer._kernel
        slots = [v for v in sparse.optimizer.variables if tuple(v.shape) == tuple(kernel.shape)]
        assert len(slots) >= 2
        dead = np.repeat(np.repeat(np.asarray(layer.gamma) == 0, 4, -2), 4, -1)[
            ..., : kernel.shape[-2], : kernel.shape[-1]
        ]
        for variable in (kernel, *slots):
            for copy in variable.value.values:
                found["sacred"] &= not np.asarray(copy)[..., dead].any()
    found["accuracy"] = accuracy(sparse, data)
    again, images = bstf.sparsify(dense, block=4, ratio=0.5), data.images(32)
    wanted, before = np.asarray(dense(images)), np.asarray(again(images))
    bstf.recover(again, data.images(64), dense)
    after = np.asarray(again(images))
    found["recovered"] = float(np.square(after - wanted).sum() / np.square(before - wanted).sum())
    bstf.recover(again, data.images(64))
    found["equal"] &= replicas_equal(again.weights)
found["alone"] = accuracy(bstf.densify(sparse), data)
print(json.dumps(found))
