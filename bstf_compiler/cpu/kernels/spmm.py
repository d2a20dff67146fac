"""Dense times block sparse, y = x @ W: a tile of y stays in registers over a whole sparse column of W.

Rows of x are taken a panel at a time. A panel is transposed, so that a vector holds one column of x for neighbouring
rows; then each kept weight is one broadcast and `vectors` multiply-adds, and a zero block is no instruction at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numba
import numpy as np
from numba import prange

from bstf_compiler.cpu import access, dots, kept, simd, team
from bstf_compiler.cpu.compiled import inner
from bstf_compiler.cpu.tiles import Tile, TiledWeights, empty

# Tasks a thread should find, so that all end at about the same time.
_TASKS_OF_A_THREAD = 4
# Elements of the result that a thread gathers before it writes them, and bytes of a row of them at most.
_STRIP, _STRIP_BYTES = 4096, 256
# Instead of a number of pieces to pack a panel in: whoever multiplies a panel packs it just before.
_FUSED = -1
# Weights beyond so many bytes are not in the level-2 cache when the next panel needs them: several panels share them.
_LARGE_BYTES, _GROUP = 2**22, 4


@dataclass(frozen=True)
class Panels:
    """The dense operand as the kernels read it: what `pack` makes of it, and `multiply` takes in its place.

    `rows` of it, of length `depth`, for weights cut for `tile`; `signed`: it was int8.
    """

    tile: Tile
    depth: int
    rows: int
    signed: bool
    values: np.ndarray


def pack(x: np.ndarray, weights: TiledWeights, threads: int | None = None) -> Panels:
    """Packs x (M, K) for products with weights of the same K, tile and instruction set."""
    tile = weights.tile
    workers = team.size(threads, 16 * x.size)
    panels = Panels(tile, weights.depth, len(x), x.dtype == np.int8, _room(len(x), weights))
    out = np.empty(0, np.int32 if tile.dtype == np.int8 else tile.dtype)
    pieces = _pieces(wanted_tasks(workers), len(x), weights)
    _run(x, panels.values, len(x), weights, out, np.empty(0, np.int32), 0, pieces, 0, 1, workers)
    return panels


def _room(rows: int, weights: TiledWeights) -> np.ndarray:
    """Memory for all panels of so many rows."""
    tile = weights.tile
    return empty(-(-rows // tile.width) * tile.width * (weights.depth // tile.unit), tile.word)


def wanted_tasks(workers: int) -> int:
    """How many tasks to make for so many threads, at least."""
    return _TASKS_OF_A_THREAD * workers if workers > 1 else 1


def _pieces(wanted: int, rows: int, weights: TiledWeights) -> int:
    """Into how many tasks to split the packing of a panel."""
    tile = weights.tile
    return min(-(-wanted // max(1, -(-rows // tile.width))), -(-weights.depth // (tile.lanes * tile.unit)))


def multiply(
    x: np.ndarray | Panels,
    weights: TiledWeights,
    out: np.ndarray,
    *,
    bias: np.ndarray | None = None,
    shift: int = 0,
    threads: int | None = None,
) -> None:
    """Writes x @ W into `out`.

    Args:
        x: (M, K), C-contiguous, of the weights' type, or uint8 or int8 for int8 weights; or these, packed.
        weights: W (K, N).
        out: (M, N), C-contiguous, of the weights' type; for int8 weights int32, or int8 to have
            clamp(floor((x @ W + bias) * 2**-shift + 1/2), -128, 127).
        bias: (N,) int32 added to the sums of int8 products.
        shift: bits cut off for an int8 result.
        threads: None: as many as are worth their start. Never more than Numba was given.
    """
    tile = weights.tile
    rows = x.rows if isinstance(x, Panels) else len(x)
    workers = team.size(threads, rows * len(weights.offsets) * tile.depth * tile.columns)
    wanted, panels = wanted_tasks(workers), -(-rows // tile.width)
    slices = max(1, min(weights.tiles, -(-wanted // panels)))
    group = _GROUP if weights.values.nbytes > _LARGE_BYTES and panels >= 2 * wanted else 1
    if isinstance(x, Panels):
        start = _start(bias, weights, x.signed)
        _run(x.values.view(_source_type(tile)), x.values, rows, weights, out, start, shift, 0, slices, group, workers)
        return
    start = _start(bias, weights, x.dtype == np.int8)
    if panels >= wanted:
        buffer = empty(workers * group * (min(weights.depth, tile.chunk) // tile.unit * tile.width), tile.word)
        _run(x, buffer, rows, weights, out, start, shift, _FUSED, 1, group, workers)
    else:  # few panels: threads share out parts of each
        pieces = _pieces(wanted, rows, weights)
        _run(x, _room(rows, weights), rows, weights, out, start, shift, pieces, slices, 1, workers)


def _run(
    x: np.ndarray, buffer: np.ndarray, rows: int, weights: TiledWeights, out: np.ndarray,
    start: np.ndarray, shift: int, pieces: int, slices: int, group: int, workers: int,
) -> None:  # fmt: skip
    """Calls the compiled kernel, with its number of threads.

    `pieces`: into how many tasks the packing of a panel is cut; 0: it is packed; `_FUSED`: a task packs what it
    multiplies. `slices`: into how many tasks the columns are cut. `group`: panels of a task.
    """
    kernel = _kernel(weights.tile, out.dtype)
    mask = 0x80 if x.dtype == np.int8 else 0  # s8 + 128 is u8
    flat = x.reshape(-1).view(_source_type(weights.tile))
    team.run(
        kernel, workers,
        flat, rows, weights.shape[0], weights.depth, mask, buffer, weights.values, weights.offsets, weights.starts,
        weights.tiles, start, shift, out.reshape(-1), weights.shape[1], pieces, slices, group,
    )  # fmt: skip


def _source_type(tile: Tile) -> np.dtype:
    return np.dtype(np.uint8) if tile.dtype == np.int8 else tile.dtype


def _start(bias: np.ndarray | None, weights: TiledWeights, signed: bool) -> np.ndarray:
    """What a tile's sums start from: the bias, less the 128 that each int8 of x was raised by, times its weights."""
    if weights.tile.dtype != np.int8:
        return np.empty(0, np.int32)
    start = np.zeros(len(weights.sums), np.int64)
    if bias is not None:
        start[: weights.shape[1]] = bias
    return (start - 128 * weights.sums if signed else start).astype(np.int32)


