"""Convolution of block-sparse kernels on channel-major images (see `bstf_compiler.cpu.layout`).

A tile is `columns` output channels times some vectors of pixels; it stays in registers over all kept blocks and kernel
positions, which are entries of a list: the weights, and an offset from the output pixel to the input one. Bias,
residual, rectifier and the zeros around the image are part of the tile's end, so an activation is written once.

A 1x1 kernel reads some pixels of many planes, and does so again for every tile of output channels: from as many pages,
and with lines of the cache whose other pixels it doesn't need. Tiles of such kernels read panels instead, in which the
pixels of a tile of all planes follow one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bstf_compiler import bsr
from bstf_compiler.cpu import access, dots, simd, words
from bstf_compiler.cpu.compiled import inlined
from bstf_compiler.cpu.layout import ALIGNMENT, FLOATS, WORDS, Format, round_up
from bstf_compiler.cpu.simd import Isa
from bstf_compiler.cpu.tiles import aligned, quads

# Channels are stored in multiples of this, and an entry has so many input channels.
DEPTH = 8
# Shapes of tiles: DEPTH channels in; a plane in, for images of few channels; a plane in and out, for depthwise layers.
DEEP, SHALLOW, THIN = range(3)
# Vectors of pixels of the widest tile.
VECTORS = 3


def tile_columns(isa: Isa) -> int:
    """Output channels of a tile: with the most vectors each, they leave registers for operands."""
    return 8 if isa.registers >= 32 else 4


def tile_shape(isa: Isa, format: Format, shape: int) -> tuple[int, int]:
    """Input and output channels of the entries of a tile."""
    return (DEPTH if shape == DEEP else format.channels), (format.channels if shape == THIN else tile_columns(isa))


def tile_vectors(isa: Isa, format: Format) -> int:
    """Vectors of pixels of a tile. Bytes that are widened to int16 take two registers each."""
    return VECTORS if format == FLOATS or isa.dot else VECTORS - 1


@dataclass(frozen=True)
class ConvWeights:
    """A kernel without its zero blocks, in the order in which tiles read it.

    Attributes:
        shape: (kh, kw, cin, cout).
        shape_of_tiles: DEEP, SHALLOW or THIN.
        columns: output channels of a tile.
        starts: (tiles + 1) where the entries of each tile of output channels begin.
        channels: first input channel of each entry.
        positions: (entries, 2) row and column of the kernel of each entry.
        values: flat, input channels x columns each entry; for int8 as the dot products take them.
        macs: effective multiply-adds an output pixel.
        bias: what the sums of each output channel start with, zeros up to the last tile.
        parts: kernels side by side, each with input and output channels of its own.
    """

    shape: tuple[int, int, int, int]
    shape_of_tiles: int
    columns: int
    starts: np.ndarray
    channels: np.ndarray
    positions: np.ndarray
    values: np.ndarray
    macs: int
    bias: np.ndarray
    parts: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of weights, bias and index."""
        return self.values.nbytes + self.bias.nbytes + 4 * len(self.channels) + self.starts.nbytes


def pack(kernel: np.ndarray, start: np.ndarray, groups: int, isa: Isa, format: Format) -> ConvWeights:
    """Packs a kernel (kh, kw, cin / groups, cout), float32 or int8, and what its sums start with (cout,).

    Groups are blocks along the diagonal of a kernel without groups, whose other blocks are zero.
    """
    kh, kw, per_group, cout = kernel.shape
    cin = per_group * groups
    shape = THIN if groups == cin == cout else DEEP if cin >= DEPTH else SHALLOW
    depth, columns = tile_shape(isa, format, shape)
    # Whole steps of channels are written, so that the next layer reads zeros beyond the last one.
    whole = np.pad(bsr.ungrouped(kernel, groups), ((0, 0), (0, 0), (0, 0), (0, -cout % DEPTH)))
    packed = bsr.pack(whole, (depth, columns))
    entries = packed.blocks.reshape(-1, depth, columns)
    # A dense layer after an image is a convolution with a kernel position a pixel: its zero blocks lie in one of them.
    kept = entries.any(axis=(1, 2))
    starts = np.concatenate([[0], np.cumsum(kept)])[packed.starts * kh * kw]
    block, position = np.divmod(np.flatnonzero(kept), kh * kw)
    blocks = entries[kept]
    filled = np.zeros((len(packed.starts) - 1) * columns, format.dtype)
    filled[:cout] = start
    return ConvWeights(
        (kh, kw, cin, cout),
        shape,
        columns,
        starts,
        packed.rows[block] * depth,
        np.stack(np.divmod(position, kw), axis=1),
        aligned(blocks if format == FLOATS else quads(blocks, isa)),
        blocks.size,
        filled,
        cin if shape == THIN else 1,
    )


def part_channels(channels: int) -> int:
    """Channels from one of several parts to the next.

    They are odd, so that planes of the same place in all parts, which Winograd's method reads and writes together,
    don't fall on the same lines of a cache.
    """
    return round_up(channels, DEPTH) + 1


