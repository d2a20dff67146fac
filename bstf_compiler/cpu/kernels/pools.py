"""Maxima of words, maxima and means of float32: a window is reduced down its columns, then along its row."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

from bstf_compiler.cpu import simd, words
from bstf_compiler.cpu.kernels.planes import clear, fill
from bstf_compiler.cpu.kernels.step import MAX_POOL, MEAN_POOL
from bstf_compiler.cpu.layout import FLOATS, WORDS, Format
from bstf_compiler.cpu.simd import Isa

# What never is the largest; zero, as which pixels of the padding may count.
_LEAST = {FLOATS: np.array([-np.inf, 0], np.float32), WORDS: np.array([0, WORDS.zero], np.int32)}


def pool(isa: Isa, format: Format, maximum: bool) -> Callable:
    """Compiles a plane of maxima or, of float32, of means over the pixels of a window that aren't padding."""
    lanes, outside = format.lanes(isa), _LEAST[format]
    join = simd.add if not maximum else simd.largest if format == FLOATS else words.largest

    def kernel(step, plane, memory, line):
        x, y = step.x + plane * step.x_plane, step.y + plane * step.y_plane
        padding = 0 if step.kind == MAX_POOL else 1
        nothing = 1 if step.kind == MEAN_POOL else 0
        right = step.left + step.x_width
        end = max(right, (step.y_width - 1) * step.across + step.window_width)
        result = end + 2 * lanes
        counts = result + step.y_width + lanes  # pixels of the image in the columns of a window
        for column in range(0 if maximum else step.y_width):
            left = column * step.across - step.left
            line[counts + column] = min(step.x_width, left + step.window_width) - max(0, left)
        fill(line, 0, step.left, outside[padding])
        clear(step, memory, y, 0)
        for image in range(step.images):
            for row in range(step.y_height):
                top = row * step.down - step.top
                first, last = max(0, top), min(step.x_height, top + step.window_height)
                start = padding if last - first < step.window_height else nothing
                for column in range(0, step.x_width, lanes):
                    values = simd.rows_of(outside, start, lanes, 1, 1)
                    for source_row in range(first, last):
                        source = x + (image * step.x_rows + source_row) * step.x_pitch + column
                        values = join(values, simd.load(memory, source, lanes, 1))
                    simd.store(values, line, step.left + column, 0)
                fill(line, right, end, outside[padding])
                for column in range(0, step.y_width, lanes):
                    values = simd.rows_of(outside, nothing, lanes, 1, 1)
                    for tap in range(step.window_width):
                        if step.across == 1:
                            met = simd.load(line, tap + column, lanes, 1)
                        elif step.across == 2:
                            met = words.load_every(line, tap + 2 * column, 2, lanes)
                        else:
                            met = words.load_strided(line, tap + step.across * column, step.across, lanes)
                        values = join(values, met)
                    simd.store(values, line, result + column, 0)
                if not maximum:
                    rows = np.float32(last - first)
                    for column in range(step.y_width):
                        line[result + column] /= rows * line[counts + column]
                at = y + (image * step.y_rows + row) * step.y_pitch
                for column in range(step.y_width):
                    memory[at + column] = line[result + column]

    return numba.njit(nogil=True)(kernel)
