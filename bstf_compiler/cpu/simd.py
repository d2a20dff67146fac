"""Typed SIMD vectors inside Numba functions.

LLVM's loop vectoriser reaches a fifth of what a CPU can do on small matrix products: it does not keep a tile of sums in
registers. The intrinsics of this file let a Numba function say what it wants held in registers, in plain Python:

    vectors = load(panel, index, lanes, count)       # a tuple of `count` vectors of `lanes` elements
    tile = zeros(panel, lanes, rows, count)          # a tile: `rows` x `count` vectors, row by row
    tile = fma_outer(tile, vectors, weights, index, 1)  # tile[r] += weights[index + r] * vectors, for every row r
    store_transposed(tile, count, out, index, stride)

Vectors and tuples of vectors are values: LLVM keeps them in registers. They cannot leave compiled code. `lanes` and
`count` are compile-time constants (globals or variables of the enclosing function). Indices count elements from the
first element of a C-contiguous array, whatever its number of axes; nothing is checked. Addresses need no alignment
beyond that of one byte: on the machines of today an unaligned load of aligned data costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model


@dataclass(frozen=True)
class Isa:
    """What the kernels need to know of an instruction set.

    Attributes:
        name: as in `ISAS`.
        vector_bytes: width of a vector.
        registers: how many vectors the register file holds.
        dot: whether `vpdpbusd` multiplies four pairs of bytes and adds them to an int32 in one instruction.
    """

    name: str
    vector_bytes: int
    registers: int
    dot: bool = False

    def lanes(self, dtype: np.dtype) -> int:
        """How many elements of `dtype` a vector holds."""
        return self.vector_bytes // np.dtype(dtype).itemsize


ISAS = {
    isa.name: isa
    for isa in (
        Isa("avx512_vnni", 64, 32, dot=True),
        Isa("avx512", 64, 32),
        Isa("avx2", 32, 16),
        Isa("portable", 16, 16),  # LLVM's generic 128 bits: SSE2, NEON
    )
}


def target_features() -> set[str]:
    """The CPU features Numba compiles for: the host's, or those its settings name instead."""
    if numba.config.CPU_FEATURES is not None:
        return {feature[1:] for feature in numba.config.CPU_FEATURES.split(",") if feature.startswith("+")}
    return {feature for feature, present in llvm.get_host_cpu_features().items() if present}


def host_isa() -> Isa:
    """The widest instruction set of `ISAS` that Numba compiles for on this machine."""
    return ISAS[choose(target_features())]


def choose(features: set[str]) -> str:
    """The name of the widest instruction set that LLVM's names of `features` allow."""
    if {"avx512f", "avx512bw", "avx512vl", "avx512vnni"} <= features:
        return "avx512_vnni"
    if {"avx512f", "avx512bw", "avx512vl"} <= features:
        return "avx512"
    return "avx2" if {"avx2", "fma"} <= features else "portable"


class Vector(types.Type):
    """The Numba type of `lanes` elements of the scalar type `element`."""

    def __init__(self, element: types.Type, lanes: int) -> None:
        self.element = element
        self.lanes = lanes
        super().__init__(name=f"Vector({element}, {lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: object, vector: Vector) -> None:
        super().__init__(manager, vector, ir.VectorType(manager.lookup(vector.element).get_value_type(), vector.lanes))


_INT32 = ir.IntType(32)


def are_literals(*values: types.Type) -> bool:
    """Whether the compiler knows these integers."""
    return all(isinstance(value, types.IntegerLiteral) for value in values)


def is_memory(kind: types.Type) -> bool:
    """Whether these functions can read and write it: an array, or what `pointer` makes of one."""
    return isinstance(kind, (types.Array, types.CPointer))


def element_address(
    context: object, builder: ir.IRBuilder, kind: types.Type, array: ir.Value, index: ir.Value
) -> ir.Value:
    """The address of array[index]."""
    if isinstance(kind, types.CPointer):
        return builder.gep(array, [index])
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


@intrinsic
def pointer(typing, array):
    """Where an array's elements are, for what is called for every tile.

    Functions count their references to the arrays that they are given, in memory shared by all threads; such a count
    takes longer than some tiles do. Who makes a pointer keeps the array.
    """
    if not isinstance(array, types.Array):
        return None

    def generate(context, builder, signature, arguments):
        return context.make_array(array)(context, builder, arguments[0]).data

    return types.CPointer(array.dtype)(array), generate


def load_value(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    """A vector or an element of this type, of any alignment."""
    return builder.load(builder.bitcast(address, kind.as_pointer()), align=1, typ=kind)


def load_neighbours(builder: ir.IRBuilder, address: ir.Value, kind: ir.VectorType, count: int) -> list[ir.Value]:
    """`count` vectors that follow one another from `address`, a pointer to an element."""
    places = [builder.gep(address, [ir.Constant(_INT32, place * kind.count)]) for place in range(count)]
    return [load_value(builder, place, kind) for place in places]


def store_value(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    """Stores a vector or an element at an address of any alignment."""
    builder.store(value, builder.bitcast(address, value.type.as_pointer()), align=1)


def constant(kind: ir.VectorType, value: int) -> ir.Constant:
    """A vector of one value."""
    return ir.Constant(kind, [value] * kind.count)


def splat(builder: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    """A vector of so many times the scalar."""
    kind = ir.VectorType(scalar.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_INT32, lanes), [0] * lanes))


def shuffle(builder: ir.IRBuilder, low: ir.Value, high: ir.Value, lanes: list[int]) -> ir.Value:
    """The vector of these lanes of two vectors, one after the other."""
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_INT32, len(lanes)), lanes))


