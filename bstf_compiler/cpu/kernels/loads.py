"""Images pixel by pixel, in float32, to channels: as they are, or as integers on the grid of the network's input.

The grid's formula is that of TensorFlow's FakeQuant, in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

from bstf_compiler.cpu import simd, words
from bstf_compiler.cpu.compiled import inlined
from bstf_compiler.cpu.kernels.planes import clear_around
from bstf_compiler.cpu.layout import FLOATS, WORDS, Format

# Pixels of a vector, for every instruction set: LLVM cuts it where it is too wide.
_LANES = 16
_CHANNELS, _ZERO = WORDS.channels, WORDS.zero


def load(format: Format) -> Callable:
    """Compiles a task of LOAD: the rows [first, last) of the images."""
    grey, colour = (_row_by_vectors(format, channels) for channels in (1, 3))
    any_row = _float_row if format == FLOATS else _word_row
    of_plane = format.channels

    def kernel(step, first, last, images, memory, biases, line):
        pixels, activations = simd.pointer(images), simd.pointer(memory)
        factors, scratch = simd.pointer(biases.view(np.float32)), simd.pointer(line)
        for row in range(first, last):
            source = step.image + row * step.x_width * step.channels
            at = step.y + (row // step.x_height * step.y_rows + row % step.x_height) * step.y_pitch
            if step.x_width < _LANES or step.channels not in (1, 3):
                any_row(step, pixels, source, activations, at, factors, scratch)
            elif step.channels == 3:
                colour(step, pixels, source, activations, at, factors)
            else:
                grey(step, pixels, source, activations, at, factors)
        if first == 0:
            clear_around(step, (step.channels + of_plane - 1) // of_plane, activations)

    return numba.njit(nogil=True)(kernel)


def _row_by_vectors(format: Format, channels: int) -> Callable:
    """Compiles the copy of a row of pixels of so many channels; the last vector ends with the row."""
    stored = _as_floats if format == FLOATS else _as_words(channels)

    def copy(step, images, source, memory, at, factors):
        for column in range(0, step.x_width, _LANES):
            place = min(column, step.x_width - _LANES)
            pixels = words.load_apart(images, source + channels * place, channels, _LANES)
            simd.store(stored(step, factors, pixels), memory, at + place, step.y_plane)

    return numba.njit(nogil=True)(copy)


@inlined
def _as_floats(step, factors, pixels):
    return pixels


def _as_words(channels: int) -> Callable:
    numbers = 2 * channels  # a factor and a summand for each

    def stored(step, factors, pixels):
        if step.scale >= 0:
            pairs = simd.rows_of(factors, step.scale, _LANES, numbers, 1)
            pixels = simd.add(simd.multiply(pixels, pairs[::2]), pairs[1::2])
        return words.of_floats(pixels, np.float32(step.low), np.float32(step.high), np.float32(step.factor))

    return inlined(stored)


@numba.njit(nogil=True)
def _float_row(step, images, source, memory, at, factors, line):
    for channel in range(step.channels):
        for column in range(step.x_width):
            memory[at + channel * step.y_plane + column] = images[source + column * step.channels + channel]


@numba.njit(nogil=True)
def _word_row(step, images, source, memory, at, factors, line):
    width, channels = step.x_width, step.channels
    low, high, factor = np.float32(step.low), np.float32(step.high), np.float32(step.factor)
    for place in range(width * channels):
        value = images[source + place]
        if step.scale >= 0:
            pair = step.scale + 2 * (place % channels)
            value = value * factors[pair] + factors[pair + 1]
        above = min(max(value, low), high) - low
        line[place] = np.int32(np.floor(above * factor + np.float32(0.5))) ^ 128
    for plane in range((channels + _CHANNELS - 1) // _CHANNELS):
        start, used = plane * _CHANNELS, min(_CHANNELS, channels - plane * _CHANNELS)
        for column in range(width):
            word = np.int32(_ZERO)
            for channel in range(used):
                word ^= np.int32(line[column * channels + start + channel] << (8 * channel))
            memory[at + plane * step.y_plane + column] = word
