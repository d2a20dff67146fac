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
from bstf_compiler.cpu.compiled import inlined
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
# Tiles of the input side by side that are loaded together, and whose elements are stored together.
UNIT = 4
# In place of the pixels of a row outside of the image.
_ABSENT = -(2**62)
# Tiles whose products become pixels together, if a row of them isn't longer: what they hold stays in the first cache.
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
    """Elements of scratch that the output's transform needs: a row of pixels, and all pixels of some tiles."""
    return TILE * (tiles_across + lanes) + TILE**2 * (max(_TOGETHER, tiles_across) + lanes)


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


def _zeros(builder: ir.IRBuilder, kind: ir.ArrayType) -> ir.Value:
    """A pointer to the first of some constant zeros."""
    zeros = ir.GlobalVariable(builder.module, kind, builder.module.get_unique_name("zeros"))
    zeros.initializer, zeros.global_constant, zeros.linkage = ir.Constant(kind, None), True, "internal"
    return builder.bitcast(zeros, kind.element.as_pointer())


def _are_between(builder: ir.IRBuilder, low: ir.Value, numbers: range, high: ir.Value) -> ir.Value:
    """For each of some numbers whether low <= number < high."""
    kind = ir.VectorType(ir.IntType(32), len(numbers))
    low, high = (simd.splat(builder, builder.trunc(bound, kind.element), kind.count) for bound in (low, high))
    known = ir.Constant(kind, list(numbers))
    return builder.and_(builder.icmp_signed("<=", low, known), builder.icmp_signed("<", known, high))


def _are_tuples(*values: types.Type) -> bool:
    return all(isinstance(value, types.UniTuple) for value in values)


@intrinsic(prefer_literal=True)
def load_columns(typing, array, places, lefts, width, lanes):
    """The SIDE columns of `lanes` tiles, UNIT of them side by side at each of some places.

    Vector j holds array[place + TILE * t + j] for tile t of a place. Of the elements from a place on, the image has
    [left, left + width); others are read as zeros, as is what is _ABSENT.
    """
    if not (simd.is_memory(array) and _are_tuples(places, lefts) and simd.are_literals(lanes)):
        return None
    vectors = types.UniTuple(Vector(array.dtype, lanes.literal_value), SIDE)

    def generate(context, builder, signature, arguments):
        kind, number = context.get_value_type(vectors.dtype), arguments[3].type
        absent, zeros = ir.Constant(number, _ABSENT), _zeros(builder, ir.ArrayType(kind.element, UNIT * TILE + TILE))
        near, next_ = [], []  # all pixels of the tiles; those of the tiles after them, which are their last columns
        for place, left in zip(*(cgutils.unpack_tuple(builder, one) for one in arguments[1:3])):
            address = simd.element_address(context, builder, array, arguments[0], place)
            address = builder.select(builder.icmp_signed("==", place, absent), zeros, address)
            right = builder.add(left, arguments[3])
            for first, parts in ((0, near), (TILE, next_)):
                for element in range(first, first + UNIT * TILE, kind.count):
                    value = simd.load_value(builder, builder.gep(address, [ir.Constant(number, element)]), kind)
                    inside = _are_between(builder, left, range(element, element + kind.count), right)
                    parts.append(builder.select(inside, value, ir.Constant(kind, None)))
        columns = _take_apart(builder, near) + _take_apart(builder, next_)[: SIDE - TILE]
        return context.make_tuple(builder, vectors, columns)

    return vectors(array, places, lefts, types.int64, lanes), generate


@intrinsic
def store_units(typing, vectors, array, places, stride):
    """Stores the parts of UNIT lanes of each vector at the places, those of vector i further by i * stride."""
    if not (isinstance(vectors, types.UniTuple) and simd.is_memory(array) and _are_tuples(places)):
        return None

    def generate(context, builder, signature, arguments):
        at = cgutils.unpack_tuple(builder, arguments[2])
        for vector in cgutils.unpack_tuple(builder, arguments[0]):
            for unit, place in enumerate(at):  # a row's last part may run into the next row, which is stored after it
                part = simd.shuffle(builder, vector, vector, list(range(unit * UNIT, (unit + 1) * UNIT)))
                address = simd.element_address(context, builder, array, arguments[1], place)
                simd.store_value(builder, part, address)
            at = [builder.add(place, arguments[3]) for place in at]
        return context.get_dummy_value()

    return types.void(vectors, array, places, types.int64), generate


@intrinsic
def interleave(typing, vectors):
    """Vectors a, b, .. to a0 b0 .. a1 b1 .., in as many vectors, a power of two."""
    if not isinstance(vectors, types.UniTuple):
        return None

    def generate(context, builder, signature, arguments):
        parts = cgutils.unpack_tuple(builder, arguments[0])
        return context.make_tuple(builder, vectors, simd.interleave(builder, parts, vectors.dtype.lanes))

    return vectors(vectors), generate


