"""Which output pixels each column of cores computes, where its cores reach all memory tiles.

Usually each has a part of the image's width. Where windows reach far to the sides, or the width doesn't divide well,
parts of the height may be better, or a grid of both; what divides into no even parts may be left over, and shared in
the other direction. What works channel by channel may also give columns of cores other channels of the same pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bstf_compiler.aie.layer import share

Region = tuple[tuple[int, int], tuple[int, int]]
"""Output rows [top, bottom) and columns [left, right)."""


class Split(NamedTuple):
    """An image in `across` x `down` parts; `shared`: even ones, all in a row or in a column, and what they leave over
    is cut in the other direction. If there are fewer parts than columns of cores, those of a part have other channels.
    """

    across: int
    down: int = 1
    shared: bool = False

    @property
    def parts(self) -> int:
        """Number of parts."""
        return self.across * self.down

    def place(self, column: int, columns: int) -> tuple[int, int]:
        """The part's place across, and which column of cores it is of those with that place, which are neighbours."""
        return divmod(column, columns // self.across)

    def channel_part(self, column: int, columns: int) -> int:
        """Which of the parts of the channels a column of cores has."""
        return self.place(column, columns)[1] // self.down

    def regions(self, rows: int, width: int, columns: int) -> list[list[Region]]:
        """What each of `columns` of cores computes of an image; those of the first one are the largest."""
        places = [self.place(column, columns) for column in range(columns)]
        if not self.shared:
            spans, heights = share(width, self.across), share(rows, self.down)
            return [[(heights[place % self.down], spans[x])] for x, place in places]
        even = (width if self.down == 1 else rows) // columns
        own = [(c * even, (c + 1) * even) for c in range(columns)]
        if self.down == 1:
            rest = even * columns, width
            return [[((0, rows), span), (part, rest)] for span, part in zip(own, share(rows, columns))]
        rest = even * columns, rows
        return [[(span, (0, width)), (rest, part)] for span, part in zip(own, share(width, columns))]


def splits(rows: int, width: int, columns: int, channels: bool) -> Iterator[Split]:
    """The ways to split an image, by width alone first; `channels`: those with parts of the channels too."""
    for across in _divisors(columns):
        for down in _divisors(columns // across):
            if channels or across * down == columns:
                yield Split(across, down)
    if width % columns:
        yield Split(columns, 1, shared=True)
    if rows % columns and columns > 1:
        yield Split(1, columns, shared=True)


def _divisors(number: int) -> list[int]:
    """Largest first."""
    return [n for n in range(number, 0, -1) if number % n == 0]
