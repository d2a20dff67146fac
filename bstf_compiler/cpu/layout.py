"""How activations lie in memory: channel by channel, in rows of one pitch, with zeros around.

A convolution of stride 1 reads, for an output pixel, input pixels at constant distances. If input and output have rows
of the same pitch, that holds for the flat index too: a kernel position is an offset, whatever the row, and a vector of
pixels may run over the end of a row. What it computes there is thrown away, or zeroed where the next layer needs zeros.
Nothing is copied or gathered ("im2col").

Tensors that such operations join share a `Grid`: pitch, rows of an image, and margins. For int8 an element is a word of
four channels, so that a vector of pixels meets weights in dot products of four.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bstf_compiler.cpu.simd import Isa

# Planes start at multiples of so many elements: a cache line of float32.
ALIGNMENT = 16


@dataclass(frozen=True)
class Format:
    """What an element of memory is.

    Attributes:
        dtype: of the element.
        channels: that it holds: a plane stands for so many neighbouring ones.
        zero: the element that stands for zeros.
    """

    dtype: np.dtype
    channels: int
    zero: int

    def lanes(self, isa: Isa) -> int:
        """Elements of a vector."""
        return isa.lanes(self.dtype)


FLOATS = Format(np.dtype(np.float32), 1, 0)
# A word is four int8 values, each plus 128: `vpdpbusd` multiplies unsigned bytes by signed ones.
WORDS = Format(np.dtype(np.int32), 4, -0x7F7F7F80)


def round_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that isn't below `value`."""
    return -(-value // step) * step


@dataclass(frozen=True)
class Grid:
    """Rows that several tensors have in common.

    Attributes:
        pitch: elements from a row to the next.
        rows: rows from an image to the next.
        before: elements that a window may read before the first image.
        after: elements that a window may read after the last one.
    """

    pitch: int
    rows: int
    before: int
    after: int


@dataclass(frozen=True)
class Layout:
    """A tensor of several images on a grid.

    Pixel (n, y, x) of plane p is at `offset + p * plane + lead + (n * grid.rows + y) * grid.pitch + x`.

    Attributes:
        format: of its elements.
        grid: what it shares with others.
        images, height, width, channels: its shape.
        step: channels are stored in multiples of it; those beyond `channels` hold zeros.
        offset: of the first plane, in elements.
    """

    format: Format
    grid: Grid
    images: int
    height: int
    width: int
    channels: int
    step: int
    offset: int = 0

    @property
    def lead(self) -> int:
        """Zeros before the first image, so that it starts on a cache line."""
        return round_up(self.grid.before, ALIGNMENT)

    @property
    def length(self) -> int:
        """Elements from the first pixel to the last one, gaps included."""
        return ((self.images - 1) * self.grid.rows + self.height - 1) * self.grid.pitch + self.width

    def plane(self, vector: int) -> int:
        """Elements of a channel, for stores of whole vectors; an odd number of cache lines spreads them over sets."""
        lines = -(-(self.lead + round_up(self.length, vector) + self.grid.after) // ALIGNMENT)
        return (lines | 1) * ALIGNMENT

    @property
    def planes(self) -> int:
        """Planes of all channels, with those that fill up the last step."""
        return round_up(self.channels, self.step) // self.format.channels

    @property
    def used_bytes(self) -> int:
        """Bytes of the pixels, those of channels that fill up the last step among them; not the gaps."""
        return self.planes * self.images * self.height * self.width * self.format.dtype.itemsize
