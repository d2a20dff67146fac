"""What a core computes under windows, on the bytes of its memory; and what a DMA channel moves. Numba, one function an
operation; the others are in pointwise.py.

Every function reads its parameters from the packed chunk in the core's memory, at `chunk` (layout: weights.py). Sums
fit int32, as the cores have it; the compiler checks that. Shapes are (rows, pixels, channels), `before` the rows and
pixels of the window's reach that lie before the tile.
"""

# Kernels take plain integers and flat int8 memories: annotations would repeat the line above.
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import numba as nb
import numpy as np

LANES = 8


@nb.njit(cache=True, nogil=True)
def move(source, start, strides, target, to, to_strides, sizes):
    """Copies a box of bytes."""
    rows, pixels, length = sizes
    for row in range(rows):
        for pixel in range(pixels):
            a = start + row * strides[0] + pixel * strides[1]
            b = to + row * to_strides[0] + pixel * to_strides[1]
            target[b : b + length] = source[a : a + length]


@nb.njit(cache=True, nogil=True)
def words(memory, address, count):
    """Bytes of a memory as int32."""
    return memory[address : address + 4 * count].view(np.int32)


@nb.njit(cache=True, nogil=True)
def requantized(value, shift, smallest, largest):
    """clip(floor(value / 2**shift + 1/2), smallest, largest)."""
    if shift > 0:
        value = (value + (1 << (shift - 1))) >> shift
    else:
        value = value << -shift
    return np.int8(min(max(value, smallest), largest))


@nb.njit(cache=True, nogil=True)
def conv(memory, x, residual, y, chunk, scratch, begin, finish, in_shape, out_shape, kernel, strides, dilation, before):
    """Block-sparse convolution of a tile; `begin` and `finish` frame sums kept at `scratch`; the tile at `residual`, if
    not negative, is added to the result.
    """
    header = words(memory, chunk, 4)
    shift, smallest, largest, blocks = header[0], header[1], header[2], header[3]
    bias = words(memory, chunk + 16, LANES * blocks)
    index_at = chunk + 16 + 4 * LANES * blocks
    counts = memory[index_at : index_at + 2 * blocks].view(np.uint16)
    kept = 0
    for block in range(blocks):
        kept += counts[block]
    rows = memory[index_at + 2 * blocks : index_at + 2 * (blocks + kept)].view(np.uint16)
    weights_at = index_at + (2 * (blocks + kept) + 15) // 16 * 16
    oh, ow, channels = out_shape
    pixels = oh * ow
    if begin and finish:
        sums = np.empty(pixels * channels, np.int32)
    else:
        sums = words(memory, scratch, pixels * channels)
    entry = 0
    for block in range(blocks):
        part = sums[block * pixels * LANES : (block + 1) * pixels * LANES].reshape(pixels, LANES)
        if begin:
            for pixel in range(pixels):
                for lane in range(LANES):
                    part[pixel, lane] = bias[block * LANES + lane]
        for _ in range(counts[block]):
            _multiply_block(
                memory,
                x + rows[entry] * LANES,
                weights_at,
                part,
                in_shape,
                out_shape,
                kernel,
                strides,
                dilation,
                before,
            )
            weights_at += kernel[0] * kernel[1] * LANES * LANES
            entry += 1
        if finish:
            for pixel in range(pixels):
                for lane in range(LANES):
                    value = requantized(np.int64(part[pixel, lane]), shift, smallest, largest)
                    memory[y + pixel * channels + block * LANES + lane] = value
    if finish and residual >= 0:
        add_tiles(memory, y, residual, y, words(memory, weights_at, 6), pixels, channels, channels)


@nb.njit(cache=True, nogil=True)
def add_tiles(memory, a, b, y, parameters, pixels, channels, step):
    """Sum or difference of two tiles on the finer of their grids; the second advances by `step` bytes a pixel."""
    shift, shift2, sign, cut, smallest, largest = parameters
    for pixel in range(pixels):
        for c in range(channels):
            one = np.int64(memory[a + pixel * channels + c]) << shift
            two = np.int64(memory[b + pixel * step + c]) << shift2
            memory[y + pixel * channels + c] = requantized(one + sign * two, cut, smallest, largest)


