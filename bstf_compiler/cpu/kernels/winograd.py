"""3x3 convolutions with a quarter of the multiplications, in float32: Winograd's minimal filtering.

The source is Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), section 4.3. F(4 x 4, 3 x 3)
computes a tile of 4 x 4 output pixels from one of 6 x 6 input pixels:

    Y = A^T [(G g G^T) * (B^T d B)] A

with `*` element by element: 36 multiplications in place of 144. Summed over input channels, an element of the product
is, for all tiles at once, a 1x1 convolution; there are 36 of them. Where the kernel g has a zero block, so has each of
them, so block sparsity saves as much here as it does in the direct convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bstf_compiler.cpu import simd
from bstf_compiler.cpu.kernels.conv import DEPTH, ConvWeights
from bstf_compiler.cpu.kernels.planes import clear
from bstf_compiler.cpu.layout import FLOATS
from bstf_compiler.cpu.simd import Isa, Vector
from bstf_compiler.graph import Conv

# Rows and columns of a tile of the output, and of the input pixels that it is made of.
TILE, SIDE = 4, 6
# The matrices B^T, G and A^T.
_INPUT = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
_KERNEL = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
_OUTPUT = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
_ELEMENTS = SIDE**2
# Tiles that go through a transform together, if a row of them isn't longer: what they hold stays in the first cache.
_TOGETHER = 48


def fits(weights: ConvWeights, op: Conv) -> bool:
    """Whether a convolution, packed for the direct way, can be computed this way."""
    window = op.window
    of_pixels = window.kernel == (3, 3) and window.strides == window.dilation == (1, 1) and op.groups == 1
    # More padding would be tiles of nothing but zeros.
    return of_pixels and min(weights.shape[2:]) >= DEPTH and max(window.padding) <= TILE


@dataclass(frozen=True)
class Costs:
    """Seconds, but for a common factor, of the parts of a convolution both ways.

    Attributes:
        weight: reading one weight of the direct way.
        product: multiplying one weight with one vector of pixels.
        tiled_weight: reading one transformed weight.
        tiled_product: multiplying one of them with one vector of tiles.
        transform: one element of a vector of tiles of a channel, to or from tiles.
    """

    weight: float
    product: float
    tiled_weight: float
    tiled_product: float
    transform: float

    @property
    def are_positive(self) -> bool:
        """Whether they can be costs: no part takes no or endless time, weights aside that the caches hold."""
        rest = (self.product, self.tiled_product, self.transform)
        return all(map(math.isfinite, astuple(self))) and min(astuple(self)) >= 0 and min(rest) > 0

    def pays(self, weights: ConvWeights, output: tuple[int, int], isa: Isa) -> bool:
        """Whether a convolution of one image that fits takes less time this way than directly.

        Args:
            weights: packed for the direct way.
            output: height and width of its result.
            isa: what the kernels are compiled for.
        """
        direct, tiled = work(weights.macs // 9, sum(weights.shape[2:]), output, isa)
        prices = astuple(self)
        return np.dot(tiled, prices[2:]) < np.dot(direct, prices[:2])


def work(kept: int, channels: int, output: tuple[int, int], isa: Isa) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """How much of each part (see `Costs`) a convolution has: directly (2 parts), and by this method (3).

    Args:
        kept: pairs of channels in kept blocks.
        channels: of the input and the output together.
        output: height and width of the result.
        isa: what the kernels are compiled for.
    """
    pixels = -(-math.prod(output) // FLOATS.lanes(isa))
    tiles = -(-math.prod(-(-length // TILE) for length in output) // FLOATS.lanes(isa))
    return (9 * kept, 9 * kept * pixels), (_ELEMENTS * kept, _ELEMENTS * kept * tiles, _ELEMENTS * channels * tiles)


def transform_kernel(kernel: np.ndarray) -> np.ndarray:
    """G g G^T for every pair of channels of a kernel (3, 3, cin, cout): (36, 1, 1, cin, cout), 36 kernels."""
    matrix = np.array(_KERNEL)
    transformed = np.einsum("ai,ijcd,bj->abcd", matrix, kernel.astype(np.float64), matrix)
    return transformed.astype(kernel.dtype).reshape(_ELEMENTS, 1, 1, *kernel.shape[2:])


def scratch(tiles_across: int, lanes: int) -> int:
    """Elements of scratch that a transform needs, the input's or the output's, whichever is more.

    The input's: the first TILE rows of pixels of some tiles and of the row of tiles below, column by column. The
    output's: a row of pixels, and all elements of some tiles.
    """
    together = max(_TOGETHER, tiles_across)
    of_input = TILE * SIDE * (together + tiles_across + lanes)
    of_output = TILE * (tiles_across + lanes) + _ELEMENTS * (together + lanes)
    return max(of_input, of_output)


def _linear(builder: ir.IRBuilder, factors: list[int], vectors: list[ir.Value]) -> ir.Value:
    """The sum of vectors times constants, one of which is 1."""
    first = factors.index(1)
    total = vectors[first]
    for place, (factor, vector) in enumerate(zip(factors, vectors)):
        if factor == 0 or place == first:
            continue
        if abs(factor) == 1:
            total = (builder.fadd if factor == 1 else builder.fsub)(total, vector)
        else:
            total = simd.fma(builder, simd.constant(vector.type, factor), vector, total)
    return total


def _both_sides(matrix: list[list[int]]) -> Callable:
    """Makes an intrinsic: M X M^T for a tuple of vectors X, a square row by row, and a constant M."""
    side = len(matrix[0])

    def combine(builder: ir.IRBuilder, vectors: list[ir.Value]) -> list[ir.Value]:
        return [_linear(builder, row, vectors) for row in matrix]

    @intrinsic
    def both_sides(typing, square):
        if not (isinstance(square, types.UniTuple) and square.count == side**2):
            return None
        result = types.UniTuple(square.dtype, len(matrix) ** 2)

        def generate(context, builder, signature, arguments):
            vectors = cgutils.unpack_tuple(builder, arguments[0])
            columns = [combine(builder, vectors[column::side]) for column in range(side)]
            rows = [combine(builder, list(row)) for row in zip(*columns)]
            return context.make_tuple(builder, result, [vector for row in rows for vector in row])

        return result(square), generate

    return both_sides


_change_input, _change_output = _both_sides(_INPUT), _both_sides(_OUTPUT)


def _take_apart(builder: ir.IRBuilder, vectors: list[ir.Value]) -> list[ir.Value]:
    """Every n-th element of n vectors that follow one another, from the first, the second, ... on; n a power of 2."""
    if len(vectors) == 1:
        return vectors
    lanes = vectors[0].type.count
    even, odd = (
        _take_apart(builder, [simd.shuffle(builder, *pair, order) for pair in zip(vectors[::2], vectors[1::2])])
        for order in (list(range(0, 2 * lanes, 2)), list(range(1, 2 * lanes, 2)))
    )
    return [vector for pair in zip(even, odd) for vector in pair]


@intrinsic(prefer_literal=True)
def load_columns(typing, array, index, lanes):
    """The SIDE columns of `lanes` tiles side by side: vector j holds array[index + TILE * tile + j]."""
    if not (simd.is_memory(array) and simd.are_literals(lanes)):
        return None
    vectors = types.UniTuple(Vector(array.dtype, lanes.literal_value), SIDE)

    def generate(context, builder, signature, arguments):
        kind = context.get_value_type(vectors.dtype)
        start = simd.element_address(context, builder, array, arguments[0], arguments[1])
        *parts, after = simd.load_neighbours(builder, start, kind, TILE + 1)
        columns = _take_apart(builder, parts)
        for column in range(SIDE - TILE):  # these are the next tile's first ones
            order = [*range(1, kind.count), kind.count + column]
            columns.append(simd.shuffle(builder, columns[column], after, order))
        return context.make_tuple(builder, vectors, columns)

    return vectors(array, types.intp, lanes), generate


@intrinsic
def interleave(typing, vectors):
    """Vectors a, b, .. to a0 b0 .. a1 b1 .., in as many vectors, a power of two."""
    if not isinstance(vectors, types.UniTuple):
        return None

    def generate(context, builder, signature, arguments):
        parts = cgutils.unpack_tuple(builder, arguments[0])
        return context.make_tuple(builder, vectors, simd.interleave(builder, parts, vectors.dtype.lanes))

    return vectors(vectors), generate


def _take_row(lanes: int) -> Callable:
    """Compiles the copy of a row of pixels from `source`, -1 for zeros: column j of all tiles to at + j * stride."""

    def take(step, memory, source, line, at, stride):
        across, end = step.y_width, step.left + step.x_width
        for tile in range(0, across, lanes):
            if source < 0:
                columns = simd.zeros(line, lanes, SIDE, 1)
            else:
                columns = load_columns(memory, source - step.left + TILE * tile, lanes)
            simd.store(columns, line, at + tile, stride)
        for column in range(step.left):  # zeros beside the image
            line[at + column * stride] = 0
        for column in range(end, TILE * across + SIDE - TILE):
            tile, j = column // TILE, column % TILE
            if tile < across:
                line[at + j * stride + tile] = 0
            if j + TILE < SIDE:
                line[at + (j + TILE) * stride + tile - 1] = 0

    return numba.njit(error_model="numpy")(take)


def input_transform(isa: Isa) -> Callable:
    """Compiles B^T d B for all tiles of a plane; each element goes to the same plane of a part of its own."""
    lanes = FLOATS.lanes(isa)
    take, take_few = _take_row(lanes), _take_row(lanes // 2)
    above, below = TILE * SIDE, (SIDE - TILE) * SIDE  # pixels of a tile in rows of its own, and of the tile below

    def transform(step, plane, memory, line):
        across = step.y_width
        together = max(1, _TOGETHER // across)
        stride = (together + 1) * across + lanes
        for image in range(step.images):
            x = step.x + plane * step.x_plane + image * step.x_rows * step.x_pitch
            for first in range(0, step.y_height, together):
                last = min(first + together, step.y_height)
                for place in range((last - first) * TILE + SIDE - TILE):
                    row = first * TILE + place - step.top
                    source = x + row * step.x_pitch if 0 <= row < step.x_height else -1
                    at = place % TILE * SIDE * stride + place // TILE * across
                    if 2 * across <= lanes:
                        take_few(step, memory, source, line, at, stride)
                    else:
                        take(step, memory, source, line, at, stride)
                y = step.y + plane * step.y_plane + (image * step.y_rows + first) * step.y_pitch
                for tile in range(0, (last - first) * across, lanes):
                    upper = simd.load_tile(line, tile, stride, lanes, above, 1)
                    lower = simd.load_tile(line, tile + across, stride, lanes, below, 1)  # the tile's below
                    simd.store_tile(_change_input(upper + lower), 1, memory, y + tile, step.part * step.y_plane)

    return numba.njit(nogil=True, error_model="numpy")(transform)


def output_transform(isa: Isa) -> Callable:
    """Compiles A^T m A for all tiles of a plane, then bias, residual and rectifier; zeros around the images."""
    lanes = FLOATS.lanes(isa)

    def transform(step, plane, memory, biases, line):
        across = step.x_width
        together = max(1, _TOGETHER // across)
        stride = together * across + lanes
        tiles = TILE * (across + lanes)  # in `line`, after a row of pixels
        low, high, bias = np.float32(step.low), np.float32(step.high), biases[step.scale + plane]
        clear(step, memory, step.y + plane * step.y_plane, 0)
        for image in range(step.images):
            for first in range(0, step.x_height, together):
                last = min(first + together, step.x_height)
                x = step.x + plane * step.x_plane + (image * step.x_rows + first) * step.x_pitch
                for tile in range(0, (last - first) * across, lanes):
                    square = simd.load_tile(memory, x + tile, step.part * step.x_plane, lanes, _ELEMENTS, 1)
                    simd.store_tile(_change_output(square), 1, line, tiles + tile, stride)
                for row in range(first * TILE, min(last * TILE, step.y_height)):
                    at = tiles + row % TILE * TILE * stride + (row // TILE - first) * across
                    for tile in range(0, across, lanes):
                        columns = interleave(simd.load_tile(line, at + tile, stride, lanes, TILE, 1))
                        simd.store(columns, line, TILE * tile, lanes)
                    at = plane * step.y_plane + (image * step.y_rows + row) * step.y_pitch
                    result = memory[step.y + at :][: step.y_width]
                    if step.other >= 0:
                        at = plane * step.other_plane + (image * step.y_rows + row) * step.y_pitch
                        other = memory[step.other + at :][: step.y_width]
                        for column in range(step.y_width):
                            result[column] = min(max(line[column] + bias + other[column], low), high)
                    else:
                        for column in range(step.y_width):
                            result[column] = min(max(line[column] + bias, low), high)

    return numba.njit(nogil=True, error_model="numpy")(transform)
