"""Augmentations: compared with NumPy on images whose pixels tell where they were."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from bstf import augmentation

KEYS = st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)).map(lambda key: tf.constant(key, tf.int64))


def numbered(height, width, channels=2):
    return np.arange(1, 1 + height * width * channels, dtype=np.float32).reshape(height, width, channels)


@settings(max_examples=25, deadline=None)
@given(KEYS, st.integers(1, 20), st.integers(1, 20))
def test_flip_and_pad_crop(key, height, width):
    image = numbered(height, width)
    flipped = augmentation.flip(tf.constant(image), key).numpy()
    assert (flipped == image).all() or (flipped == image[:, ::-1]).all()
    moved = augmentation.pad_crop(tf.constant(image), key).numpy()
    up, left = height // 8, width // 8
    padded = np.pad(image, [(up, up), (left, left), (0, 0)])
    crops = [padded[i : i + height, j : j + width] for i in range(2 * up + 1) for j in range(2 * left + 1)]
    assert any((moved == crop).all() for crop in crops)
    assert (augmentation.pad_crop(tf.constant(image), key).numpy() == moved).all()  # a function of its key


def test_all_cases_occur_alike():
    image = tf.constant(numbered(16, 16))
    keys = tf.random.split(tf.constant([1, 2], tf.int64), 600)
    flips = np.mean([augmentation.flip(image, key).numpy()[0, 0, 0] != 1 for key in keys])
    assert 0.4 < flips < 0.6
    corners = [augmentation.pad_crop(image, key).numpy()[8, 8, 0] for key in keys]
    counts = np.unique(corners, return_counts=True)[1]
    assert len(counts) == 25 and counts.min() > 600 / 25 / 3


@settings(max_examples=20, deadline=None)
@given(KEYS, st.integers(12, 60), st.integers(12, 60))
def test_resized_crop_is_a_part_of_the_image(key, height, width):
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    image = np.stack([rows, columns, 0 * rows], axis=-1).astype(np.float32)
    part = augmentation.resized_crop(tf.constant(image), key, (9, 7)).numpy()
    assert part.shape == (9, 7, 3)
    tall, wide = (part[..., i].max() - part[..., i].min() + 1 for i in range(2))
    assert 0.03 * height * width <= (tall + 3) * (wide + 3) and tall <= height and wide <= width
    assert (np.diff(part[:, 0, 0]) >= -1e-4).all() and (np.diff(part[0, :, 1]) >= -1e-4).all()


@pytest.mark.parametrize("shape, size", [((8, 20), (4, 4)), ((20, 8), (4, 4)), ((9, 9), (9, 3)), ((6, 5), (12, 10))])
def test_fit_takes_the_middle(shape, size):
    image = numbered(*shape)
    scale = min(shape[0] / size[0], shape[1] / size[1])
    height, width = round(scale * size[0]), round(scale * size[1])
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    middle = image[top : top + height, left : left + width]
    wanted = tf.image.resize(middle, size, antialias=True)
    np.testing.assert_allclose(augmentation.fit(tf.constant(image), size), wanted, rtol=1e-6)
    if (height, width) == size:
        np.testing.assert_allclose(augmentation.fit(tf.constant(image), size), middle, rtol=1e-6)
