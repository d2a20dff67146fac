"""Where the pixels of a tensor lie in the memory tiles.

The pixels of a row, one after the other, are cut evenly over the memory tiles, between two channel blocks of a pixel if
need be: no memory tile has more to give or to take than another. Where DMAs have limits, rows are cut between pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.isa import Access
from bstf_compiler.aie.layer import share
from bstf_compiler.aie.reach import BLOCK

Span = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """Of the pixels `columns` [start, stop) the channel blocks [start, stop), which the memory tile `tile` holds from
    byte `start` of its `pitch` bytes of each row on.
    """

    tile: int
    columns: Span
    blocks: Span
    start: int
    pitch: int


@lru_cache(maxsize=1 << 12)
def spans(width: int, blocks: int, device: DeviceSpec) -> tuple[tuple[int, int, int], ...]:
    """What each memory tile holds of a row of `width` pixels of so many channel blocks: (tile, start, stop) in blocks.
    Columns of cores have even shares, those that share a memory tile together.
    """
    grain = blocks if device.descriptors else 1
    found: dict[int, Span] = {}
    for column, (start, stop) in enumerate(share(width * blocks // grain, device.columns)):
        tile = device.activation_tiles[device.activation_tile(column)]
        found[tile] = found.get(tile, (start * grain,))[0], stop * grain
    return tuple((tile, *span) for tile, span in found.items())


@lru_cache(maxsize=1 << 12)
def parts(width: int, blocks: int, device: DeviceSpec) -> tuple[Part, ...]:
    """All memory tiles' parts of such a row: whole pixels, and what there is of a pixel before and behind them."""
    found = []
    for tile, start, stop in spans(width, blocks, device):
        at, pitch = start, (stop - start) * BLOCK
        while at < stop:
            column, first = divmod(at, blocks)
            whole = 0 if first else (stop - at) // blocks
            last = blocks if whole else min(blocks, first + stop - at)
            columns = column, column + max(1, whole)
            found.append(Part(tile, columns, (first, last), (at - start) * BLOCK, pitch))
            at += whole * blocks or last - first
    return tuple(found)


def row_bytes(width: int, blocks: int, device: DeviceSpec) -> int:
    """Bytes of such a row in the memory tile that has most of it."""
    return max(stop - start for _, start, stop in spans(width, blocks, device)) * BLOCK


@dataclass(frozen=True)
class Layout:
    """A tensor, or rows of it, in the memory tiles.

    `address`: of its first row in each of them; `row`: the image row that lies there; `pixel`: bytes from pixel to
    pixel; `first`: the tensor's first block in a pixel, which it shares with others; `parts`: of a row.
    """

    address: int
    row: int
    pixel: int
    first: int
    parts: tuple[Part, ...]

    def boxes(self, rows: Span, columns: Span, blocks: Span, advance: int = 0) -> Iterator[tuple[int, int, Access]]:
        """Where rows, columns and blocks [start, stop) of the tensor lie: first column, first block, and box of each
        part; in an iteration `advance` rows further down.
        """
        for part in self.parts:
            left, right = max(columns[0], part.columns[0]), min(columns[1], part.columns[1])
            low, high = max(blocks[0] + self.first, part.blocks[0]), min(blocks[1] + self.first, part.blocks[1])
            if left < right and low < high:
                inside = (left - part.columns[0]) * self.pixel + (low - part.blocks[0]) * BLOCK
                yield left, low - self.first, Access(
                    (f"m{part.tile}",),
                    self.address + (rows[0] - self.row) * part.pitch + part.start + inside,
                    (rows[1] - rows[0], right - left, (high - low) * BLOCK),
                    (part.pitch, self.pixel),
                    advance * part.pitch,
                )  # fmt: skip

    def under(self, columns: Span) -> Layout:
        """What has some of these columns."""
        met = (p for p in self.parts if max(columns[0], p.columns[0]) < min(columns[1], p.columns[1]))
        return replace(self, parts=tuple(met))

    def tiles(self, columns: Span) -> list[int]:
        """The memory tiles with some of these columns, in order."""
        return list(dict.fromkeys(part.tile for part in self.under(columns).parts))
