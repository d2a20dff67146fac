"""The shape of the register tile, and block-sparse weights in the order in which tiles read them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bstf_compiler import bsr
from bstf_compiler.cpu.simd import Isa

# A panel of the dense operand is read once per column of tiles: a part of a common level-2 cache holds it.
PANEL_BYTES = 2**18

# Vectors of a tile by (registers, rows of the tile), such that sums, operands and one weight fit the registers.
_FLOAT_VECTORS = {(32, 8): 3, (32, 4): 6, (32, 2): 8, (32, 1): 8, (16, 4): 3, (16, 2): 4, (16, 1): 8}
# Widening bytes to int16 takes two registers an operand.
_WIDENED_VECTORS = {(32, 8): 2, (32, 4): 4, (32, 2): 6, (32, 1): 8, (16, 4): 2, (16, 2): 3, (16, 1): 4}


@dataclass(frozen=True)
class Tile:
    """How one inner loop computes: `columns` columns of the result times `vectors` vectors of its rows.

    Attributes:
        isa: instruction set.
        dtype: of the weights.
        columns: columns of a tile; divides the block's.
        depth: rows of the weights that one step of the inner loop takes; divides the block's.
        vectors: vectors of rows of the result.
    """

    isa: Isa
    dtype: np.dtype
    columns: int
    depth: int
    vectors: int

    @classmethod
    def of(cls, block: tuple[int, int], dtype: np.dtype, isa: Isa) -> Tile:
        """The tile for a block shape. For int8 the block's rows are a multiple of 4."""
        columns = math.gcd(block[1], isa.registers // 4)
        widened = np.dtype(dtype) == np.int8 and not isa.dot
        vectors = (_WIDENED_VECTORS if widened else _FLOAT_VECTORS)[isa.registers, columns]
        return cls(isa, np.dtype(dtype), columns, math.gcd(block[0], 8), vectors)

    @property
    def unit(self) -> int:
        """Neighbouring values of a row of the dense operand that stay together in a panel: the bytes of an int32."""
        return 4 if self.dtype == np.int8 else 1

    @property
    def word(self) -> np.dtype:
        """The type of a panel's elements, each `unit` values."""
        return np.dtype(np.int32) if self.dtype == np.int8 else self.dtype

    @property
    def lanes(self) -> int:
        """Elements of a vector."""
        return self.isa.lanes(self.word)

    @property
    def width(self) -> int:
        """Rows of the dense operand in a panel."""
        return self.vectors * self.lanes

    @property
    def chunk(self) -> int:
        """Rows of the weights after which a panel is full. int8 sums stay in registers to the end."""
        if self.dtype == np.int8:
            return 2**16
        return max(self.depth, PANEL_BYTES // (self.width * self.dtype.itemsize) // self.depth * self.depth)


@dataclass(frozen=True)
class TiledWeights:
    """Block-sparse weights (K, N) as the kernels stream them.

    Entry e stands for `depth` rows times `columns` columns; entries are sorted by chunk of rows, column tile, row.

    Attributes:
        tile: the tile they are cut for.
        shape: (K, N).
        starts: entries of (chunk c, column tile t) are starts[c * tiles + t] to the next of `starts`.
        offsets: for each entry, the first vector row of a panel that it takes (int32).
        values: flat; `depth x columns` each entry, in the kernel's form.
        sums: for int8, the sum of each column, zero-padded to whole tiles (int64).
    """

    tile: Tile
    shape: tuple[int, int]
    starts: np.ndarray
    offsets: np.ndarray
    values: np.ndarray
    sums: np.ndarray

    @property
    def tiles(self) -> int:
        """Column tiles."""
        return -(-self.shape[1] // self.tile.columns)

    @property
    def depth(self) -> int:
        """K, rounded up to whole entries."""
        return -(-self.shape[0] // self.tile.depth) * self.tile.depth


def cut(weights: bsr.BlockColumns, isa: Isa, tile: Tile | None = None) -> TiledWeights:
    """Block columns of a (1, 1, K, N) kernel, cut for a tile; None: that of `Tile.of` for the instruction set."""
    _, _, rows, columns = weights.shape
    dtype = weights.blocks.dtype
    bi, bo = weights.blocks.shape[-2:]
    if dtype == np.int8 and bi % 4:  # a dot product takes four values of a column
        return cut(bsr.pack(bsr.unpack(weights), (math.lcm(bi, 4), bo)), isa)
    tile = tile or Tile.of((bi, bo), dtype, isa)
    tiles, chunks = -(-columns // tile.columns), max(1, -(-rows // tile.chunk))
    down, across = bi // tile.depth, bo // tile.columns
    parts = weights.blocks.reshape(-1, down, tile.depth, across, tile.columns).transpose(0, 1, 3, 2, 4)
    block_column = np.repeat(np.arange(len(weights.starts) - 1), np.diff(weights.starts))
    row = weights.rows[:, None, None] * bi + np.arange(down)[:, None] * tile.depth
    column = block_column[:, None, None] * across + np.arange(across)
    row, column = (array.ravel() for array in np.broadcast_arrays(row, column))
    order = np.lexsort((row, column, row // tile.chunk))
    order = order[(row[order] < rows) & (column[order] < tiles)]  # the rest is the padding of ragged edges
    row, column = row[order], column[order]
    parts = parts.reshape(-1, tile.depth, tile.columns)[order]
    sums = np.zeros((tiles, tile.columns), np.int64)
    if dtype == np.int8:
        np.add.at(sums, column, parts.sum(axis=1, dtype=np.int64))
    counts = np.bincount(row // tile.chunk * tiles + column, minlength=chunks * tiles)
    return TiledWeights(
        tile,
        (rows, columns),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        (row % tile.chunk // tile.unit).astype(np.int32),
        aligned(_stream(parts, tile)),
        sums.ravel(),
    )


def _stream(parts: np.ndarray, tile: Tile) -> np.ndarray:
    """Entries (n, depth, columns) in the form in which the inner loop reads them."""
    return quads(parts, tile.isa) if tile.dtype == np.int8 else parts.ravel()


def quads(parts: np.ndarray, isa: Isa) -> np.ndarray:
    """int8 entries (n, depth, columns), the depth a multiple of 4, as the int32 that the dot products take.

    With `vpdpbusd` four values of a column, else eight bytes: the first and third value widened to int16, then the
    second and fourth.
    """
    count, depth, columns = parts.shape
    fours = parts.reshape(count, depth // 4, 4, columns).swapaxes(2, 3)
    if isa.dot:
        return np.ascontiguousarray(fours).view(np.int32).ravel()
    return np.ascontiguousarray(fours[..., [0, 2, 1, 3]].astype(np.int16)).view(np.int32).ravel()


def empty(size: int, dtype: np.dtype) -> np.ndarray:
    """A flat uninitialised array that starts on a cache line."""
    dtype = np.dtype(dtype)
    raw = np.empty(size * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size * dtype.itemsize].view(dtype)


def aligned(array: np.ndarray) -> np.ndarray:
    """A flat copy that starts on a cache line."""
    copy = empty(array.size, array.dtype)
    copy[:] = array.ravel()
    return copy
