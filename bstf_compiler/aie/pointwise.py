"""What a core computes value by value, and how it moves channels and pixels: Numba, one function an operation.

As in kernels.py: parameters are read from the chunk in the core's memory, at `chunk`; shapes are (rows, pixels,
channels) of a tile; `block` is the output's first channel block in its tensor.
"""

# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import numba as nb
import numpy as np

from bstf_compiler.aie.kernels import LANES, add_tiles, requantized, words


@nb.njit(cache=True, nogil=True)
def add(memory, a, b, y, chunk, shape, step):
    """Sum or difference of two tiles; the second advances by `step` bytes a pixel (0: one pixel for all)."""
    add_tiles(memory, a, b, y, words(memory, chunk, 6), shape[0] * shape[1], shape[2], step)


@nb.njit(cache=True, nogil=True)
def product(memory, a, b, y, chunk, shape, step):
    """Product of two tiles; `step` as for `add`."""
    header = words(memory, chunk, 3)
    rows, pixels, channels = shape
    for pixel in range(rows * pixels):
        for c in range(channels):
            value = np.int64(memory[a + pixel * channels + c]) * np.int64(memory[b + pixel * step + c])
            memory[y + pixel * channels + c] = requantized(value, header[0], header[1], header[2])


@nb.njit(cache=True, nogil=True)
def requantize(memory, x, y, chunk, size):
    """A tile of `size` bytes on another grid."""
    header = words(memory, chunk, 3)
    for i in range(size):
        memory[y + i] = requantized(np.int64(memory[x + i]), header[0], header[1], header[2])


@nb.njit(cache=True, nogil=True)
def lookup(memory, x, y, chunk, size):
    """A table's entry for each of `size` values."""
    for i in range(size):
        memory[y + i] = memory[chunk + np.int64(memory[x + i]) + 128]


@nb.njit(cache=True, nogil=True)
def nearest(memory, x, y, chunk, in_shape, out_shape, before):
    """Each pixel repeated; `before`: rows and columns that the tile's first pixel makes before the first output."""
    header = words(memory, chunk, 3)
    _, width, channels = in_shape
    rows, columns, _ = out_shape
    for row in range(rows):
        for column in range(columns):
            pixel = (row + before[0]) // header[1] * width + (column + before[1]) // header[2]
            at, to = x + pixel * channels, y + (row * columns + column) * channels
            for c in range(channels):
                memory[to + c] = requantized(np.int64(memory[at + c]), header[0], -128, 127)


@nb.njit(cache=True, nogil=True)
def _between(out, factor, size):
    """The two pixels between whose centres an output pixel lies, and the second one's weight in 1 / (2 * factor)."""
    place = 2 * out + 1 - factor
    first = place // (2 * factor)
    return min(max(first, 0), size - 1), min(max(first + 1, 0), size - 1), place - 2 * factor * first


@nb.njit(cache=True, nogil=True)
def bilinear(memory, x, y, chunk, in_shape, out_shape, before):
    """Between the centres of four pixels; the tile ends where the image does, or beyond what its pixels reach."""
    header = words(memory, chunk, 3)
    height, width, channels = in_shape
    rows, columns, _ = out_shape
    for row in range(rows):
        top, bottom, down = _between(row + before[0], header[1], height)
        for column in range(columns):
            left, right, across = _between(column + before[1], header[2], width)
            to = y + (row * columns + column) * channels
            for c in range(channels):
                total = np.int64(0)
                for line, weight in ((top, 2 * header[1] - down), (bottom, down)):
                    one = np.int64(memory[x + (line * width + left) * channels + c])
                    two = np.int64(memory[x + (line * width + right) * channels + c])
                    total += weight * (one * (2 * header[2] - across) + two * across)
                memory[to + c] = requantized(total, header[0], -128, 127)


@nb.njit(cache=True, nogil=True)
def depthtospace(memory, x, y, chunk, in_shape, out_shape, before, block):
    """Pixels from channels; `before` as for `nearest`. Without a block pixels keep their channels: only a crop."""
    header = words(memory, chunk, 3)
    total, down, across = header[0], header[1], header[2]
    _, width, in_channels = in_shape
    rows, columns, channels = out_shape
    first = 0 if down * across == 1 else block * LANES  # the tile of a crop begins with the output's first channel
    for row in range(rows):
        i = row + before[0]
        for column in range(columns):
            j = column + before[1]
            at = x + (i // down * width + j // across) * in_channels + (i % down * across + j % across) * total + first
            to = y + (row * columns + column) * channels
            for c in range(channels):
                memory[to + c] = memory[at + c] if block * LANES + c < total else 0


@nb.njit(cache=True, nogil=True)
def join(memory, x, y, chunk, part, in_channels, out_shape, block):
    """The channels of one part of a concatenation, where the tile has any, on the grid of the output."""
    header = words(memory, chunk + 12 * part, 3)
    shift, start, stop = header[0], header[1], header[1] + header[2]
    rows, columns, channels = out_shape
    low, high = max(start, block * LANES), min(stop, block * LANES + channels)
    first = (low - start) % LANES  # the tile begins with a whole block
    for pixel in range(rows * columns):
        at, to = x + pixel * in_channels + first, y + pixel * channels + low - block * LANES
        for c in range(high - low):
            memory[to + c] = requantized(np.int64(memory[at + c]), shift, -128, 127)
