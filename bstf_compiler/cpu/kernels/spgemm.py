"""Block sparse times block sparse, C = A @ B: which blocks meet, then the sum of their products.

Two ways to find the pairs of blocks whose products add up to a block of C:

* `gustavson`, by columns: a column of C combines those columns of A that the column of B names (F. G. Gustavson, "Two
  fast algorithms for sparse matrices", 1978). A symbolic pass counts the blocks of C, a numeric one computes them. It
  takes as many steps as there are pairs.
* `coo_merge`, as in the published study of block sizes: lists of blocks in coordinates, A sorted to row order and B to
  column order; each row of A is merged with each column of B, on equal k. For N rows of D blocks that is up to 2 N^2 D
  steps for N D^2 pairs.

Either way a block of C stays in registers until its last product, and is written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numba
import numpy as np
from numba import prange

from bstf_compiler.bsr import BlockColumns
from bstf_compiler.cpu import kept, simd, team
from bstf_compiler.cpu.kernels.sort import sort
from bstf_compiler.cpu.simd import Isa
from bstf_compiler.cpu.tiles import empty

# Tasks a thread should find, so that all end at about the same time.
_TASKS_OF_A_THREAD = 16
# Multiply-adds that take as long as it takes to find a pair of blocks.
_MACS_OF_A_PAIR = 64


@dataclass(frozen=True)
class Coordinates:
    """A matrix as a list of blocks in any order; blocks at the same place add up.

    `shape`: rows and columns of blocks; `rows`, `columns` (K,): the place of each block; `blocks` (K, bi, bo).
    """

    shape: tuple[int, int]
    rows: np.ndarray
    columns: np.ndarray
    blocks: np.ndarray

    def sorted_by(self, order: str, threads: int | None = None) -> Coordinates:
        """The same list in "row" order (by row, then by column) or in "column" order."""
        first, second, size = self.rows, self.columns, self.shape[1]
        if order == "column":
            first, second, size = self.columns, self.rows, self.shape[0]
        place = sort(first * max(1, size) + second, threads)
        return Coordinates(self.shape, self.rows[place], self.columns[place], self.blocks[place])


def coordinates(matrix: BlockColumns) -> Coordinates:
    """The list of a matrix' blocks, in column order."""
    bi, bo = matrix.blocks.shape[-2:]
    columns = len(matrix.starts) - 1
    return Coordinates(
        (-(-matrix.shape[2] // bi), columns),
        matrix.rows,
        np.repeat(np.arange(columns), np.diff(matrix.starts)),
        matrix.blocks.reshape(-1, bi, bo),
    )


def block_columns(matrix: Coordinates, shape: tuple[int, int]) -> BlockColumns:
    """A list in column order without duplicates, as the block columns of a matrix of `shape`."""
    starts = np.searchsorted(matrix.columns, np.arange(matrix.shape[1] + 1))
    return BlockColumns((1, 1, *shape), starts, matrix.rows, matrix.blocks[:, None, None])


def gustavson(
    a: BlockColumns, b: BlockColumns, isa: Isa, threads: int | None = None, room: np.ndarray | None = None
) -> BlockColumns:
    """The product of A (M, K) in blocks (bi, bk) and B (K, N) in blocks (bk, bo), in blocks (bi, bo).

    A block of C is stored where blocks meet, even if their products cancel. The blocks are written into `room`, flat
    and of A's type, if they fit.
    """
    bi, bk = a.blocks.shape[-2:]
    bo = b.blocks.shape[-1]
    height, width = -(-a.shape[2] // bi), len(b.starts) - 1
    before = np.concatenate([[0], np.cumsum(np.diff(a.starts)[b.rows])])[b.starts]
    pairs = np.diff(before)
    workers = team.size(threads, int(before[-1]) * (bi * bk * bo + _MACS_OF_A_PAIR))
    a_rows, b_rows = a.rows.astype(np.int32), b.rows.astype(np.int32)
    starts = np.zeros(width + 1, np.int64)
    team.run(_count_column_blocks, workers, a.starts, a_rows, b.starts, b_rows, height, starts)
    starts = np.cumsum(starts)
    rows = np.empty(starts[-1], np.int64)
    size = len(rows) * bi * bo
    blocks = room[:size] if room is not None and len(room) >= size else empty(size, a.blocks.dtype)
    team.run(
        _gustavson(a.blocks.dtype, (bi, bk, bo), isa), workers,
        a.starts, a_rows, a.blocks.reshape(-1), b.starts, b_rows, b.blocks.reshape(-1),
        height, int(pairs.max(initial=0)), starts, rows, blocks,
    )  # fmt: skip
    return BlockColumns((1, 1, a.shape[2], b.shape[3]), starts, rows, blocks.reshape(-1, 1, 1, bi, bo))


def coo_merge(a: Coordinates, b: Coordinates, isa: Isa, threads: int | None = None) -> Coordinates:
    """The product of A in row order and B in column order (see `Coordinates.sorted_by`), in row order."""
    _, bi, bk = a.blocks.shape
    bo = b.blocks.shape[-1]
    height, width = a.shape[0], b.shape[1]
    a_starts = np.searchsorted(a.rows, np.arange(height + 1))
    b_starts = np.searchsorted(b.columns, np.arange(width + 1))
    before = np.concatenate([[0], np.cumsum(np.bincount(b.rows, minlength=a.shape[1])[a.columns])])[a_starts]
    workers = team.size(threads, int(before[-1]) * bi * bk * bo + len(a.rows) * width)
    a_columns, b_rows = a.columns.astype(np.int32), b.rows.astype(np.int32)
    # For every pair: its blocks of A and B, and the next pair of the same block of C or -1. For every block of C, in
    # the places of its row's pairs: its column and its first pair.
    left, right, following, columns, heads = np.empty((5, before[-1]), np.int32)
    starts = np.zeros(height + 1, np.int64)
    team.run(
        _merge_lines, workers,
        a_starts, a_columns, b_starts, b_rows, before, left, right, following, columns, heads, starts,
    )  # fmt: skip
    starts = np.cumsum(starts)
    blocks = empty(starts[-1] * bi * bo, a.blocks.dtype)
    team.run(
        _multiply_lines(a.blocks.dtype, (bi, bk, bo), isa), workers,
        a.blocks.reshape(-1), b.blocks.reshape(-1), before, left, right, following, heads, starts, blocks,
    )  # fmt: skip
    counts = np.diff(starts)
    rows = np.repeat(np.arange(height), counts)
    place = np.arange(len(rows)) + np.repeat(before[:-1] - starts[:-1], counts)
    return Coordinates((height, width), rows, columns[place].astype(np.int64), blocks.reshape(-1, bi, bo))


@kept.kernel()
def _count_column_blocks(a_starts, a_rows, b_starts, b_rows, height, counts, workers, members):
    """The symbolic pass: counts[j + 1] blocks in column j of C."""
    width = len(counts) - 1
    share = 1 + width // (_TASKS_OF_A_THREAD * workers)
    for worker in prange(workers):
        seen = np.full(height, -1, np.int32)
        team.join(members, worker)
        while True:
            first = team.take(members, workers) * share
            if first >= width:
                break
            for j in range(first, min(first + share, width)):
                count, mark = 0, np.int32(j)
                for entry in range(b_starts[j], b_starts[j + 1]):
                    for place in range(a_starts[b_rows[entry]], a_starts[b_rows[entry] + 1]):
                        row = a_rows[place]
                        count += seen[row] != mark
                        seen[row] = mark
                counts[j + 1] = count
        team.leave(members)


@team.once
def _gustavson(dtype: np.dtype, block: tuple[int, int, int], isa: Isa) -> Callable:
    """The numeric pass for a type and block shape (bi, bk, bo)."""
    multiply, size = _block(dtype, block, isa), block[0] * block[2]

    def kernel(
        a_starts, a_rows, a_blocks, b_starts, b_rows, b_blocks, height, most, starts, rows, blocks, workers, members
    ):
        width = len(starts) - 1
        share = 1 + width // (_TASKS_OF_A_THREAD * workers)
        for worker in prange(workers):
            heads = np.full(height, -1, np.int32)  # by row of C: its last pair so far
            present = np.zeros((height + 63) // 64, np.uint64)  # a bit a row that has pairs
            left, right, following = np.empty(most, np.int32), np.empty(most, np.int32), np.empty(most, np.int32)
            team.join(members, worker)
            while True:
                first = team.take(members, workers) * share
                if first >= width:
                    break
                for j in range(first, min(first + share, width)):
                    pair = 0
                    for entry in range(b_starts[j], b_starts[j + 1]):
                        for place in range(a_starts[b_rows[entry]], a_starts[b_rows[entry] + 1]):
                            row = a_rows[place]
                            left[pair], right[pair], following[pair] = place, entry, heads[row]
                            heads[row] = pair
                            present[row >> 6] |= np.uint64(1) << np.uint64(row & 63)
                            pair += 1
                    at = starts[j]
                    for word in range(len(present)):
                        while present[word]:
                            row = 64 * word + simd.lowest_bit(present[word])
                            present[word] &= present[word] - np.uint64(1)
                            rows[at] = row
                            multiply(a_blocks, b_blocks, left, right, following, heads[row], blocks, at * size)
                            heads[row] = -1
                            at += 1
            team.leave(members)

    return kept.kernel(dtype, block, isa)(kernel)


@kept.kernel()
def _merge_lines(
    a_starts, a_columns, b_starts, b_rows, before, left, right, following, columns, heads, counts, workers, members
):
    """Merges each row of A with each column of B, on equal k."""
    for worker in prange(workers):
        team.join(members, worker)
        while True:
            i = team.take(members, workers)
            if i >= len(a_starts) - 1:
                break
            pair = block = before[i]
            for j in range(len(b_starts) - 1):
                head = pair
                place, entry = a_starts[i], b_starts[j]
                stop, entry_stop = a_starts[i + 1], b_starts[j + 1]
                while place < stop and entry < entry_stop:
                    if a_columns[place] == b_rows[entry]:
                        run = entry
                        while run < entry_stop and b_rows[run] == a_columns[place]:
                            left[pair], right[pair], following[pair] = place, run, pair + 1
                            pair += 1
                            run += 1
                        place += 1
                    else:  # a comparison is cheaper here than a jump that can't be foreseen
                        ahead = a_columns[place] > b_rows[entry]
                        entry += ahead
                        place += not ahead
                if pair > head:
                    following[pair - 1] = -1
                    columns[block], heads[block] = j, head
                    block += 1
            counts[i + 1] = block - before[i]
        team.leave(members)


@team.once
def _multiply_lines(dtype: np.dtype, block: tuple[int, int, int], isa: Isa) -> Callable:
    """The multiplication after `_merge_lines`, for a type and block shape (bi, bk, bo)."""
    multiply, size = _block(dtype, block, isa), block[0] * block[2]

    def kernel(a_blocks, b_blocks, before, left, right, following, heads, starts, blocks, workers, members):
        for worker in prange(workers):
            team.join(members, worker)
            while True:
                i = team.take(members, workers)
                if i >= len(starts) - 1:
                    break
                for at in range(starts[i], starts[i + 1]):
                    head = heads[before[i] + at - starts[i]]
                    multiply(a_blocks, b_blocks, left, right, following, head, blocks, at * size)
            team.leave(members)

    return kept.kernel(dtype, block, isa)(kernel)


@team.once
def _block(dtype: np.dtype, block: tuple[int, int, int], isa: Isa) -> Callable:
    """Compiles the computation of one block of C from the list of its pairs."""
    bi, bk, bo = block
    lanes = np.gcd(bo, isa.lanes(dtype)).item()
    count = bo // lanes
    # As many rows at a time as leave registers for a row of B and a weight.
    most = max(1, isa.registers // 2 // (count * -(-lanes // isa.lanes(dtype))))
    rows = max(size for size in range(1, bi + 1) if bi % size == 0 and size <= most)

    def multiply(a, b, left, right, following, head, out, at):
        for top in range(0, bi, rows):
            sums = simd.zeros(out, lanes, rows, count)
            pair = head
            while pair >= 0:
                place, entry = left[pair] * (bi * bk) + top * bk, right[pair] * (bk * bo)
                for k in range(bk):
                    vectors = simd.load(b, entry + k * bo, lanes, count)
                    sums = simd.fma_outer(sums, vectors, a, place + k, bk)
                pair = following[pair]
            simd.store(sums, out, at + top * bo, lanes)

    return numba.njit(inline="always")(multiply)
