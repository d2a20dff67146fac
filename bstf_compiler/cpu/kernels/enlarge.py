"""Steps that make larger images: each pixel several times, or interpolated, or of the channels of a pixel."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

from bstf_compiler.cpu import simd, words
from bstf_compiler.cpu.compiled import inlined
from bstf_compiler.cpu.kernels.planes import clear
from bstf_compiler.cpu.layout import FLOATS, WORDS, Format
from bstf_compiler.cpu.simd import Isa


def scratch(width: int, lanes: int, format: Format) -> int:
    """Elements of scratch that `resize` needs for images so wide: a row of each channel of a plane, and a vector."""
    return format.channels * (width + 2 + 2 * lanes) + lanes


def resize(isa: Isa, format: Format) -> Callable:
    """Compiles a plane of weighted sums of 3 x 3 pixels, with weights of their own for every pixel made of one.

    Beyond the edge the image goes on with the pixels there. First the rows are joined, then the columns.
    """
    lanes, rows = format.lanes(isa), format.channels
    widened, narrowed = _of_floats(lanes) if format == FLOATS else _of_words(lanes)

    def weighted(biases, at, before, here, after):
        total = simd.multiply(before, simd.rows_of(biases, at, lanes, 1, 1))
        total = simd.add(total, simd.multiply(here, simd.rows_of(biases, at + 1, lanes, 1, 1)))
        return simd.add(total, simd.multiply(after, simd.rows_of(biases, at + 2, lanes, 1, 1)))

    weighted = inlined(weighted)

    def kernel(step, plane, memory, biases, line):
        x, y = step.x + plane * step.x_plane, step.y + plane * step.y_plane
        across, width, stride = step.window_width, step.x_width, step.x_width + 2 + 2 * lanes
        result = rows * stride
        clear(step, memory, y, 0)
        for image in range(step.images):
            for row in range(step.y_height):
                place, phase = row // step.window_height, row % step.window_height
                first = x + image * step.x_rows * step.x_pitch
                before = first + max(place - 1, 0) * step.x_pitch
                here, after = first + place * step.x_pitch, first + min(place + 1, step.x_height - 1) * step.x_pitch
                for column in range(0, width, lanes):
                    total = weighted(
                        biases, step.scale + 3 * phase, widened(memory, before + column, step.up),
                        widened(memory, here + column, step.up), widened(memory, after + column, step.up),
                    )  # fmt: skip
                    simd.store(total, line, 1 + column, stride)
                for channel in range(rows):
                    line[channel * stride] = line[channel * stride + 1]
                    line[channel * stride + width + 1] = line[channel * stride + width]
                at = y + (image * step.y_rows + row) * step.y_pitch
                for phase in range(across):
                    for column in range(0, width, lanes):
                        total = weighted(
                            biases, step.scale + 3 * (step.window_height + phase),
                            simd.load_tile(line, column, stride, lanes, rows, 1),
                            simd.load_tile(line, column + 1, stride, lanes, rows, 1),
                            simd.load_tile(line, column + 2, stride, lanes, rows, 1),
                        )  # fmt: skip
                        simd.store(narrowed(total, step.cut), line, result, 0)
                        for lane in range(min(lanes, width - column)):
                            memory[at + (column + lane) * across + phase] = line[result + lane]

    return numba.njit(nogil=True, error_model="numpy")(kernel)


def _of_floats(lanes: int) -> tuple[Callable, Callable]:
    """Compiles how a vector of a plane is read as rows of one channel, and written."""

    def widened(memory, at, up):
        return simd.load(memory, at, lanes, 1)

    def narrowed(total, cut):
        return total

    return inlined(widened), inlined(narrowed)


def _of_words(lanes: int) -> tuple[Callable, Callable]:
    """The same for words: a row of int32 for each channel, times 2**up; rounded to 2**-cut of it."""
    zero = WORDS.zero

    def widened(memory, at, up):
        return words.widen(simd.xor(simd.load(memory, at, lanes, 1), zero), 1, up)

    def narrowed(total, cut):
        return simd.xor(words.narrow(words.round_right(total, cut), 1), zero)

    return inlined(widened), inlined(narrowed)


def pixels(format: Format) -> Callable:
    """Compiles a plane of an image whose pixels are channels of another one: depth to space, and a crop."""
    held = format.channels
    copy = _copy if format == FLOATS else _copy_channel

    def kernel(step, plane, memory):
        y, rows, columns = step.y + plane * step.y_plane, step.window_height, step.window_width
        clear(step, memory, y, 0)
        for image in range(step.images):
            for row in range(step.y_height):
                place, i = (row + step.top) // rows, (row + step.top) % rows
                source_row = step.x + (image * step.x_rows + place) * step.x_pitch
                target_row = y + (image * step.y_rows + row) * step.y_pitch
                for j in range(columns):
                    first = max(0, (step.left - j + columns - 1) // columns)
                    stop = (step.y_width + step.left - j + columns - 1) // columns
                    target = target_row + j - step.left
                    base = (i * columns + j) * step.channels + plane * held
                    if base % held == 0 and (plane + 1) * held <= step.channels:
                        _copy(memory, source_row + base // held * step.x_plane, target, columns, first, stop, 0, 0)
                        continue
                    for channel in range(min(held, step.channels - plane * held)):
                        source = source_row + (base + channel) // held * step.x_plane
                        copy(memory, source, target, columns, first, stop, (base + channel) % held, channel)

    return numba.njit(nogil=True, error_model="numpy")(kernel)


@numba.njit(nogil=True)
def _copy(memory, source, target, columns, first, stop, taken, channel):
    """Elements [first, stop) from `source`, `columns` apart from `target`."""
    for column in range(first, stop):
        memory[target + column * columns] = memory[source + column]


@numba.njit(nogil=True)
def _copy_channel(memory, source, target, columns, first, stop, taken, channel):
    """The same for byte `taken` of words, to byte `channel` of words that hold a zero there."""
    for column in range(first, stop):
        byte = ((memory[source + column] >> np.int32(8 * taken)) & np.int32(255)) ^ np.int32(128)
        memory[target + column * columns] ^= np.int32(byte << np.int32(8 * channel))
