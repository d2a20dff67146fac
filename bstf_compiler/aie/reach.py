"""What a layer reads: which pixels and channel blocks of an input lie under some of its output's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

BLOCK = 8
"""Channels of a block, in and out: the native multiply of the cores is 4x8x8."""


def blocks_of(channels: int) -> int:
    """Number of blocks that hold `channels` channels."""
    return -(-channels // BLOCK)


@dataclass(frozen=True)
class Sliding:
    """One axis under a window: `extent` pixels, `stride` from one to the next, `before` pixels of padding at the start
    of `size` pixels. A stride of 0 reads the same pixels for every output.
    """

    size: int
    stride: int = 1
    extent: int = 1
    before: int = 0

    def reach(self, first: int, last: int) -> tuple[int, int, int]:
        """Input pixels [start, stop) under output pixels [first, last), and the pixels of padding before them."""
        virtual = first * self.stride - self.before
        start = min(max(virtual, 0), self.size)
        stop = min(max((last - 1) * self.stride - self.before + self.extent, start), self.size)
        return start, stop, start - virtual

    def most(self, length: int) -> int:
        """The most input pixels under `length` output pixels."""
        return min((length - 1) * self.stride + self.extent, self.size)


@dataclass(frozen=True)
class Scaled:
    """One axis with `factor` output pixels from each of `size` input pixels, the first `crop` of them left out.
    `blends`: an output pixel is made of the two whose centres it lies between.
    """

    size: int
    factor: int
    crop: int = 0
    blends: bool = False

    def reach(self, first: int, last: int) -> tuple[int, int, int]:
        """Input pixels [start, stop) under output pixels [first, last), and how many pixels of what they all make lie
        before `first`.
        """
        first, last = first + self.crop, last + self.crop
        if self.blends:  # pixel i lies at (i + 1/2) / factor - 1/2 of the input
            start = max((2 * first + 1 - self.factor) // (2 * self.factor), 0)
            stop = min((2 * last - 1 - self.factor) // (2 * self.factor) + 2, self.size)
        else:
            start, stop = first // self.factor, -(-last // self.factor)
        return start, stop, first - start * self.factor

    def most(self, length: int) -> int:
        """The most input pixels under `length` output pixels."""
        return min((length + self.factor - 2) // self.factor + 1 + self.blends, self.size)


@dataclass(frozen=True)
class Source:
    """An input of a layer: its tensor, how its `rows` and `columns` are read, its true `channels`, and which of them.

    Output channel i, of `spread` from each input channel, reads channel i // spread - offset; `every`: it reads all.
    """

    tensor: str
    rows: Sliding | Scaled
    columns: Sliding | Scaled
    channels: int
    spread: int = 1
    offset: int = 0
    every: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns and channel blocks of the tensor."""
        return self.rows.size, self.columns.size, blocks_of(self.channels)

    @cached_property
    def broadcast(self) -> bool:
        """Whether its one pixel serves all of the output's."""
        return self.rows == self.columns == Sliding(1, stride=0)

    def blocks(self, first: int, last: int) -> tuple[int, int]:
        """Input blocks [start, stop) under output blocks [first, last)."""
        if self.every:
            return 0, blocks_of(self.channels)
        low = max(BLOCK * first // self.spread - self.offset, 0)
        high = min(-(-BLOCK * last // self.spread) - self.offset, self.channels)
        return (low // BLOCK, blocks_of(high)) if low < high else (0, 0)
