"""Dense times block sparse, y = x @ W: a tile of y stays in registers over a whole sparse column of W.

Rows of x are taken a panel at a time. A panel is transposed, so that a vector holds one column of x for neighbouring
rows; then each kept weight is one broadcast and `vectors` multiply-adds, and a zero block is no instruction at all.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numba
import numpy as np
from numba import prange

from bstf_compiler.cpu import simd
from bstf_compiler.cpu.tiles import Tile, TiledWeights, empty

# Below this many multiply-adds a thread would wait for the other longer than it works.
_MACS_OF_A_THREAD = 2**20
# Tasks a thread should find, so that all end at about the same time.
_TASKS_OF_A_THREAD = 4
# Elements of the result that a thread gathers before it writes them.
_STRIP = 4096
_BUILDING = threading.Lock()
# What a call of the kernel does: packs x, multiplies packed panels, or does both, panel after panel.
_PACK, _PACKED, _FUSED = range(3)


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
    words = -(-len(x) // tile.width) * tile.width * (weights.depth // tile.unit)
    panels = Panels(tile, weights.depth, len(x), x.dtype == np.int8, empty(words, tile.word))
    out = np.empty(0, np.int32 if tile.dtype == np.int8 else tile.dtype)
    _run(_PACK, x, panels.values, len(x), weights, out, np.empty(0, np.int32), 0, 1, _workers(threads, 16 * x.size))
    return panels


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
    workers = _workers(threads, rows * len(weights.offsets) * tile.depth * tile.columns)
    wanted = _TASKS_OF_A_THREAD * workers if workers > 1 else 1
    panels = -(-rows // tile.width)
    if not isinstance(x, Panels) and panels < wanted:  # few panels: threads share out the columns of each
        x = pack(x, weights, workers)
    if isinstance(x, Panels):
        slices = max(1, min(weights.tiles, -(-wanted // panels)))
        start = _start(bias, weights, x.signed)
        _run(_PACKED, x.values.view(_source_type(tile)), x.values, rows, weights, out, start, shift, slices, workers)
    else:
        panel = min(weights.depth, tile.chunk) // tile.unit * tile.width
        buffer = empty(workers * panel, tile.word)
        _run(_FUSED, x, buffer, rows, weights, out, _start(bias, weights, x.dtype == np.int8), shift, 1, workers)


def _run(
    mode: int, x: np.ndarray, buffer: np.ndarray, rows: int, weights: TiledWeights, out: np.ndarray,
    start: np.ndarray, shift: int, slices: int, workers: int,
) -> None:  # fmt: skip
    """Calls the compiled kernel, with its number of threads."""
    kernel = _kernel(weights.tile, out.dtype)
    mask = 0x80 if x.dtype == np.int8 else 0  # s8 + 128 is u8
    flat = x.reshape(-1).view(_source_type(weights.tile))
    before = numba.get_num_threads()
    numba.set_num_threads(workers)  # for this Python thread only
    try:
        kernel(
            mode, flat, rows, weights.shape[0], weights.depth, mask, buffer, weights.values, weights.offsets,
            weights.starts, weights.tiles, start, shift, out.reshape(-1), weights.shape[1], slices, workers,
            np.zeros(1, np.int64),
        )  # fmt: skip
    finally:
        numba.set_num_threads(before)


def _workers(threads: int | None, macs: int) -> int:
    with _BUILDING:
        most = _start_threads()
    if threads is None:
        threads = max(1, min(numba.get_num_threads(), macs // _MACS_OF_A_THREAD))
    return min(threads, most)


@cache
def _start_threads() -> int:
    """Starts Numba's threads, once; returns how many there are.

    GNU's OpenMP lets a thread that waits spin for milliseconds. On a core that another program wants too, it spins away
    the time that the thread it waits for needs, and a product of 1 ms takes 8. Told to sleep after some microseconds,
    it takes 2. The library reads this when it is loaded, and settings of the user's stay.
    """
    if numba.config.THREADING_LAYER == "default":
        numba.config.THREADING_LAYER = "threadsafe"  # `workqueue` aborts the process when two threads enter
    ours = not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    if ours:
        os.environ["GOMP_SPINCOUNT"] = "1000"
    try:
        numba.get_num_threads()  # loads the library
    finally:
        if ours:
            del os.environ["GOMP_SPINCOUNT"]
    return numba.config.NUMBA_NUM_THREADS


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


def _kernel(tile: Tile, out: np.dtype) -> Callable:
    """The compiled kernel of a tile and type of result; it compiles at its first call."""
    with _BUILDING:
        return _build(tile, out)


@cache
def _build(tile: Tile, out: np.dtype) -> Callable:
    return _worker(tile, out)


def _compile(function: Callable) -> Callable:
    """Compiles a part of the kernel, which is called by compiled code only."""
    return numba.njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


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

    return _compile(packer)


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


def _product(tile: Tile, vectors: int, out: np.dtype) -> Callable:
    """Compiles the inner loop: one tile of the result, from the entries [start, stop) of a sparse column."""
    lanes, columns, width, steps = tile.lanes, tile.columns, vectors * tile.lanes, tile.depth // tile.unit
    widened = tile.dtype == np.int8 and not tile.isa.dot
    words = 2 * columns if widened else columns
    outer = simd.fma_outer if tile.dtype != np.int8 else simd.widened_outer if widened else simd.dot_outer
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

    return _compile(product)


def _strip_columns(tile: Tile) -> int:
    """Columns of the result that are computed before they are written, such that they stay in the level-1 cache."""
    return max(1, min(64, _STRIP // tile.width) // tile.columns) * tile.columns


def _panel(tile: Tile, vectors: int, out: np.dtype) -> Callable:
    """Compiles the product of one panel and one chunk of the column tiles [first, last).

    Tiles are narrower than a cache line, and rows of the result are often a power of two apart: written one by one they
    would push each other out of the cache. So a strip of them is gathered, and its rows are copied.
    """
    columns, strip_columns = tile.columns, _strip_columns(tile)
    strip_tiles, out_lanes = strip_columns // columns, tile.isa.lanes(out)
    product = _product(tile, vectors, out)

    def panel_product(
        panel, base, row, rows, values, offsets, starts, chunk, tiles, first, last, bias, shift, target, stride, strip
    ):
        for left in range(first, last, strip_tiles):
            right = min(last, left + strip_tiles)
            for place in range(left, right):
                entry = chunk * tiles + place
                start, stop, at = starts[entry], starts[entry + 1], (place - left) * columns
                product(
                    panel, base, values, offsets, start, stop, bias, place * columns, shift, strip, at, strip_columns
                )
            width = min(right * columns, stride) - left * columns
            for y in range(rows):
                at, source = (row + y) * stride + left * columns, y * strip_columns
                whole = width // out_lanes * out_lanes if chunk == 0 else 0
                for x in range(0, whole, out_lanes):
                    simd.store(simd.load(strip, source + x, out_lanes, 1), target, at + x, 0)
                for x in range(whole, width):
                    target[at + x] = strip[source + x] + (target[at + x] if chunk > 0 else 0)

    return _compile(panel_product)


def _share(tile: Tile, vectors: int, out: np.dtype) -> Callable:
    """Compiles a task: one panel of `vectors` vectors, packed, or multiplied by the column tiles [a, b), or both."""
    chunk, unit, width = tile.chunk, tile.unit, vectors * tile.lanes
    packer, panel_product = _packer(tile, vectors), _panel(tile, vectors, out)

    def share(
        mode, x, row, rows, columns, depth, mask, buffer, base, values, offsets, starts, tiles, a, b,
        bias, shift, target, stride, strip,
    ):  # fmt: skip
        for first in range(0, depth, chunk):
            place = base if mode == _FUSED else base + first // unit * width
            if mode != _PACKED:
                packer(x, row, rows, columns, first, min(depth, first + chunk), mask, buffer, place)
            if mode != _PACK:
                panel_product(
                    buffer, place, row, rows, values, offsets, starts, first // chunk, tiles, a, b,
                    bias, shift, target, stride, strip,
                )  # fmt: skip

    return _compile(share)


def _worker(tile: Tile, out: np.dtype) -> Callable:
    """Compiles the kernel: threads take panels, or slices of the columns of packed panels, as they come free."""
    lanes, width, unit, strip_size = tile.lanes, tile.width, tile.unit, tile.width * _strip_columns(tile)
    middle = -(-tile.vectors // 2)
    # The last panel is as wide as its rows need, of three widths.
    full, half, single = (_share(tile, vectors, out) for vectors in (tile.vectors, middle, 1))

    def kernel(
        mode, x, count, columns, depth, mask, buffer, values, offsets, starts, tiles,
        bias, shift, target, stride, slices, workers, counter,
    ):  # fmt: skip
        room = len(buffer) // workers
        for worker in prange(workers):
            strip = np.empty(strip_size, target.dtype)
            while True:
                task = simd.fetch_add(counter)
                row = task // slices * width
                if row >= count:
                    break
                rows = min(width, count - row)
                base = worker * room if mode == _FUSED else row * (depth // unit)
                a, b = task % slices * tiles // slices, (task % slices + 1) * tiles // slices
                if rows > middle * lanes:
                    full(mode, x, row, rows, columns, depth, mask, buffer, base, values, offsets, starts, tiles, a, b,
                         bias, shift, target, stride, strip)  # fmt: skip
                elif rows > lanes:
                    half(mode, x, row, rows, columns, depth, mask, buffer, base, values, offsets, starts, tiles, a, b,
                         bias, shift, target, stride, strip)  # fmt: skip
                else:
                    single(mode, x, row, rows, columns, depth, mask, buffer, base, values, offsets, starts, tiles, a, b,
                           bias, shift, target, stride, strip)  # fmt: skip

    return numba.njit(nogil=True, error_model="numpy", parallel=True)(kernel)
