"""Whatever a SavedModel holds, reading it ends with a graph or in a sentence, in bounded time and memory."""

import resource
import subprocess
import sys
from collections import Counter

import keras
import numpy as np

import bstf

layers = keras.layers
_ADDRESS_SPACE = 12 * 2**30  # TensorFlow alone maps some GiB
_MUTANTS = 90
_SECONDS = 300


def test_damaged_models_load_or_are_refused_in_a_sentence(tmp_path):
    image = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, strides=2, activation="swish")(image)
    x = layers.Add()([x, layers.DepthwiseConv2D(3, padding="same")(x)])
    model = keras.Model(image, layers.Dense(3, activation="softmax")(layers.GlobalAveragePooling2D()(x)))
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    bstf.export(bstf.quantize(bstf.sparsify(model, ratio=0.5), images), tmp_path / "model")
    command = [sys.executable, "-m", "tests.bstf_compiler.mutants", str(tmp_path / "model"), "0", str(_MUTANTS)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE)),
    )
    assert done.returncode == 0, (done.stdout[-500:], done.stderr[-2000:])
    endings = [line.split(" ", 2)[2] for line in done.stdout.splitlines()]
    assert len(endings) == _MUTANTS
    assert set(endings) == {"loads", "refused"}, Counter(endings)
