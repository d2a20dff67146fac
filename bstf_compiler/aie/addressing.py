"""Boxes of bytes as what a DMA's address generator can walk: sizes and steps in words, split where fields end.

A descriptor's generator counts through dimensions, innermost first, each `size` words at a distance of `step`; the
outermost one has no wrap of its own, for the descriptor's length ends it (AMD UG1603, tiling parameters and buffer
descriptors; XD100, buffer descriptor parameters).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod

from bstf_compiler.aie.device import DescriptorLimits

WORD = 4
"""Bytes of a word: addresses, lengths and steps of every DMA are multiples of it (AM020, AIE-ML array interface)."""

Dimensions = tuple[tuple[int, int], ...]
"""(size, step) in words, innermost first."""


@lru_cache(maxsize=1 << 16)
def patterns(
    sizes: tuple[int, int, int], strides: tuple[int, int], limits: DescriptorLimits
) -> tuple[tuple[int, Dimensions], ...]:
    """The fewest walks that visit a box in order: contiguous dimensions joined, then split by rows, then by pixels.

    Args:
        sizes: rows, pixels and bytes of the box, none of them zero, bytes a multiple of four.
        strides: bytes from row to row and from pixel to pixel, multiples of four.
        limits: the fields of the descriptors.

    Returns:
        For each walk its first byte, counted from the box's, and its dimensions.

    Example:
        >>> patterns((2, 14, 64), (896, 64), DeviceSpec.load("npu1").descriptors.core)
        ((0, ((448, 1),)),)
    """
    rows, pixels, length = sizes
    steps = (1, strides[1] // WORD, strides[0] // WORD)
    joined: list[tuple[int, int]] = []
    for size, step in zip((length // WORD, pixels, rows), steps):
        if joined and step == prod(joined[-1]):
            joined[-1] = (joined[-1][0] * size, joined[-1][1])
        elif size > 1 or not joined:
            joined.append((size, step))
    return tuple((WORD * first, walk) for first, walk in _split(tuple(joined), limits))


def _split(dimensions: Dimensions, limits: DescriptorLimits) -> Iterator[tuple[int, Dimensions]]:
    """Walks that fit the fields, each with its first word."""
    if (walk := _fitted(dimensions, limits)) is not None:
        yield 0, walk
        return
    *inner, (size, step) = dimensions
    most = limits.length_words // prod(n for n, _ in inner)  # as many of the outermost at a time as the length allows
    if 1 < most < size and _fitted((*inner, (most, step)), limits) is not None:
        for start in range(0, size, most):
            count = min(most, size - start)
            yield from ((start * step + at, walk) for at, walk in _split((*inner, (count, step)), limits))
        return
    rest = tuple(inner) or ((1, 1),)
    for index in range(size):
        yield from ((index * step + at, walk) for at, walk in _split(rest, limits))


def _fitted(dimensions: Dimensions, limits: DescriptorLimits) -> Dimensions | None:
    """Dimensions whose sizes fit their wraps, those too long made of two, or None if there is no such walk."""
    if prod(size for size, _ in dimensions) > limits.length_words:
        return None
    fitted: list[tuple[int, int]] = []
    for place, (size, step) in enumerate(dimensions):
        outermost = place == len(dimensions) - 1
        while not outermost and len(fitted) < len(limits.wraps) and size > limits.wraps[len(fitted)]:
            wrap = limits.wraps[len(fitted)]
            part = max(n for n in range(1, wrap + 1) if size % n == 0)
            if part == 1:
                return None
            fitted.append((part, step))
            size, step = size // part, part * step
        fitted.append((size, step))
    if len(fitted) > limits.dimensions or not all(0 < step <= limits.step_words for _, step in fitted):
        return None
    return tuple(fitted)