def join(kernels: Sequence[ConvWeights]) -> ConvWeights:
    """1x1 kernels of one shape side by side, each with `part_channels` input and output channels of its own."""
    kh, kw, cin, cout = kernels[0].shape
    cin, cout = part_channels(cin), part_channels(cout)
    entries = np.cumsum([0, *(len(one.channels) for one in kernels)])
    return replace(
        kernels[0],
        shape=(kh, kw, cin * len(kernels), cout * len(kernels)),
        starts=np.concatenate([[0], *(one.starts[1:] + first for one, first in zip(kernels, entries))]),
        channels=np.concatenate([one.channels + part * cin for part, one in enumerate(kernels)]),
        positions=np.concatenate([one.positions for one in kernels]),
        values=np.concatenate([one.values for one in kernels]),
        macs=sum(one.macs for one in kernels),
        bias=np.concatenate([one.bias for one in kernels]),
        parts=len(kernels),
    )


def tile_kernel(isa: Isa, format: Format, vectors: int, shape: int) -> Callable:
    """Compiles the computation of a tile of so many vectors of pixels.

    Its arguments: the step (`STEP`); the tile's first pixel, its place among the tiles of output channels, and its
    first plane; where its pixels are read, and from which element on; the memory of all activations; the values,
    offsets, starts and biases of all layers; and the masks.
    """
    lanes, (depth, columns) = format.lanes(isa), tile_shape(isa, format, shape)
    in_planes, out_planes = depth // format.channels, columns // format.channels
    plane_size = columns if format == FLOATS or isa.dot else 2 * columns
    multiply = _multiply(isa, format)
    finish = (_finish_floats if format == FLOATS else _finish_words)(lanes, columns, vectors)

    def tile(step, pixel, channels, first, source, base, memory, values, offsets, starts, biases, masks):
        y = step.y + pixel + first * step.y_plane
        other = step.other + pixel + first * step.other_plane if step.other >= 0 else -1
        for plane in range(out_planes if other >= 0 else 0):  # the residual comes from afar: it is asked for early
            for vector in range(vectors):
                access.prefetch(memory, other + plane * step.other_plane + vector * lanes)
        sums = simd.rows_of(biases, step.bias + channels * columns, lanes, columns, vectors)
        start, stop = starts[step.starts + channels], starts[step.starts + channels + 1]
        weight = step.values + start * (in_planes * plane_size)
        following = (stop - start) * (in_planes * plane_size)  # the next tile's weights
        for entry in range(step.offsets + start, step.offsets + stop):
            place = base + offsets[entry]
            for line in range(0, in_planes * plane_size, ALIGNMENT):
                access.prefetch(values, weight + following + line)
            for plane in range(in_planes):
                pixels = simd.load(source, place + plane * step.stride, lanes, vectors)
                sums = multiply(sums, pixels, values, weight)
                weight += plane_size
        finish(step, sums, memory, other, masks, step.mask + pixel if step.mask >= 0 else -1, y)

    return inlined(tile)


def pack_panel(isa: Isa, format: Format) -> Callable:
    """Compiles the copy of the pixels of a tile of all planes, from `pixel` on, to the panel at `panel`."""
    lanes, planes = format.lanes(isa), DEPTH // format.channels

    def pack_(step, pixel, memory, panel, at):
        for first in range(step.x + pixel, step.x + pixel + step.channels * step.x_plane, planes * step.x_plane):
            for vector in range(0, step.stride, lanes):
                for plane in range(planes):
                    copied = simd.load(memory, first + plane * step.x_plane + vector, lanes, 1)
                    simd.store(copied, panel, at + plane * step.stride + vector, lanes)
            at += planes * step.stride

    return inlined(pack_)


def _multiply(isa: Isa, format: Format) -> Callable:
    """Compiles what a plane of the input adds to the sums."""
    if format == FLOATS:

        def multiply(sums, pixels, values, weight):
            return simd.fma_outer(sums, pixels, values, weight, 1)

    elif isa.dot:

        def multiply(sums, pixels, values, weight):
            return dots.dot_outer(sums, pixels, values, weight)

    else:

        def multiply(sums, pixels, values, weight):
            return dots.widened_outer(sums, pixels, values, weight)

    return inlined(multiply)


def _finish_floats(lanes: int, columns: int, vectors: int) -> Callable:
    """Compiles the end of a tile: residual, rectifier, zeros around the image."""

    def finish(step, sums, memory, other, masks, mask, y):
        if other >= 0:
            sums = simd.add(sums, simd.load_tile(memory, other, step.other_plane, lanes, columns, vectors))
        sums = simd.clamp(sums, np.float32(step.low), np.float32(step.high))
        if mask >= 0:
            sums = simd.keep(sums, simd.load(masks, mask, lanes, vectors))
        simd.store_tile(sums, vectors, memory, y, step.y_plane)

    return inlined(finish)


def _finish_words(lanes: int, columns: int, vectors: int) -> Callable:
    """Compiles the end of a tile of int32 sums, which hold their rounding: the residual has grids of its own."""
    planes, zero = columns // WORDS.channels, WORDS.zero

    def finish(step, sums, memory, other, masks, mask, y):
        result = words.narrow(words.shift_right(sums, step.shift), vectors)
        if other >= 0:
            added = simd.xor(simd.load_tile(memory, other, step.other_plane, lanes, planes, vectors), zero)
            added = words.widen(added, vectors, step.other_up)
            total = simd.add(words.widen(result, vectors, step.up), added)
            result = words.narrow(words.round_right(total, step.cut), vectors)
        result = words.clamp(result, np.int64(step.low), np.int64(step.high))
        if mask >= 0:
            result = simd.keep(result, simd.load(masks, mask, lanes, vectors))
        simd.store_tile(simd.xor(result, zero), vectors, memory, y, step.y_plane)

    return inlined(finish)
