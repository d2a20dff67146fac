"""Boxes of bytes that instructions read and write: of tensors in DDR, and of ring slots in cores and memory tiles."""

from __future__ import annotations

from dataclasses import replace

from bstf_compiler.aie.isa import Access
from bstf_compiler.aie.memory import Place
from bstf_compiler.aie.reach import BLOCK
from bstf_compiler.aie.tiling import Ring


def ddr_box(place: Place, rows: tuple[int, int], columns: tuple[int, int]) -> Access:
    """Rows and columns [first, last) of a tensor in DDR."""
    pitch = place.shape[1] * place.pixel
    address = place.address + rows[0] * pitch + columns[0] * place.pixel
    sizes = (rows[1] - rows[0], columns[1] - columns[0], place.length)
    return Access(("ddr",), address, sizes, (pitch, place.pixel))


def within(box: Access, column: int, block: int, sizes: tuple[int, int, int]) -> Access:
    """A smaller box of some `sizes` in a box, its first column and channel block."""
    return replace(box, address=box.address + column * box.strides[1] + block * BLOCK, sizes=sizes)


def slot(tiles: tuple[str, ...], ring: Ring, size: int, use: int, moves_on: bool = True) -> Access:
    """A ring's slot for the `use`-th chunk; `moves_on`: iterations walk the ring."""
    first = (ring.first + use) % ring.slots
    if not moves_on or ring.slots == 1:
        return Access(tiles, ring.address + first * ring.bytes, (1, 1, size))
    return Access(tiles, ring.address, (1, 1, size), advance=ring.bytes, ring=ring.slots, first=first)


def slot_of_round(ring: Ring, k: int, sizes: tuple[int, int, int]) -> Access:
    """The slot of a buffer that keeps one for each round."""
    return Access((), ring.address + k * ring.bytes, sizes, (sizes[2], sizes[2]))


def tile_box(tiles: tuple[str, ...], ring: Ring, shape: tuple[int, int, int], use: int) -> Access:
    """A ring's slots from the `use`-th on, each holding a tile of `shape`."""
    _, columns, length = shape
    return Access(
        tiles, ring.address, shape, (columns * length, length), ring.bytes, ring.slots, use % ring.slots
    )  # fmt: skip
