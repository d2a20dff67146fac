"""small_resnet: its shapes, its ops, and that all of it but the first convolution becomes sparse."""

import keras
import numpy as np
import pytest

import bstf
from bstf.applications import small_resnet


def test_default():
    model = small_resnet()
    assert model.input_shape == (None, 28, 28, 1) and model.output_shape == (None, 10)
    probabilities = model(np.random.default_rng(0).random((2, 28, 28, 1)))
    np.testing.assert_allclose(np.sum(probabilities, axis=-1), np.ones(2), rtol=1e-5)
    convs = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    assert {layer.kernel_size for layer in convs} == {(3, 3), (1, 1)}
    assert {layer.strides for layer in convs} == {(1, 1), (2, 2)}
    assert all(layer.filters % 8 == 0 for layer in convs)
    assert sum(isinstance(layer, keras.layers.Add) for layer in model.layers) == 6
    skipped = [row.layer for row in bstf.report(bstf.sparsify(model)).layers if row.skipped]
    assert skipped == ["stem_conv"]


@pytest.mark.parametrize("widths, depth, shape", [((8,), 1, (7, 5, 3)), ((24, 8, 40), 3, (17, 17, 1))])
def test_other_sizes(widths, depth, shape):
    model = small_resnet(shape, 4, widths, depth)
    assert model(np.zeros((1, *shape))).shape == (1, 4)
    assert model.get_layer("pool").input.shape[-1] == widths[-1]


@pytest.mark.parametrize("arguments", [{"widths": (12,)}, {"widths": ()}, {"depth": 0}, {"classes": 0}])
def test_errors_are_sentences(arguments):
    with pytest.raises(ValueError, match="small_resnet"):
        small_resnet(**arguments)