@nb.njit(cache=True, nogil=True)
def _multiply_block(memory, x, weights_at, sums, in_shape, out_shape, kernel, strides, dilation, before):
    """Adds one kept block's products to the sums (pixels, 8) of its output block."""
    ih, iw, in_channels = in_shape
    oh, ow, _ = out_shape
    weights = np.empty((LANES, LANES), np.int32)
    for ky in range(kernel[0]):
        for kx in range(kernel[1]):
            for i in range(LANES):
                for o in range(LANES):
                    weights[i, o] = memory[weights_at + i * LANES + o]
            weights_at += LANES * LANES
            for oy in range(oh):
                iy = oy * strides[0] + ky * dilation[0] - before[0]
                if iy < 0 or iy >= ih:
                    continue
                for ox in range(ow):
                    ix = ox * strides[1] + kx * dilation[1] - before[1]
                    if ix < 0 or ix >= iw:
                        continue
                    at = x + (iy * iw + ix) * in_channels
                    pixel = sums[oy * ow + ox]
                    for i in range(LANES):
                        value = np.int32(memory[at + i])
                        for o in range(LANES):
                            pixel[o] += value * weights[i, o]


@nb.njit(cache=True, nogil=True)
def depthwise(memory, x, y, chunk, in_shape, out_shape, block, kernel, strides, dilation, before):
    """Convolution of each channel alone; `block`: the output's first channel block."""
    header = words(memory, chunk, 4)
    shift, smallest, largest, spread = header[0], header[1], header[2], header[3]
    ih, iw, in_channels = in_shape
    oh, ow, channels = out_shape
    bias = words(memory, chunk + 16, channels)
    weights_at = chunk + 16 + 4 * channels
    first = block * LANES // spread // LANES * LANES  # the tile's first input channel
    for c in range(channels):
        # Beyond the last channel there may be no input; the weights are zero.
        channel = min((block * LANES + c) // spread - first, in_channels - 1)
        for oy in range(oh):
            for ox in range(ow):
                total = bias[c]
                for ky in range(kernel[0]):
                    iy = oy * strides[0] + ky * dilation[0] - before[0]
                    if iy < 0 or iy >= ih:
                        continue
                    for kx in range(kernel[1]):
                        ix = ox * strides[1] + kx * dilation[1] - before[1]
                        if ix < 0 or ix >= iw:
                            continue
                        weight = np.int32(memory[weights_at + (ky * kernel[1] + kx) * channels + c])
                        total += weight * np.int32(memory[x + (iy * iw + ix) * in_channels + channel])
                value = requantized(np.int64(total), shift, smallest, largest)
                memory[y + (oy * ow + ox) * channels + c] = value


@nb.njit(cache=True, nogil=True)
def maxpool(memory, x, y, chunk, in_shape, out_shape, kernel, strides, dilation, before):
    """Maximum over a window; pixels outside the tile have the chunk's value."""
    fill = words(memory, chunk, 1)[0]
    ih, iw, channels = in_shape
    oh, ow, _ = out_shape
    for oy in range(oh):
        for ox in range(ow):
            to = y + (oy * ow + ox) * channels
            for c in range(channels):
                best = np.int32(-128)
                for ky in range(kernel[0]):
                    iy = oy * strides[0] + ky * dilation[0] - before[0]
                    for kx in range(kernel[1]):
                        ix = ox * strides[1] + kx * dilation[1] - before[1]
                        inside = 0 <= iy < ih and 0 <= ix < iw
                        value = np.int32(memory[x + (iy * iw + ix) * channels + c]) if inside else fill
                        best = max(best, value)
                memory[to + c] = best


@nb.njit(cache=True, nogil=True)
def averagepool(memory, x, y, chunk, in_shape, out_shape, kernel, strides, dilation, before):
    """Sum over a window times a numerator, by how many rows and columns of the window lie inside the tile."""
    header = words(memory, chunk, 5)
    table_rows, table_columns = header[3], header[4]
    numerators = words(memory, chunk + 20, table_rows * table_columns)
    ih, iw, channels = in_shape
    oh, ow, _ = out_shape
    for oy in range(oh):
        top, bottom = _inside(oy * strides[0] - before[0], dilation[0], kernel[0], ih)
        for ox in range(ow):
            left, right = _inside(ox * strides[1] - before[1], dilation[1], kernel[1], iw)
            row = max(bottom - top - 1, 0) if table_rows > 1 else 0
            column = max(right - left - 1, 0) if table_columns > 1 else 0
            factor = np.int64(numerators[row * table_columns + column])
            for c in range(channels):
                total = np.int64(0)
                for ky in range(top, bottom):
                    iy = oy * strides[0] + ky * dilation[0] - before[0]
                    for kx in range(left, right):
                        ix = ox * strides[1] + kx * dilation[1] - before[1]
                        total += memory[x + (iy * iw + ix) * channels + c]
                value = requantized(total * factor, header[0], header[1], header[2])
                memory[y + (oy * ow + ox) * channels + c] = value


@nb.njit(cache=True, nogil=True)
def _inside(start, step, size, limit):
    """The kernel positions [first, last) of a window from `start` on that lie in [0, limit)."""
    first = max(-(start // step), 0)
    return first, max(min(size, (limit - 1 - start) // step + 1), first)