def call_intrinsic(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Value]) -> ir.Value:
    """Calls an intrinsic of LLVM."""
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(result, [one.type for one in arguments]), name)
    return builder.call(function, arguments)


def fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """The product of two vectors of floats plus a third."""
    # `fmuladd`, not `fma`: without the instruction the latter is a call into the C library for every lane.
    return call_intrinsic(builder, f"llvm.fmuladd.v{c.type.count}f{_bits(c.type.element)}", c.type, [a, b, c])


@intrinsic(prefer_literal=True)
def load(typing, array, index, lanes, count):
    """A tuple of `count` vectors of `lanes` elements that follow one another from array[index]."""
    if not (is_memory(array) and are_literals(lanes, count)):
        return None
    vectors = types.UniTuple(Vector(array.dtype, lanes.literal_value), count.literal_value)

    def generate(context, builder, signature, arguments):
        start = element_address(context, builder, array, arguments[0], arguments[1])
        parts = load_neighbours(builder, start, context.get_value_type(vectors.dtype), vectors.count)
        return context.make_tuple(builder, vectors, parts)

    return vectors(array, types.intp, lanes, count), generate


@intrinsic(prefer_literal=True)
def load_rows(typing, like, array, index, stride, rows, lanes):
    """A square: `lanes` vectors of the type of `like`, vector i from array[index + min(i, rows - 1) * stride] on."""
    if not (is_memory(like) and is_memory(array) and are_literals(lanes)):
        return None
    vectors = types.UniTuple(Vector(like.dtype, lanes.literal_value), lanes.literal_value)

    def generate(context, builder, signature, arguments):
        _, base, index_, stride_, rows_, _ = arguments
        kind = context.get_value_type(vectors.dtype)
        last = builder.sub(rows_, ir.Constant(rows_.type, 1))
        parts = []
        for place in range(vectors.count):
            row = ir.Constant(rows_.type, place)
            row = builder.select(builder.icmp_signed("<", row, last), row, last)
            at = builder.add(index_, builder.mul(row, stride_))
            parts.append(load_value(builder, element_address(context, builder, array, base, at), kind))
        return context.make_tuple(builder, vectors, parts)

    return vectors(like, array, types.intp, types.intp, types.intp, lanes), generate


@intrinsic(prefer_literal=True)
def store(typing, vectors, array, index, stride):
    """Stores vector i of a tuple at array[index + i * stride]."""
    if not (isinstance(vectors, types.UniTuple) and is_memory(array)):
        return None

    def generate(context, builder, signature, arguments):
        at = arguments[2]
        for vector in cgutils.unpack_tuple(builder, arguments[0]):
            store_value(builder, vector, element_address(context, builder, array, arguments[1], at))
            at = builder.add(at, arguments[3])
        return context.get_dummy_value()

    return types.void(vectors, array, types.intp, types.intp), generate


@intrinsic(prefer_literal=True)
def zeros(typing, array, lanes, rows, count):
    """A tile of zeros of the array's type: `rows` rows of `count` vectors of `lanes` elements."""
    if not (is_memory(array) and are_literals(lanes, rows, count)):
        return None
    vectors = types.UniTuple(Vector(array.dtype, lanes.literal_value), rows.literal_value * count.literal_value)

    def generate(context, builder, signature, arguments):
        zero = ir.Constant(context.get_value_type(vectors.dtype), None)
        return context.make_tuple(builder, vectors, [zero] * vectors.count)

    return vectors(array, lanes, rows, count), generate


