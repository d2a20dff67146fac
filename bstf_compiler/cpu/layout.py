"""How activations lie in memory: channel by channel, in rows of one pitch, with zeros around.

A convolution of stride 1 reads, for an output pixel, input pixels at constant distances. If input and output have rows
of the same pitch, that holds for the flat index too: a kernel position is an offset, whatever the row, and a vector of
pixels may run over the end of a row. What it computes there is thrown away, or zeroed where the next layer needs zeros.
Nothing is copied or gathered ("im2col").

Tensors that such operations join share a `Grid`: pitch, rows of an image, and margins.
"""

from __future__ import annotations

from dataclasses import dataclass

# Planes start at multiples of so many elements: a cache line of float32.
ALIGNMENT = 16


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

    Element (n, y, x, c) is at `offset + c * plane + lead + (n * grid.rows + y) * grid.pitch + x`.

    Attributes:
        grid: what it shares with others.
        images, height, width, channels: its shape.
        step: channels are stored in multiples of it; those beyond `channels` hold zeros.
        offset: of the first plane, in elements.
    """

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
        """Channels, with those that fill up the last step."""
        return round_up(self.channels, self.step)
