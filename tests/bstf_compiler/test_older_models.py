"""SavedModels that older releases wrote.

`data/keras2.tar.gz` is a `model.save` of TensorFlow 2.15 (Keras 2): Rescaling, Conv2D, BatchNormalization, ReLU(6),
DepthwiseConv2D, Add, Concatenate, pooling, Dropout, Dense with softmax; with three images and Keras' outputs for them.
"""

import tarfile
from pathlib import Path

import numpy as np
import pytest

import bstf_compiler
from bstf_compiler.graph import Conv

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def keras2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keras2")
    with tarfile.open(DATA / "keras2.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_a_model_of_keras_2_runs(keras2):
    with np.load(keras2 / "example.npz") as example:
        images, expected = example["x"], example["y"]
    graph = bstf_compiler.load(keras2)
    assert sum(isinstance(node.op, Conv) for node in graph) == 4
    np.testing.assert_allclose(bstf_compiler.Engine(graph)(images), expected, rtol=1e-4, atol=1e-6)