def _packer(tile: Tile, vectors: int) -> Callable:
    """Compiles the transposition of `rows` rows and columns [first, last) of x into a panel of `vectors` vectors."""
    lanes, unit, width = tile.lanes, tile.unit, vectors * tile.lanes
    step = lanes * unit
    raise_square = _raise_words if tile.dtype == np.int8 else _keep
    raise_value = _raise_byte if tile.dtype == np.int8 else _keep

    def packer(x, row, rows, columns, first, last, mask, panel, base):
        whole = first + max(0, min(last, columns) - first) // step * step
        for start in range(0, width, lanes):
            here = row + min(start, rows - 1)  # lanes past the last row repeat it; nobody reads their sums
            for k in range(first, whole, step):
                square = simd.load_rows(panel, x, here * columns + k, columns, max(1, rows - start), lanes)
                at = base + (k - first) // unit * width + start
                simd.store(simd.transpose(raise_square(square, mask)), panel, at, width)
        cells = panel.view(x.dtype)
        for k in range(whole, last):
            at = (base + (k - first) // unit * width) * unit + (k - first) % unit
            for place in range(width):
                value = x[(row + place) * columns + k] if k < columns and place < rows else x.dtype.type(0)
                cells[at + place * unit] = raise_value(value, mask)

    return inner(packer)


@numba.njit(inline="always")
def _raise_words(square, mask):
    return simd.xor(square, mask * 0x01010101)


@numba.njit(inline="always")
def _raise_byte(value, mask):
    return value ^ np.uint8(mask)


@numba.njit(inline="always")
def _keep(value, mask):
    return value


def _finish(tile: Tile, vectors: int, out: np.dtype) -> Callable:
    """The step from a tile of sums to a tile of results."""

    def keep(sums, bias, column, shift):
        return sums

    def biased(sums, bias, column, shift):
        return simd.add_rows(sums, vectors, bias, column)

    def requantised(sums, bias, column, shift):
        return simd.requantise(simd.add_rows(sums, vectors, bias, column), shift)

    step = keep if tile.dtype != np.int8 else requantised if out == np.int8 else biased
    return numba.njit(inline="always")(step)


@numba.njit(inline="always")
def _fma_outer(sums, vectors, weights, index):
    return simd.fma_outer(sums, vectors, weights, index, 1)


def _product(tile: Tile, vectors: int, out: np.dtype) -> Callable:
    """Compiles the inner loop: one tile of the result, from the entries [start, stop) of a sparse column."""
    lanes, columns, width, steps = tile.lanes, tile.columns, vectors * tile.lanes, tile.depth // tile.unit
    widened = tile.dtype == np.int8 and not tile.isa.dot
    words = 2 * columns if widened else columns
    outer = _fma_outer if tile.dtype != np.int8 else dots.widened_outer if widened else dots.dot_outer
    finish = _finish(tile, vectors, out)

    def product(panel, base, values, offsets, start, stop, bias, column, shift, target, at, stride):
        sums = simd.zeros(panel, lanes, columns, vectors)
        weight = start * (steps * words)
        for entry in range(start, stop):
            place = base + offsets[entry] * width
            for step in range(steps):
                sums = outer(
                    sums, simd.load(panel, place + step * width, lanes, vectors), values, weight + step * words
                )
            weight += steps * words
        simd.store_transposed(finish(sums, bias, column, shift), vectors, target, at, stride)

    return inner(product)


def _strip_columns(tile: Tile) -> int:
    """Columns of the result that are computed before they are written, such that they stay in the level-1 cache."""
    return max(1, min(_STRIP_BYTES // tile.word.itemsize, _STRIP // tile.width) // tile.columns) * tile.columns


def _strip(tile: Tile, vectors: int, out: np.dtype) -> Callable:
    """Compiles the product of one panel and one chunk of the column tiles [left, right), a strip.

    Tiles are narrower than a cache line, and rows of the result are often a power of two apart: written one by one they
    would push each other out of the cache. So a strip of them is gathered, and its rows are copied.
    """
    columns, strip_columns = tile.columns, _strip_columns(tile)
    lanes, line = tile.isa.lanes(out), 64 // out.itemsize
    product = _product(tile, vectors, out)

    def strip_product(
        panel, base, row, rows, values, offsets, starts, chunk, tiles, left, right, bias, shift, target, stride, strip
    ):
        width = min(right * columns, stride) - left * columns
        for y in range(row, row + rows):
            for x in range(left * columns, left * columns + width, line):
                access.prefetch_to_write(target, y * stride + x)
        for place in range(left, right):
            entry = chunk * tiles + place
            start, stop, at = starts[entry], starts[entry + 1], (place - left) * columns
            product(panel, base, values, offsets, start, stop, bias, place * columns, shift, strip, at, strip_columns)
        whole = width // lanes * lanes
        for y in range(rows):
            at, source = (row + y) * stride + left * columns, y * strip_columns
            for x in range(0, whole, lanes):
                part = simd.load(strip, source + x, lanes, 1)
                if chunk > 0:
                    part = simd.add(part, simd.load(target, at + x, lanes, 1))
                simd.store(part, target, at + x, 0)
            for x in range(whole, width):
                target[at + x] = strip[source + x] + (target[at + x] if chunk > 0 else 0)

    return inner(strip_product)


def _share(tile: Tile, vectors: int, out: np.dtype) -> Callable:
    """Compiles a task on panels: packs columns [a, b) of x, or multiplies by the column tiles [a, b)."""
    chunk, unit, width = tile.chunk, tile.unit, vectors * tile.lanes
    strip_tiles = _strip_columns(tile) // tile.columns
    packer, strip_product = _packer(tile, vectors), _strip(tile, vectors, out)

    def share(
        packing, fused, x, row, rows, columns, depth, mask, buffer, base, values, offsets, starts, tiles, a, b,
        bias, shift, target, stride, strip,
    ):  # fmt: skip
        if packing:
            packer(x, row, rows, columns, a, b, mask, buffer, base + a // unit * width)
            return
        for first in range(0, depth, chunk):
            room, place = depth // unit * width, base + first // unit * width
            if fused:
                room, place = (min(depth, first + chunk) - first) // unit * width, base
                for above in range(0, rows, width):
                    here = base + above // width * room
                    packer(
                        x, row + above, min(width, rows - above), columns, first, min(depth, first + chunk), mask,
                        buffer, here,
                    )  # fmt: skip
            for left in range(a, b, strip_tiles):
                for above in range(0, rows, width):
                    strip_product(
                        buffer, place + above // width * room, row + above, min(width, rows - above), values, offsets,
                        starts, first // chunk, tiles, left, min(b, left + strip_tiles), bias, shift, target, stride,
                        strip,
                    )  # fmt: skip

    return inner(share)


@team.once
def _kernel(tile: Tile, out: np.dtype) -> Callable:
    """Compiles the kernel: threads take parts of the packing, then of the product, as they come free."""
    lanes, width, unit, strip_size = tile.lanes, tile.width, tile.unit, tile.width * _strip_columns(tile)
    middle, step = -(-tile.vectors // 2), tile.lanes * tile.unit
    # The last panel is as wide as its rows need, of three widths.
    full, half, single = (_share(tile, vectors, out) for vectors in (tile.vectors, middle, 1))

    def kernel(
        x, count, columns, depth, mask, buffer, values, offsets, starts, tiles,
        bias, shift, target, stride, pieces, slices, group, workers, members,
    ):  # fmt: skip
        room = len(buffer) // workers
        fused = pieces == _FUSED
        packs = -(-count // width) * max(0, pieces)
        groups = count // (group * width)  # the rest goes panel by panel
        for worker in prange(workers):
            strip = np.empty(strip_size, target.dtype)
            team.join(members, worker)
            while True:
                task = team.take(members, workers)
                packing = task < packs
                if packing:
                    row, part = task // pieces * width, task % pieces
                    steps = -(-depth // step)
                    a, b = part * steps // pieces * step, min(depth, (part + 1) * steps // pieces * step)
                else:
                    place, part = (task - packs) // max(1, slices), (task - packs) % max(1, slices)
                    row = (place * group if place < groups else groups * group + place - groups) * width
                    if row >= count or slices == 0:
                        break
                    team.wait(members, packs)
                    a, b = part * tiles // slices, (part + 1) * tiles // slices
                rows = min(width, count - row)
                if not packing and place < groups:
                    rows = group * width
                base = worker * room if fused else row * (depth // unit)
                if rows > middle * lanes:
                    full(packing, fused, x, row, rows, columns, depth, mask, buffer, base, values, offsets, starts,
                         tiles, a, b, bias, shift, target, stride, strip)  # fmt: skip
                elif rows > lanes:
                    half(packing, fused, x, row, rows, columns, depth, mask, buffer, base, values, offsets, starts,
                         tiles, a, b, bias, shift, target, stride, strip)  # fmt: skip
                else:
                    single(packing, fused, x, row, rows, columns, depth, mask, buffer, base, values, offsets, starts,
                           tiles, a, b, bias, shift, target, stride, strip)  # fmt: skip
                if packing:
                    team.done(members)
            team.leave(members)

    return kept.kernel(tile, out)(kernel)
