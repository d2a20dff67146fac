"""Dense times block sparse, y = x @ W, for few multiply-adds a row: nothing is packed or transposed.

A tile is some rows of y times the columns of a block. An element of x is read where it lies and broadcast, and the
vector that it is multiplied with is a row of a block. `spmm` transposes x and y instead, and reads half as much for a
multiply-add, which pays where a row has many. Sums are added in the same order, so results have the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numba
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from bstf_compiler.cpu import kept, simd, team
from bstf_compiler.cpu.kernels.spmm import wanted_tasks
from bstf_compiler.cpu.simd import Isa
from bstf_compiler.cpu.tiles import Tile, TiledWeights

# Multiply-adds for each byte of a row of x and of y: with more of them it pays to transpose these. Measured on a Zen 3.
_MACS_OF_A_BYTE = 12
# Rows of x of more bytes fall on the same few lines of a cache.
_ROW_BYTES = 4096
# Rows of a tile, if there are registers for more: fewer addresses, and enough sums for two multiply-adds a cycle.
_ROWS = 8
# Of a vector of 512 bits.
_HALF_BYTES = 32
# Registers and their doubles, triples and so on that an x86 address can add.
_ROWS_OF_A_REGISTER = 4


def tile_of(block: tuple[int, int], dtype: np.dtype, isa: Isa) -> Tile | None:
    """The tile for a block shape; None if its rows aren't whole vectors of floats.

    Vectors of 512 bits may be halved: many CPUs compute two of 256 bits in the same time.
    """
    dtype, columns = np.dtype(dtype), math.gcd(block[1], 16)
    row_bytes = columns * dtype.itemsize
    if dtype == np.int8 or row_bytes < min(isa.vector_bytes, _HALF_BYTES):
        return None
    narrow = replace(isa, vector_bytes=min(isa.vector_bytes, row_bytes))
    return Tile(narrow, dtype, columns, math.gcd(block[0], 8), columns // narrow.lanes(dtype))


def rows_of_tile(tile: Tile) -> int:
    """Rows of y in a tile: as many as leave registers for operands, and not more than are of use."""
    return min(_ROWS, tile.isa.registers * 3 // 4 // tile.vectors)


def pays(shape: tuple[int, int], kept: int, tile: Tile) -> bool:
    """Whether products with weights (K, N) with so many kept ones can be computed here, and take less time than there.

    Blocks must be whole: no element outside of x and y is touched.
    """
    depth, columns = shape
    whole = depth % tile.depth == 0 and columns % tile.columns == 0
    few = kept <= _MACS_OF_A_BYTE * tile.dtype.itemsize * (depth + columns)
    return whole and few and depth * tile.dtype.itemsize <= _ROW_BYTES


def multiply(x: np.ndarray, weights: TiledWeights, out: np.ndarray, threads: int | None = None) -> None:
    """Writes x @ W into `out`.

    Args:
        x: (M, K), C-contiguous, of the weights' type; with `rows_of_tile` rows or more.
        weights: W (K, N), cut for a tile of `tile_of`, if it `pays`.
        out: (M, N), C-contiguous, of that type.
        threads: None: as many as are worth their start. Never more than Numba was given.
    """
    tile = weights.tile
    workers = team.size(threads, len(x) * len(weights.values))
    tiles = -(-len(x) // rows_of_tile(tile))
    tasks = min(tiles, wanted_tasks(workers))
    team.run(
        _kernel(tile), workers,
        x.reshape(-1), len(x), weights.shape[0], weights.values, weights.offsets, weights.starts, weights.tiles,
        out.reshape(-1), weights.shape[1], tiles, tasks,
    )  # fmt: skip


@intrinsic(prefer_literal=True)
def _fma_block(typing, tile, count, values, index, depth, x, at, stride):
    """Adds x[at + r * stride + k] times row k of the block at values[index] to row r of a tile, for every k and r.

    All k in one step, unlike `simd.fma_outer`: addresses stay in registers, and k is a part of the instruction.
    """
    if not (simd.is_memory(values) and simd.is_memory(x) and simd.are_literals(count, depth)):
        return None

    def generate(context, builder, signature, arguments):
        sums = cgutils.unpack_tuple(builder, arguments[0])
        kind, vectors = context.get_value_type(tile.dtype), count.literal_value
        block = simd.element_address(context, builder, values, arguments[2], arguments[3])
        address = simd.element_address(context, builder, x, arguments[5], arguments[6])

        def after(start: ir.Value, rows: int) -> ir.Value:
            return builder.gep(start, [builder.mul(arguments[7], ir.Constant(arguments[7].type, rows))])

        def element(start: ir.Value, place: int) -> ir.Value:
            return builder.gep(start, [ir.Constant(ir.IntType(32), place)])

        rows = []
        while len(rows) < tile.count // vectors:  # an address is a register and a multiple of the stride
            rows += [address, *(after(address, row) for row in range(1, _ROWS_OF_A_REGISTER))]
            address = after(address, _ROWS_OF_A_REGISTER)
        for k in range(depth.literal_value):
            parts = simd.load_neighbours(builder, element(block, k * vectors * kind.count), kind, vectors)
            for place in range(0, len(sums), vectors):
                value = simd.load_value(builder, element(rows[place // vectors], k), kind.element)
                factor = simd.splat(builder, value, kind.count)
                for column, part in enumerate(parts, place):
                    sums[column] = simd.fma(builder, factor, part, sums[column])
        return context.make_tuple(builder, tile, sums)

    return tile(tile, count, values, types.intp, depth, x, types.intp, types.intp), generate


@team.once
def _kernel(tile: Tile) -> Callable:
    """Compiles the kernel: threads take some tiles of rows as they come free."""
    lanes, columns, depth, vectors = tile.lanes, tile.columns, tile.depth, tile.vectors
    rows = rows_of_tile(tile)

    @numba.njit(inline="always")
    def product(x, row, stride, values, offsets, start, stop, out, at, width):
        sums = simd.zeros(values, lanes, rows, vectors)
        for entry in range(start, stop):
            weight = entry * (depth * columns)
            sums = _fma_block(sums, vectors, values, weight, depth, x, row * stride + offsets[entry], stride)
        simd.store_tile(sums, vectors, out, at, width)

    def kernel(x, count, stride, values, offsets, starts, tiles, out, width, all_rows, tasks, workers, members):
        for worker in prange(workers):
            team.join(members, worker)
            while True:
                task = team.take(members, workers)
                if task >= tasks:
                    break
                for place in range(task * all_rows // tasks, (task + 1) * all_rows // tasks):
                    row = min(place * rows, count - rows)  # the last tile computes some rows once more
                    for column in range(tiles):
                        at = row * width + column * columns
                        product(
                            x, row, stride, values, offsets, starts[column], starts[column + 1], out, at, width
                        )  # fmt: skip
            team.leave(members)

    return kept.kernel(tile)(kernel)