def _units(count: int) -> Callable:
    """Compiles the rows and columns of `count` units from one on, row by row, `across` a row."""
    if count == 1:

        def units(row, column, across):
            return (row,), (column,)

    else:
        others = _units(count - 1)

        def units(row, column, across):
            ends = column + 1 == across
            rows, columns = others(row + ends, 0 if ends else column + 1, across)
            return (row,) + rows, (column,) + columns

    return inlined(units)


def _of_each(count: int, function: Callable) -> Callable:
    """Compiles a tuple of function(row, column, ...) for the rows and columns of `count` units."""
    if count == 1:

        def values(rows, columns, *others):
            return (function(rows[0], columns[0], *others),)

    else:
        rest = _of_each(count - 1, function)

        def values(rows, columns, *others):
            return (function(rows[0], columns[0], *others),) + rest(rows[1:], columns[1:], *others)

    return inlined(values)


@inlined
def _source(row, column, step, x, line):
    """Where line `line` of a unit's tiles begins, of a plane of an image at x."""
    line += row * TILE - step.top
    if line < 0 or line >= step.x_height:
        return _ABSENT
    return x + line * step.x_pitch + column * (UNIT * TILE) - step.left


@inlined
def _left(row, column, step):
    """How many pixels after a unit's first one the image begins."""
    return step.left - column * (UNIT * TILE)


@inlined
def _target(row, column, step, y):
    """Where a unit's elements of a part lie, of a plane of an image at y."""
    return y + row * step.y_pitch + column * UNIT


def input_transform(isa: Isa) -> Callable:
    """Compiles B^T d B for all tiles of a plane; each element goes to the same plane of a part of its own.

    Rows of tiles follow one another without gaps, so the last vector ends less than a vector after the last tile.
    """
    lanes = FLOATS.lanes(isa)
    together = lanes // UNIT
    units = _units(together + 1)
    sources, lefts, targets = (_of_each(together, function) for function in (_source, _left, _target))

    def line_of(rows, columns, step, memory, x, line):
        places = sources(rows, columns, step, x, line)
        return load_columns(memory, places, lefts(rows, columns, step), step.x_width, lanes)

    line_of = inlined(line_of)

    def transform(step, plane, memory):
        across = (step.y_width + UNIT - 1) // UNIT
        for image in range(step.images):
            x = step.x + plane * step.x_plane + image * step.x_rows * step.x_pitch
            y = step.y + plane * step.y_plane + image * step.y_rows * step.y_pitch
            row = column = 0
            while row < step.y_height:
                rows, columns = units(row, column, across)
                upper = line_of(rows, columns, step, memory, x, 0) + line_of(rows, columns, step, memory, x, 1)
                middle = line_of(rows, columns, step, memory, x, 2) + line_of(rows, columns, step, memory, x, 3)
                lower = line_of(rows, columns, step, memory, x, 4) + line_of(rows, columns, step, memory, x, 5)
                result = _change_input(upper + middle + lower)
                places, stride = targets(rows, columns, step, y), step.part * step.y_plane
                if places[-1] - places[0] == lanes - UNIT:
                    simd.store_tile(result, 1, memory, places[0], stride)
                else:
                    store_units(result, memory, places, stride)
                row, column = rows[-1], columns[-1]

    return numba.njit(nogil=True, error_model="numpy")(transform)


def output_transform(isa: Isa) -> Callable:
    """Compiles A^T m A for all tiles of a plane, then bias, residual and rectifier; zeros around the images."""
    lanes = FLOATS.lanes(isa)
    inside = np.repeat(np.float32([1, 0]), lanes)

    def transform(step, plane, memory, biases, line):
        across = step.x_width
        together = max(1, _TOGETHER // across)
        stride = together * across + lanes
        tiles = TILE * (across + lanes)  # in `line`, after a row of pixels
        low, high = np.float32(step.low), np.float32(step.high)
        bias = simd.rows_of(biases, step.scale + plane, lanes, 1, 1)
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
                    at = (image * step.y_rows + row) * step.y_pitch
                    y, other = step.y + plane * step.y_plane + at, step.other + plane * step.other_plane + at
                    for column in range(0, step.y_width, lanes):
                        values = simd.add(simd.load(line, column, lanes, 1), bias)
                        if step.other >= 0:
                            values = simd.add(values, simd.load(memory, other + column, lanes, 1))
                        values = simd.keep(
                            simd.clamp(values, low, high),
                            simd.load(inside, max(0, column + lanes - step.y_width), lanes, 1),
                        )
                        simd.store(values, memory, y + column, 0)  # where it runs on, the next row is stored after it

    return numba.njit(nogil=True, error_model="numpy")(transform)
