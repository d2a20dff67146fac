"""Steps that only move values: zeros around images, and splits."""

from __future__ import annotations

from collections.abc import Callable

import numba

from bstf_compiler.cpu import simd, words

# Elements of a vector, for every instruction set (LLVM cuts it where it is too wide); and for rows that are shorter.
_LANES, _FEW_LANES = 16, 4


def _take_every_other(lanes: int) -> Callable:
    """Compiles the copy of elements source + 2 * column to at + column; the last vector ends with the last column."""

    def take(memory, source, at, start, stop):
        for column in range(start, stop, lanes):
            place = min(column, stop - lanes)
            simd.store(words.load_every(memory, source + 2 * place, 2, lanes), memory, at + place, 0)

    return numba.njit(nogil=True)(take)


_every_other, _every_other_few = _take_every_other(_LANES), _take_every_other(_FEW_LANES)


@numba.njit(nogil=True)
def fill(memory, first, last, value):
    """One value from element `first` to before `last`; unlike a slice it takes pointers, too."""
    for place in range(first, last):
        memory[place] = value


@numba.njit(nogil=True)
def clear(step, memory, y, first):
    """Zeros before the first pixel of a plane of the output and from element `first` on."""
    fill(memory, y - step.lead, y, step.zero)
    fill(memory, y + first, y - step.lead + step.y_plane, step.zero)


@numba.njit(nogil=True)
def clear_around(step, used, memory):
    """Zeros around all images of the output and in planes beyond the `used` ones."""
    for plane in range(step.planes):
        y = step.y + plane * step.y_plane
        if plane >= used:
            clear(step, memory, y, 0)
            continue
        clear(step, memory, y, step.length)
        for image in range(step.images):
            for row in range(step.y_rows):
                start = step.y_width if row < step.y_height else 0
                at = (image * step.y_rows + row) * step.y_pitch
                fill(memory, y + min(step.length, at + start), y + min(step.length, at + step.y_pitch), step.zero)


@numba.njit(nogil=True)
def split(step, plane, memory):
    """One plane of one image of the grid."""
    source_plane, place = plane % step.channels, plane // step.channels
    x, y = step.x + source_plane * step.x_plane, step.y + plane * step.y_plane
    first_row, first_column = place // step.window_width - step.top, place % step.window_width - step.left
    clear(step, memory, y, 0)
    start = max(0, -(first_column // step.across))
    stop = min(step.y_width, (step.x_width - first_column + step.across - 1) // step.across)
    for image in range(step.images):
        for row in range(step.y_height):
            source_row = first_row + row * step.down
            if source_row < 0 or source_row >= step.x_height:
                continue
            at = y + (image * step.y_rows + row) * step.y_pitch
            source = x + (image * step.x_rows + source_row) * step.x_pitch + first_column
            if step.across == 2 and stop - start >= _LANES:
                _every_other(memory, source, at, start, stop)
            elif step.across == 2 and stop - start >= _FEW_LANES:
                _every_other_few(memory, source, at, start, stop)
            else:
                for column in range(start, stop):
                    memory[at + column] = memory[source + column * step.across]
