"""SavedModels that older releases wrote.

`data/keras2.tar.gz` is a `model.save` of TensorFlow 2.15 (Keras 2), `data/keras3.tar.gz` a `model.export` of TensorFlow
2.17 (Keras 3.4): Rescaling, Conv2D, BatchNormalization, ReLU(6), DepthwiseConv2D, Add, Concatenate, pooling, Dropout,
Dense with softmax; with three images and Keras' outputs for them.
"""

import tarfile
from pathlib import Path

import numpy as np
import pytest

import bstf_compiler
from bstf_compiler.graph import Conv

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("release", ["keras2", "keras3"])
def test_a_model_of_an_older_release_runs(release, tmp_path):
    with tarfile.open(DATA / f"{release}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    with np.load(tmp_path / "example.npz") as example:
        images, expected = example["x"], example["y"]
    graph = bstf_compiler.load(tmp_path)
    assert sum(isinstance(node.op, Conv) for node in graph) == 4
    np.testing.assert_allclose(bstf_compiler.Engine(graph)(images), expected, rtol=1e-4, atol=1e-6)
