"""Steps that work plane by plane, on words of four int8 channels; see `bstf_compiler.cpu.kernels.planes`."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

from bstf_compiler.cpu import simd, words
from bstf_compiler.cpu.kernels.planes import clear, clear_around
from bstf_compiler.cpu.layout import WORDS
from bstf_compiler.cpu.simd import Isa

_CHANNELS, _ZERO = WORDS.channels, WORDS.zero


@numba.njit(nogil=True)
def load(step, first, last, images, memory, line):
    """Rows [first, last) of the images, on the input's grid: the formula of TensorFlow's FakeQuant, in float32."""
    width, channels, height = step.x_width, step.channels, step.x_height
    low, high, factor = np.float32(step.low), np.float32(step.high), np.float32(step.factor)
    planes = (channels + _CHANNELS - 1) // _CHANNELS
    for row in range(first, last):
        source, image = row * width * channels, row // height
        at = step.y + (image * step.y_rows + row % height) * step.y_pitch
        for place in range(width * channels):
            above = min(max(images[source + place], low), high) - low
            line[place] = np.int32(np.floor(above * factor + np.float32(0.5))) ^ 128
        for plane in range(planes):
            start, used = plane * _CHANNELS, min(_CHANNELS, channels - plane * _CHANNELS)
            for column in range(width):
                word = np.int32(_ZERO)
                for channel in range(used):
                    word ^= np.int32(line[column * channels + start + channel] << (8 * channel))
                memory[at + plane * step.y_plane + column] = word
    if first == 0:
        clear_around(step, planes, memory)


def elementwise(isa: Isa) -> Callable:
    """Compiles a plane of clamp(round((x * 2**up + other * 2**other_up) * 2**-cut))."""
    lanes = WORDS.lanes(isa)

    def kernel(step, plane, memory, biases, masks):
        x, y, other = (
            step.x + plane * step.x_plane,
            step.y + plane * step.y_plane,
            step.other + plane * step.other_plane,
        )
        for place in range(0, step.length, lanes):
            total = words.widen(simd.xor(simd.load(memory, x + place, lanes, 1), _ZERO), 1, step.up)
            if step.other >= 0:
                added = simd.xor(simd.load(memory, other + place, lanes, 1), _ZERO)
                total = simd.add(total, words.widen(added, 1, step.other_up))
            result = words.narrow(words.round_right(total, step.cut), 1)
            result = words.clamp(result, np.int64(step.low), np.int64(step.high))
            if step.mask >= 0:
                result = simd.keep(result, simd.load(masks, step.mask + place, lanes, 1))
            simd.store(simd.xor(result, _ZERO), memory, y + place, 0)
        if step.mask >= 0:
            clear(step, memory, y, step.length)

    return numba.njit(nogil=True)(kernel)


@numba.njit(nogil=True)
def mean_pool(step, plane, memory, biases, line):
    """A plane of sums over a window, each times the factor of its pixel, rounded."""
    octets, x, y = memory.view(np.uint8), step.x + plane * step.x_plane, step.y + plane * step.y_plane
    bytes_of_row = _CHANNELS * step.x_width
    half, low, high = (1 << step.cut) >> 1, np.int64(step.low), np.int64(step.high)
    clear(step, memory, y, 0)
    for image in range(step.images):
        for row in range(step.y_height):
            top = row * step.down - step.top
            first, last = max(0, top), min(step.x_height, top + step.window_height)
            line[:bytes_of_row] = 0
            for source_row in range(first, last):
                source = _CHANNELS * (x + (image * step.x_rows + source_row) * step.x_pitch)
                for place in range(bytes_of_row):
                    line[place] += np.int32(octets[source + place]) - np.int32(128)
            at = y + (image * step.y_rows + row) * step.y_pitch
            for column in range(step.y_width):
                left = column * step.across - step.left
                start, stop = max(0, left), min(step.x_width, left + step.window_width)
                factor = np.int64(biases[step.scale + row * step.y_width + column])
                for channel in range(_CHANNELS):
                    total = 0
                    for met in range(start, stop):
                        total += line[_CHANNELS * met + channel]
                    value = (((total * factor) << step.up) + half) >> step.cut
                    octets[_CHANNELS * (at + column) + channel] = min(max(value, low), high) + 128