def _bits(element: ir.Type) -> int:
    return element.width if isinstance(element, ir.IntType) else {"float": 32, "double": 64}[str(element)]


def _segment(kind: ir.VectorType) -> int:
    """Elements in 128 bits. Shuffles within these are the cheapest ones of x86, so transpositions begin with them."""
    return min(kind.count, 128 // _bits(kind.element))


def interleave(builder: ir.IRBuilder, vectors: list[ir.Value], segment: int, unit: int = 1) -> list[ir.Value]:
    """Vectors a, b, .. to a0 b0 .. a1 b1 .. in as many vectors, segment by segment. A power of two of them.

    A vector's segments are `segment` elements long; a0 stands for `unit` elements that stay together.
    """
    lanes, half = vectors[0].type.count, len(vectors) // 2
    low, high = [], []
    for base in range(0, lanes, segment):
        for place in range(0, segment, unit):
            start = base + lanes * (place // unit % 2) + place // unit // 2 * unit
            low += range(start, start + unit)
            high += range(start + segment // 2, start + segment // 2 + unit)
    for _ in range(half.bit_length()):
        pairs = list(zip(vectors[:half], vectors[half:]))
        vectors = [shuffle(builder, a, b, order) for a, b in pairs for order in (low, high)]
    return vectors


def _columns(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[list[ir.Value]]:
    """The columns of a matrix of which these vectors are the rows, each as one or more vectors."""
    lanes, segment = rows[0].type.count, _segment(rows[0].type)
    side, length = min(len(rows), segment), min(len(rows), lanes)
    pieces, neighbours = len(rows) // length, segment // side
    groups = [interleave(builder, rows[start : start + side], segment) for start in range(0, len(rows), side)]
    columns: list[list[ir.Value]] = [[] for _ in range(lanes)]
    for which, parts in enumerate(zip(*groups)):  # each group's columns `which` of every segment
        vectors = list(parts)
        if len(vectors) > 1 and lanes > side:
            vectors = interleave(builder, vectors, lanes, side)
        for place in range(lanes * len(vectors) // length):
            vector, start = vectors[place * length // lanes], place * length % lanes
            piece = place // pieces
            column = piece // neighbours * segment + which * neighbours + piece % neighbours
            part = shuffle(builder, vector, vector, list(range(start, start + length))) if length < lanes else vector
            columns[column].append(part)
    return columns


@intrinsic
def transpose(typing, vectors):
    """The transpose of a square: as many vectors as a vector has lanes."""
    if not (isinstance(vectors, types.UniTuple) and vectors.count == vectors.dtype.lanes):
        return None

    def generate(context, builder, signature, arguments):
        columns = _columns(builder, cgutils.unpack_tuple(builder, arguments[0]))
        return context.make_tuple(builder, vectors, [vector for column in columns for vector in column])

    return vectors(vectors), generate


@intrinsic
def xor(typing, vectors, mask):
    """Every element of a tuple of integer vectors, exclusive or `mask`."""
    if not isinstance(vectors, types.UniTuple):
        return None

    def generate(context, builder, signature, arguments):
        kind = context.get_value_type(vectors.dtype)
        spread = splat(builder, builder.trunc(arguments[1], kind.element), kind.count)
        parts = [builder.xor(vector, spread) for vector in cgutils.unpack_tuple(builder, arguments[0])]
        return context.make_tuple(builder, vectors, parts)

    return vectors(vectors, types.int64), generate


def _pairwise(tile: types.Type, others: types.Type, combine: Callable) -> tuple | None:
    """Combines two tiles vector by vector; one of fewer vectors begins again."""
    if not (isinstance(tile, types.UniTuple) and isinstance(others, types.UniTuple) and tile.dtype == others.dtype):
        return None

    def generate(context, builder, signature, arguments):
        vectors, met = (cgutils.unpack_tuple(builder, value) for value in arguments)
        results = [combine(builder, one, met[place % len(met)]) for place, one in enumerate(vectors)]
        return context.make_tuple(builder, tile, results)

    return tile(tile, others), generate


def _is_integer(vector: ir.Value) -> bool:
    return isinstance(vector.type.element, ir.IntType)


def _add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.add(a, b) if _is_integer(a) else builder.fadd(a, b)


def _subtract(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.sub(a, b) if _is_integer(a) else builder.fsub(a, b)


def _multiply(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.mul(a, b) if _is_integer(a) else builder.fmul(a, b)


def _largest(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@intrinsic
def add(typing, tile, others):
    """The sum of two tiles; `others` may be one row for all."""
    return _pairwise(tile, others, _add)


@intrinsic
def subtract(typing, tile, others):
    """The difference of two tiles; `others` may be one row for all."""
    return _pairwise(tile, others, _subtract)


@intrinsic
def multiply(typing, tile, others):
    """The product of two tiles, element by element; `others` may be one row for all."""
    return _pairwise(tile, others, _multiply)


@intrinsic
def largest(typing, tile, others):
    """The larger of each two elements of two tiles of floats."""
    return _pairwise(tile, others, _largest)


@intrinsic
def fma_outer(typing, tile, vectors, weights, index, stride):
    """tile[r, v] + weights[index + r * stride] * vectors[v] for every row r and vector v of a tile of floats."""
    if not (isinstance(tile, types.UniTuple) and is_memory(weights)):
        return None

    def generate(context, builder, signature, arguments):
        sums = cgutils.unpack_tuple(builder, arguments[0])
        parts = cgutils.unpack_tuple(builder, arguments[1])
        at = arguments[3]
        for row in range(tile.count // vectors.count):
            address = element_address(context, builder, weights, arguments[2], at)
            weight = splat(builder, load_value(builder, address, parts[0].type.element), tile.dtype.lanes)
            for place, part in enumerate(parts, row * len(parts)):
                sums[place] = fma(builder, weight, part, sums[place])
            at = builder.add(at, arguments[4])
        return context.make_tuple(builder, tile, sums)

    return tile(tile, vectors, weights, types.intp, types.intp), generate


@intrinsic(prefer_literal=True)
def rows_of(typing, values, index, lanes, rows, count):
    """A tile of which every element of row r is values[index + r]."""
    if not (is_memory(values) and are_literals(lanes, rows, count)):
        return None
    tile = types.UniTuple(Vector(values.dtype, lanes.literal_value), rows.literal_value * count.literal_value)

    def generate(context, builder, signature, arguments):
        parts = []
        for row in range(rows.literal_value):
            at = builder.add(arguments[1], ir.Constant(arguments[1].type, row))
            address = element_address(context, builder, values, arguments[0], at)
            value = load_value(builder, address, context.get_value_type(values.dtype))
            parts += [splat(builder, value, tile.dtype.lanes)] * count.literal_value
        return context.make_tuple(builder, tile, parts)

    return tile(values, types.intp, lanes, rows, count), generate


@intrinsic(prefer_literal=True)
def add_rows(typing, tile, count, values, index):
    """tile[r] + values[index + r] for every row r of a tile of `count` vectors a row."""
    if not (isinstance(tile, types.UniTuple) and is_memory(values) and are_literals(count)):
        return None

    def generate(context, builder, signature, arguments):
        sums = cgutils.unpack_tuple(builder, arguments[0])
        for place, one in enumerate(sums):
            row = ir.Constant(arguments[3].type, place // count.literal_value)
            address = element_address(context, builder, values, arguments[2], builder.add(arguments[3], row))
            value = load_value(builder, address, one.type.element)
            sums[place] = _add(builder, one, splat(builder, value, one.type.count))
        return context.make_tuple(builder, tile, sums)

    return tile(tile, count, values, types.intp), generate


def limit(builder: ir.IRBuilder, value: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
    """min(max(value, low), high) for signed integers."""
    value = builder.select(builder.icmp_signed("<", value, low), low, value)
    return builder.select(builder.icmp_signed(">", value, high), high, value)


@intrinsic
def requantise(typing, tile, shift):
    """clamp(floor(tile * 2**-shift + 1/2), -128, 127) for an int32 tile, 0 <= shift < 31."""
    if not isinstance(tile, types.UniTuple):
        return None

    def generate(context, builder, signature, arguments):
        kind = context.get_value_type(tile.dtype)
        one = ir.Constant(arguments[1].type, 1)
        half = builder.lshr(builder.shl(one, arguments[1]), one)
        half, cut = (splat(builder, builder.trunc(value, kind.element), kind.count) for value in (half, arguments[1]))
        low, high = constant(kind, -128), constant(kind, 127)
        results = []
        for value in cgutils.unpack_tuple(builder, arguments[0]):
            results.append(limit(builder, builder.ashr(builder.add(value, half), cut), low, high))
        return context.make_tuple(builder, tile, results)

    return tile(tile, types.int64), generate


@intrinsic(prefer_literal=True)
def load_tile(typing, array, index, stride, lanes, rows, count):
    """A tile: row r is `count` vectors that follow one another from array[index + r * stride]."""
    if not (is_memory(array) and are_literals(lanes, rows, count)):
        return None
    vectors = types.UniTuple(Vector(array.dtype, lanes.literal_value), rows.literal_value * count.literal_value)

    def generate(context, builder, signature, arguments):
        kind, at, parts = context.get_value_type(vectors.dtype), arguments[1], []
        for _ in range(rows.literal_value):
            address = element_address(context, builder, array, arguments[0], at)
            parts += load_neighbours(builder, address, kind, count.literal_value)
            at = builder.add(at, arguments[2])
        return context.make_tuple(builder, vectors, parts)

    return vectors(array, types.intp, types.intp, lanes, rows, count), generate


@intrinsic(prefer_literal=True)
def store_tile(typing, tile, count, array, index, stride):
    """Stores a tile of `count` vectors a row: row r from array[index + r * stride] on."""
    if not (isinstance(tile, types.UniTuple) and is_memory(array) and are_literals(count)):
        return None

    def generate(context, builder, signature, arguments):
        vectors, at = cgutils.unpack_tuple(builder, arguments[0]), arguments[3]
        for row in range(0, tile.count, count.literal_value):
            address = element_address(context, builder, array, arguments[2], at)
            for place, vector in enumerate(vectors[row : row + count.literal_value]):
                store_value(builder, vector, builder.gep(address, [ir.Constant(_INT32, place * tile.dtype.lanes)]))
            at = builder.add(at, arguments[4])
        return context.get_dummy_value()

    return types.void(tile, count, array, types.intp, types.intp), generate


def clamp_floats(builder: ir.IRBuilder, value: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
    """min(max(value, low), high) for vectors of floats."""
    value = builder.select(builder.fcmp_ordered("<", value, low), low, value)
    return builder.select(builder.fcmp_ordered(">", value, high), high, value)


@intrinsic
def clamp(typing, tile, low, high):
    """min(max(tile, low), high) for a tile of floats."""
    if not isinstance(tile, types.UniTuple):
        return None

    def generate(context, builder, signature, arguments):
        low_, high_ = (splat(builder, bound, tile.dtype.lanes) for bound in arguments[1:])
        results = []
        for value in cgutils.unpack_tuple(builder, arguments[0]):
            results.append(clamp_floats(builder, value, low_, high_))
        return context.make_tuple(builder, tile, results)

    return tile(tile, tile.dtype.element, tile.dtype.element), generate


@intrinsic
def keep(typing, tile, mask):
    """Every row of a tile where the vectors of `mask` aren't 0, and 0 elsewhere."""
    if not (isinstance(tile, types.UniTuple) and isinstance(mask, types.UniTuple)):
        return None

    def generate(context, builder, signature, arguments):
        zero = ir.Constant(context.get_value_type(tile.dtype), None)
        differs = builder.fcmp_ordered if isinstance(tile.dtype.element, types.Float) else builder.icmp_signed
        tests = [differs("!=", one, zero) for one in cgutils.unpack_tuple(builder, arguments[1])]
        vectors = cgutils.unpack_tuple(builder, arguments[0])
        results = [builder.select(tests[place % len(tests)], one, zero) for place, one in enumerate(vectors)]
        return context.make_tuple(builder, tile, results)

    return tile(tile, mask), generate


@intrinsic(prefer_literal=True)
def store_transposed(typing, tile, count, array, index, stride):
    """Stores a tile of `count` vectors a row: its column c at array[index + c * stride :][:rows]."""
    if not (isinstance(tile, types.UniTuple) and is_memory(array) and are_literals(count)):
        return None

    def generate(context, builder, signature, arguments):
        element = context.get_value_type(array.dtype)
        at = arguments[3]
        vectors = cgutils.unpack_tuple(builder, arguments[0])
        for place in range(count.literal_value):
            for column in _columns(builder, vectors[place :: count.literal_value]):
                address = element_address(context, builder, array, arguments[2], at)
                for part, piece in enumerate(column):
                    kind = ir.VectorType(element, piece.type.count)
                    narrow = piece if piece.type == kind else builder.trunc(piece, kind)
                    store_value(builder, narrow, builder.gep(address, [ir.Constant(_INT32, part * kind.count)]))
                at = builder.add(at, arguments[4])
        return context.get_dummy_value()

    return types.void(tile, count, array, types.intp, types.intp), generate


@intrinsic
def lowest_bit(typing, word):
    """The place of the lowest bit set in an integer that isn't 0."""
    if not isinstance(word, types.Integer):
        return None

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate
