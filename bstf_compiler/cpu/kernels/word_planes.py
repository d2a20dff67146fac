"""Steps that work plane by plane, on words of four int8 channels; see `bstf_compiler.cpu.kernels.planes`."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

from bstf_compiler.cpu import simd, words
from bstf_compiler.cpu.compiled import inlined
from bstf_compiler.cpu.kernels.planes import clear, fill
from bstf_compiler.cpu.layout import WORDS
from bstf_compiler.cpu.simd import Isa

_CHANNELS, _ZERO = WORDS.channels, WORDS.zero


def mean_pool(isa: Isa) -> Callable:
    """Compiles a plane of sums over a window, each times the factor of its pixel, rounded."""
    lanes = WORDS.lanes(isa)

    def load_two(line, at, step, stride):
        return words.load_strided(line, at, step, lanes) + words.load_strided(line, at + stride, step, lanes)

    load_two = inlined(load_two)

    def kernel(step, plane, memory, biases, line):
        x, y = step.x + plane * step.x_plane, step.y + plane * step.y_plane
        right = step.left + step.x_width
        end = max(right, (step.y_width - 1) * step.across + step.window_width)
        stride = end + lanes  # of `line`: sums down the columns, channel by channel, padded; then results
        result = _CHANNELS * stride
        fill(line, 0, result, 0)
        clear(step, memory, y, 0)
        for image in range(step.images):
            for row in range(step.y_height):
                top = row * step.down - step.top
                first, last = max(0, top), min(step.x_height, top + step.window_height)
                for column in range(0, step.x_width, lanes):
                    sums = simd.zeros(memory, lanes, _CHANNELS, 1)
                    for source_row in range(first, last):
                        source = x + (image * step.x_rows + source_row) * step.x_pitch + column
                        pixels = simd.xor(simd.load(memory, source, lanes, 1), _ZERO)
                        sums = simd.add(sums, words.widen(pixels, 1, 0))
                    simd.store(sums, line, step.left + column, stride)
                for channel in range(_CHANNELS):  # where the last vectors ran over the end
                    fill(line, channel * stride + right, (channel + 1) * stride, 0)
                for column in range(0, step.y_width, lanes):
                    totals = simd.zeros(memory, lanes, _CHANNELS, 1)
                    for tap in range(step.window_width):
                        at = tap + step.across * column
                        if step.across == 1:
                            totals = simd.add(totals, simd.load_tile(line, at, stride, lanes, _CHANNELS, 1))
                        else:
                            low = load_two(line, at, step.across, stride)
                            high = load_two(line, at + 2 * stride, step.across, stride)
                            totals = simd.add(totals, low + high)
                    factors = simd.load(biases, step.scale + row * step.y_width + column, lanes, 1)
                    totals = words.round_right(simd.multiply(totals, factors), step.cut)
                    means = words.clamp(words.narrow(totals, 1), np.int64(step.low), np.int64(step.high))
                    simd.store(simd.xor(means, _ZERO), line, result + column, 0)
                at = y + (image * step.y_rows + row) * step.y_pitch
                for column in range(step.y_width):
                    memory[at + column] = line[result + column]

    return numba.njit(nogil=True)(kernel)
