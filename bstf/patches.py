"""What convolutions multiply their kernels with."""

from collections.abc import Sequence

import numpy as np


def windows(
    x: np.ndarray,
    size: Sequence[int],
    strides: Sequence[int] = (1, 1),
    dilation: Sequence[int] = (1, 1),
    padding: str = "valid",
) -> np.ndarray:
    """The elements under a kernel at each of its places, as a view.

    Args:
        x: (n, *sizes, channels): images, or signals and volumes of one and three sizes.
        size: of the kernel, (height, width) for images.
        strides: of the convolution.
        dilation: of the convolution.
        padding: "valid", "same" with zeros as Keras pads, or "causal" with zeros in front.

    Returns:
        (n, *outputs, *size, channels).

    Example:
        >>> windows(images, (3, 3), strides=(2, 2)).shape
    """
    rank = len(size)
    axes = tuple(range(1, rank + 1))
    reach = [(k - 1) * d + 1 for k, d in zip(size, dilation)]
    if padding == "same":
        missing = [max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in zip(x.shape[1:], strides, reach)]
        x = np.pad(x, ((0, 0), *((m // 2, m - m // 2) for m in missing), (0, 0)))
    elif padding == "causal":
        x = np.pad(x, ((0, 0), *((r - 1, 0) for r in reach), (0, 0)))
    found = np.lib.stride_tricks.sliding_window_view(x, reach, axis=axes)  # n, *outputs, channels, *reach
    steps = [slice(None, None, step) for step in strides]
    found = found[:, *steps, :, *(slice(None, None, d) for d in dilation)]
    return np.moveaxis(found, rank + 1, -1)


def patches(
    x: np.ndarray,
    size: Sequence[int],
    strides: Sequence[int] = (1, 1),
    dilation: Sequence[int] = (1, 1),
    padding: str = "valid",
) -> np.ndarray:
    """What a convolution multiplies its kernel with (im2col).

    Args:
        x: as of `windows`.
        size: of the kernel.
        strides: of the convolution.
        dilation: of the convolution.
        padding: of the convolution.

    Returns:
        (n * output positions, kernel positions * channels): its product with the kernel as a matrix is the
            convolution.

    Example:
        >>> patches(x, (3, 3), padding="same") @ kernel.reshape(-1, kernel.shape[-1])
    """
    return windows(x, size, strides, dilation, padding).reshape(-1, int(np.prod(size)) * x.shape[-1])
