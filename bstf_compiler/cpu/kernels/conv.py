"""Convolution of block-sparse kernels on channel-major images (see `bstf_compiler.cpu.layout`).

A tile is `columns` output channels times some vectors of pixels; it stays in registers over all kept blocks and kernel
positions, which are entries of a list: the weights, and an offset from the output pixel to the input one. Bias,
residual, rectifier and the zeros around the image are part of the tile's end, so an activation is written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numba
import numpy as np

from bstf_compiler import bsr
from bstf_compiler.cpu import access, simd
from bstf_compiler.cpu.simd import Isa
from bstf_compiler.cpu.tiles import aligned

# Input channels of an entry. Images with fewer are read channel by channel.
DEPTH = 8
# Vectors of pixels of the widest tile.
VECTORS = 3


def tile_columns(isa: Isa) -> int:
    """Output channels of a tile: with `VECTORS` vectors each, they leave registers for operands."""
    return 8 if isa.registers >= 32 else 4


@dataclass(frozen=True)
class ConvWeights:
    """A kernel without its zero blocks, in the order in which tiles read it.

    Attributes:
        shape: (kh, kw, cin, cout).
        depth: input channels of an entry.
        starts: (tiles + 1) where the entries of each tile of output channels begin.
        channels: first input channel of each entry.
        positions: (entries, 2) row and column of the kernel of each entry.
        values: flat, `depth` x columns each entry.
        bias: one value an output channel, zeros up to the last tile.
    """

    shape: tuple[int, int, int, int]
    depth: int
    starts: np.ndarray
    channels: np.ndarray
    positions: np.ndarray
    values: np.ndarray
    bias: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of weights, bias and index."""
        return self.values.nbytes + self.bias.nbytes + 4 * len(self.channels) + self.starts.nbytes

    @property
    def macs(self) -> int:
        """Effective multiply-adds an output pixel."""
        return self.values.size


def pack(kernel: np.ndarray, bias: np.ndarray | None, isa: Isa) -> ConvWeights:
    """Packs a float kernel (kh, kw, cin, cout) and its bias (cout,), or None for zeros."""
    kh, kw, cin, cout = kernel.shape
    columns, depth = tile_columns(isa), DEPTH if cin >= DEPTH else 1
    # Whole steps of channels are written, so that the next layer reads zeros beyond the last one.
    packed = bsr.pack(np.pad(kernel, ((0, 0), (0, 0), (0, 0), (0, -cout % DEPTH))), (depth, columns))
    entries = len(packed.rows) * kh * kw
    row, column = np.divmod(np.tile(np.arange(kh * kw), len(packed.rows)), kw)
    filled = np.zeros((len(packed.starts) - 1) * columns, kernel.dtype)
    if bias is not None:
        filled[:cout] = bias
    return ConvWeights(
        kernel.shape,
        depth,
        packed.starts * kh * kw,
        np.repeat(packed.rows * depth, kh * kw),
        np.stack([row, column], axis=1).reshape(entries, 2),
        aligned(packed.blocks),
        filled,
    )


def tile_kernel(isa: Isa, vectors: int, depth: int) -> Callable:
    """Compiles the computation of a tile of float32 sums.

    Its arguments: the memory of all activations; `x`, index of the first output pixel's own place in the input, and the
    input's plane; values and offsets with the layer's first of each, and the tile's entries [start, stop); the bias and
    its index; `other`, index of a tensor to add or -1, and its plane; the rectifier's bounds; the mask (nonzero: a
    pixel of the image) and its index or -1; index and plane of the output.
    """
    lanes, columns = isa.lanes(np.float32), tile_columns(isa)

    def tile(
        memory, x, x_plane, values, first_value, offsets, first_offset, start, stop, bias, channel,
        other, other_plane, low, high, mask, pixel, y, y_plane,
    ):  # fmt: skip
        for row in range(columns):  # what the tile's end needs comes from afar, and is asked for before the work
            for vector in range(vectors):
                access.prefetch_to_write(memory, y + row * y_plane + vector * lanes)
                if other >= 0:
                    access.prefetch(memory, other + row * other_plane + vector * lanes)
        sums = simd.zeros(memory, lanes, columns, vectors)
        weight = first_value + start * (depth * columns)
        for entry in range(first_offset + start, first_offset + stop):
            place = x + offsets[entry]
            for k in range(depth):
                pixels = simd.load(memory, place + k * x_plane, lanes, vectors)
                sums = simd.fma_outer(sums, pixels, values, weight + k * columns, 1)
            weight += depth * columns
        sums = simd.add_rows(sums, vectors, bias, channel)
        if other >= 0:
            sums = simd.add(sums, simd.load_tile(memory, other, other_plane, lanes, columns, vectors))
        sums = simd.clamp(sums, low, high)
        if pixel >= 0:
            sums = simd.keep(sums, simd.load(mask, pixel, lanes, vectors))
        simd.store_tile(sums, vectors, memory, y, y_plane)

    return numba.njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(tile)
