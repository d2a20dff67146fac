"""Random changes of training images that keep their class; pure functions of an image and a key."""

from collections.abc import Callable, Sequence

import tensorflow as tf

from bstf.suggestion import suggestion

_AREA, _ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
_PADDED = 8  # a crop moves by up to this fraction of the image: 4 pixels of 32


def flip(image: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Mirrors an image (height, width, channels), left for right, in half of the cases; not for digits."""
    return tf.image.stateless_random_flip_left_right(image, key)


def pad_crop(image: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Moves an image (height, width, channels) by up to an eighth of its size and fills up with zeros.

    Pad-and-crop of He et al. 2015 (arXiv 1512.03385, section 4.2): by up to 4 of 32 pixels.
    """
    height, width, _ = image.shape
    padded = tf.pad(image, [[height // _PADDED] * 2, [width // _PADDED] * 2, [0, 0]])
    return tf.image.stateless_random_crop(padded, image.shape, key)


def resized_crop(image: tf.Tensor, key: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """Takes a part of an image, 8 % to 100 % of its area at an aspect of 3:4 to 4:3, resized to (height, width).

    The random crop of Szegedy et al. 2014 (arXiv 1409.4842, section 6), usual for ImageNet.
    """
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.shape(image),
        tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
        key,
        area_range=_AREA,
        aspect_ratio_range=_ASPECT,
        min_object_covered=0.0,
    )
    return resize(_part(image, begin[:2], extent[:2]), size)


def fit(image: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """The largest part at the middle of an image that has the aspect of (height, width), resized to that."""
    shape = tf.shape(image)
    scale = tf.reduce_min(shape[:2] / tf.constant(size))
    extent = tf.minimum(tf.cast(tf.round(scale * tf.constant(size, tf.float64)), tf.int32), shape[:2])
    return resize(_part(image, (shape[:2] - extent) // 2, extent), size)


def resize(image: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """An image as float32 (*size, channels), low-pass filtered where it shrinks."""
    return tf.ensure_shape(tf.image.resize(image, size, antialias=True), (*size, image.shape[-1]))


def _part(image: tf.Tensor, begin: tf.Tensor, extent: tf.Tensor) -> tf.Tensor:
    end = begin + extent
    return image[begin[0] : end[0], begin[1] : end[1]]


# Of images that have their size and values already. "resized_crop" is what gives them their size.
OF_SIZED: dict[str, Callable[[tf.Tensor, tf.Tensor], tf.Tensor]] = {"flip": flip, "pad_crop": pad_crop}
AUGMENTATIONS = ("flip", "pad_crop", "resized_crop")


def check(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of augmentations, or raises a ValueError if there is one that doesn't exist."""
    names = (names,) if isinstance(names, str) else tuple(names)
    unknown = [name for name in names if name not in AUGMENTATIONS]
    if unknown:
        meant = suggestion(unknown[0], AUGMENTATIONS)
        raise ValueError(f"There is no augmentation {unknown[0]!r}{meant}: they are {', '.join(AUGMENTATIONS)}.")
    return names
