"""Steps that make a pixel of the pixels in its place: of one tensor, or of two."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

from bstf_compiler.cpu import simd, words
from bstf_compiler.cpu.compiled import inlined
from bstf_compiler.cpu.kernels.planes import clear
from bstf_compiler.cpu.kernels.step import DIFFERENCE, PRODUCT
from bstf_compiler.cpu.layout import FLOATS, WORDS, Format
from bstf_compiler.cpu.simd import Isa


def elementwise(isa: Isa, format: Format) -> Callable:
    """Compiles a plane of clamp(x * scale + shift), joined with another tensor before the clamp.

    Where the other tensor has one pixel for a whole image, it meets all pixels of it.
    """
    lanes = format.lanes(isa)
    compute, stored = (_floats if format == FLOATS else _words)(lanes)

    def kernel(step, plane, memory, biases, masks):
        x, y = step.x + plane * step.x_plane, step.y + plane * step.y_plane
        other = step.other + plane * step.other_plane
        parts = step.images if step.other_image else 1
        for image in range(parts):
            first = image * step.y_rows * step.y_pitch
            last = step.length if image == parts - 1 else first + step.y_rows * step.y_pitch
            for place in range(first, last, lanes):  # where it runs over the end, the next image is written after it
                if step.other < 0:
                    met = simd.zeros(memory, lanes, 1, 1)
                elif step.other_image:
                    met = simd.rows_of(memory, other + image * step.other_image, lanes, 1, 1)
                else:
                    met = simd.load(memory, other + place, lanes, 1)
                result = compute(step, plane, biases, simd.load(memory, x + place, lanes, 1), met)
                if step.mask >= 0:
                    result = simd.keep(result, simd.load(masks, step.mask + place, lanes, 1))
                simd.store(stored(result), memory, y + place, 0)
        if step.mask >= 0:
            clear(step, memory, y, step.length)

    return numba.njit(nogil=True, error_model="numpy")(kernel)


@inlined
def _join(sum_: tuple, other: tuple, how: int) -> tuple:
    if how == PRODUCT:
        return simd.multiply(sum_, other)
    return simd.subtract(sum_, other) if how == DIFFERENCE else simd.add(sum_, other)


def _floats(lanes: int) -> tuple[Callable, Callable]:
    """Compiles what becomes of a vector, and the form in which it is stored."""

    def compute(step, plane, biases, values, met):
        if step.scale >= 0:
            values = simd.multiply(values, simd.rows_of(biases, step.scale + 2 * plane, lanes, 1, 1))
            values = simd.add(values, simd.rows_of(biases, step.scale + 2 * plane + 1, lanes, 1, 1))
        if step.other >= 0:
            values = _join(values, met, step.join)
        return simd.clamp(values, np.float32(step.low), np.float32(step.high))

    def stored(values):
        return values

    return inlined(compute), inlined(stored)


def _words(lanes: int) -> tuple[Callable, Callable]:
    """The same for words: clamp(round((x * 2**up joined with other * 2**other_up) * 2**-cut))."""
    zero = WORDS.zero

    def compute(step, plane, biases, values, met):
        total = words.widen(simd.xor(values, zero), 1, step.up)
        if step.other >= 0:
            total = _join(total, words.widen(simd.xor(met, zero), 1, step.other_up), step.join)
        result = words.narrow(words.round_right(total, step.cut), 1)
        return words.clamp(result, np.int64(step.low), np.int64(step.high))

    def stored(values):
        return simd.xor(values, zero)

    return inlined(compute), inlined(stored)
