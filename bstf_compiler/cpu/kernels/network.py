"""A whole network in one call: compiled code that walks through a table of steps.

A small layer takes some 10 microseconds, as long as a call from Python. So the threads are started once an inference;
they share out the tasks of a step through a counter, and meet before the next step.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
from numba import prange

from bstf_compiler.cpu import access, team
from bstf_compiler.cpu.kernels import conv
from bstf_compiler.cpu.simd import Isa

# What a step does. LOAD: images pixel by pixel to channels. SPLIT: an image to those of every n-th row and column, for
# strided convolutions. ZERO_MAX_POOL: pixels of the padding take part, as zeros; for the other pools there are none.
LOAD, CONV, SPLIT, ELEMENTWISE, MAX_POOL, ZERO_MAX_POOL, MEAN_POOL = range(7)

STEP = np.dtype(
    [
        (name, np.int64)
        for name in (
            "kind",
            "tasks",
            # Input and output: where the first pixel is, elements to the next plane and row, rows to the next image.
            *("x", "x_plane", "x_pitch", "x_rows", "x_height", "x_width"),
            *("y", "y_plane", "y_pitch", "y_rows", "y_height", "y_width"),
            # Of the output: zeros before the first pixel; elements that are computed; planes; where its mask is, or -1.
            *("lead", "length", "planes", "mask"),
            # A tensor to add, or -1.
            *("other", "other_plane"),
            *("images", "channels"),
            # Convolutions: where their weights are.
            *("values", "offsets", "starts", "bias"),
            # Tiles of output channels; tiles of pixels of three vectors, then two, then one.
            *("tiles", "wide", "middle", "narrow"),
            # Parts into which the tiles of pixels are cut; whether tiles of channels are the outer loop; the depth.
            *("parts", "channels_first", "depth"),
            # Elementwise: where a factor and a summand for each channel are among the biases, or -1.
            "scale",
            # Windows: padding, strides, size. A split has the rows and columns of its grid of images as the size.
            *("top", "left", "down", "across", "window_height", "window_width"),
        )
    ]
    + [("low", np.float64), ("high", np.float64)]
)


@numba.njit(nogil=True)
def _clear(memory, y, plane, lead, first):
    """Zeros before the first pixel of a plane and from element `first` on."""
    memory[y - lead : y] = 0
    memory[y + first : y - lead + plane] = 0


@numba.njit(nogil=True)
def _load(step, first, last, images, memory):
    """Rows [first, last) of the images."""
    width, channels, height = step.x_width, step.channels, step.x_height
    for row in range(first, last):
        source, image = row * width * channels, row // height
        at = step.y + (image * step.y_rows + row % height) * step.y_pitch
        for channel in range(channels):
            for column in range(width):
                memory[at + channel * step.y_plane + column] = images[source + column * channels + channel]


@numba.njit(nogil=True)
def _clear_around(step, memory):
    """Zeros around all images of the output and in planes beyond its channels."""
    for plane in range(step.planes):
        y = step.y + plane * step.y_plane
        if plane >= step.channels:
            _clear(memory, y, step.y_plane, step.lead, 0)
            continue
        _clear(memory, y, step.y_plane, step.lead, step.length)
        for image in range(step.images):
            for row in range(step.y_rows):
                start = step.y_width if row < step.y_height else 0
                at = (image * step.y_rows + row) * step.y_pitch
                memory[y + min(step.length, at + start) : y + min(step.length, at + step.y_pitch)] = 0


@numba.njit(nogil=True)
def _split(step, plane, memory):
    """One plane of one image of the grid."""
    source_plane, place = plane % step.channels, plane // step.channels
    x, y = step.x + source_plane * step.x_plane, step.y + plane * step.y_plane
    first_row, first_column = place // step.window_width - step.top, place % step.window_width - step.left
    _clear(memory, y, step.y_plane, step.lead, 0)
    start = max(0, -(first_column // step.across))
    stop = min(step.y_width, (step.x_width - first_column + step.across - 1) // step.across)
    for image in range(step.images):
        for row in range(step.y_height):
            source_row = first_row + row * step.down
            if source_row < 0 or source_row >= step.x_height:
                continue
            at = y + (image * step.y_rows + row) * step.y_pitch
            source = x + (image * step.x_rows + source_row) * step.x_pitch + first_column
            for column in range(start, stop):
                memory[at + column] = memory[source + column * step.across]


@numba.njit(nogil=True)
def _elementwise(step, plane, memory, biases, masks):
    """One plane of clamp(x * scale + shift + other)."""
    x, y, other = step.x + plane * step.x_plane, step.y + plane * step.y_plane, step.other + plane * step.other_plane
    low, high = np.float32(step.low), np.float32(step.high)
    scale, shift = np.float32(1), np.float32(0)
    if step.scale >= 0:
        scale, shift = biases[step.scale + 2 * plane], biases[step.scale + 2 * plane + 1]
    for place in range(step.length):
        value = memory[x + place] * scale + shift
        if step.other >= 0:
            value += memory[other + place]
        memory[y + place] = min(max(value, low), high)
    if step.mask >= 0:
        _clear(memory, y, step.y_plane, step.lead, step.length)
        for place in range(step.length):
            if masks[step.mask + place] == 0:
                memory[y + place] = 0


@numba.njit(nogil=True)
def _pool(step, plane, memory, line):
    """One plane of maxima or means: a window is reduced down its columns into `line`, padded, then along it."""
    x, y = step.x + plane * step.x_plane, step.y + plane * step.y_plane
    maximum = step.kind != MEAN_POOL
    outside = np.float32(-np.inf if step.kind == MAX_POOL else 0)
    end = max(step.left + step.x_width, (step.y_width - 1) * step.across + step.window_width)
    _clear(memory, y, step.y_plane, step.lead, 0)
    line[:end] = outside
    inner = line[step.left : step.left + step.x_width]
    for image in range(step.images):
        for row in range(step.y_height):
            top = row * step.down - step.top
            first, last = max(0, top), min(step.x_height, top + step.window_height)
            start = np.float32(-np.inf if maximum else 0)
            if step.kind == ZERO_MAX_POOL and last - first < step.window_height:
                start = np.float32(0)
            inner[:] = start
            for source_row in range(first, last):
                source = x + (image * step.x_rows + source_row) * step.x_pitch
                if maximum:
                    for column in range(step.x_width):
                        inner[column] = max(inner[column], memory[source + column])
                else:
                    for column in range(step.x_width):
                        inner[column] += memory[source + column]
            at = y + (image * step.y_rows + row) * step.y_pitch
            result = memory[at : at + step.y_width]
            result[:] = np.float32(-np.inf if maximum else 0)
            for tap in range(step.window_width):
                if maximum:
                    for column in range(step.y_width):
                        result[column] = max(result[column], line[tap + column * step.across])
                else:
                    for column in range(step.y_width):
                        result[column] += line[tap + column * step.across]
            if not maximum:
                for column in range(step.y_width):
                    left = column * step.across - step.left
                    met = min(step.x_width, left + step.window_width) - max(0, left)
                    result[column] /= np.float32((last - first) * met)


@numba.njit(nogil=True)
def _planes(step, task, memory, biases, masks, line):
    """The planes of a task of a step without weights."""
    for plane in range(task * step.planes // step.tasks, (task + 1) * step.planes // step.tasks):
        if step.kind == SPLIT:
            _split(step, plane, memory)
        elif step.kind == ELEMENTWISE:
            _elementwise(step, plane, memory, biases, masks)
        else:
            _pool(step, plane, memory, line)


def _convolution(isa: Isa) -> Callable:
    """Compiles a task of a convolution."""
    deep, shallow = ([conv.tile_kernel(isa, vectors, depth) for vectors in (3, 2, 1)] for depth in (conv.DEPTH, 1))
    deep_3, deep_2, deep_1 = deep
    shallow_3, shallow_2, shallow_1 = shallow
    lanes, columns = isa.lanes(np.float32), conv.tile_columns(isa)

    def tile(step, pixels, channels, memory, values, offsets, starts, biases, masks):
        if pixels < step.wide:
            place, vectors = 3 * pixels, 3
        elif pixels < step.wide + step.middle:
            place, vectors = 3 * step.wide + 2 * (pixels - step.wide), 2
        else:
            place, vectors = 2 * step.middle + 2 * step.wide + pixels - step.middle, 1
        place *= lanes
        x, y = step.x + place, step.y + place + channels * columns * step.y_plane
        start, stop = starts[step.starts + channels], starts[step.starts + channels + 1]
        other = step.other + place + channels * columns * step.other_plane if step.other >= 0 else -1
        mask = step.mask + place if step.mask >= 0 else -1
        low, high, bias = np.float32(step.low), np.float32(step.high), step.bias + channels * columns
        if step.depth > 1 and vectors == 3:
            deep_3(memory, x, step.x_plane, values, step.values, offsets, step.offsets, start, stop, biases, bias,
                   other, step.other_plane, low, high, masks, mask, y, step.y_plane)  # fmt: skip
        elif step.depth > 1 and vectors == 2:
            deep_2(memory, x, step.x_plane, values, step.values, offsets, step.offsets, start, stop, biases, bias,
                   other, step.other_plane, low, high, masks, mask, y, step.y_plane)  # fmt: skip
        elif step.depth > 1:
            deep_1(memory, x, step.x_plane, values, step.values, offsets, step.offsets, start, stop, biases, bias,
                   other, step.other_plane, low, high, masks, mask, y, step.y_plane)  # fmt: skip
        elif vectors == 3:
            shallow_3(memory, x, step.x_plane, values, step.values, offsets, step.offsets, start, stop, biases, bias,
                      other, step.other_plane, low, high, masks, mask, y, step.y_plane)  # fmt: skip
        elif vectors == 2:
            shallow_2(memory, x, step.x_plane, values, step.values, offsets, step.offsets, start, stop, biases, bias,
                      other, step.other_plane, low, high, masks, mask, y, step.y_plane)  # fmt: skip
        else:
            shallow_1(memory, x, step.x_plane, values, step.values, offsets, step.offsets, start, stop, biases, bias,
                      other, step.other_plane, low, high, masks, mask, y, step.y_plane)  # fmt: skip

    tile = numba.njit(nogil=True, error_model="numpy")(tile)

    def task_(step, task, memory, values, offsets, starts, biases, masks):
        tiles = step.wide + step.middle + step.narrow
        slices = step.tasks // step.parts
        part, piece = task % step.parts, task // step.parts
        first, last = part * tiles // step.parts, (part + 1) * tiles // step.parts
        top, bottom = piece * step.tiles // slices, (piece + 1) * step.tiles // slices
        if step.channels_first:
            for channels in range(top, bottom):
                for pixels in range(first, last):
                    tile(step, pixels, channels, memory, values, offsets, starts, biases, masks)
        else:
            for pixels in range(first, last):
                for channels in range(top, bottom):
                    tile(step, pixels, channels, memory, values, offsets, starts, biases, masks)
        if step.mask >= 0 and part == 0:
            for plane in range(top * columns, min(bottom * columns, step.planes)):
                _clear(memory, step.y + plane * step.y_plane, step.y_plane, step.lead, step.length)

    return numba.njit(nogil=True, error_model="numpy")(task_)


@team.once
def executor(isa: Isa) -> Callable:
    """The compiled walk through a table of steps, in float32; it compiles at its first call.

    It takes the table (`STEP`), the steps [first, last), the images (flat, NHWC), the memory of all activations,
    values, offsets, starts and biases of the convolutions, the masks, counters of tasks taken and of tasks done for
    each step, and the team.
    """
    convolve = _convolution(isa)

    def execute(steps, first, last, images, memory, values, offsets, starts, biases, masks, counts, workers, members):
        widest = 0
        for place in range(first, last):
            step = steps[place]
            widest = max(widest, step.left + step.x_width, (step.y_width - 1) * step.across + step.window_width)
        for worker in prange(workers):
            line = np.empty(widest, np.float32)
            team.join(members, worker)
            for place in range(first, last):
                step = steps[place]
                while True:
                    team.yield_to_missing(members, workers)
                    task = access.fetch_add(counts, place, 1)
                    if task >= step.tasks:
                        break
                    if step.kind == CONV:
                        convolve(step, task, memory, values, offsets, starts, biases, masks)
                    elif step.kind == LOAD:
                        rows = step.images * step.x_height
                        _load(step, task * rows // step.tasks, (task + 1) * rows // step.tasks, images, memory)
                        if task == 0:
                            _clear_around(step, memory)
                    else:
                        _planes(step, task, memory, biases, masks, line)
                    access.fetch_add(counts, len(steps) + place, 1)
                team.wait_for(counts, len(steps) + place, step.tasks)
            team.leave(members)

    return numba.njit(nogil=True, error_model="numpy", parallel=True)(execute)
