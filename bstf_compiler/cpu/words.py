"""Vectors of words: an int32 holds the same pixel of four channels, a byte each (`bstf_compiler.cpu.layout`).

Tiles are tuples of vectors as in `bstf_compiler.cpu.simd`, a channel's sums in int32 or four channels' bytes in words.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bstf_compiler.cpu.simd import (
    Vector,
    are_literals,
    call_intrinsic,
    clamp_floats,
    constant,
    element_address,
    is_memory,
    limit,
    shuffle,
    splat,
)

_BYTE = ir.IntType(8)
# Saturating narrowings of x86 by vector width: two vectors of int32 to int16, two of int16 to int8, 128 bits at a time.
_NARROWINGS = {
    512: ("llvm.x86.avx512.packssdw.512", "llvm.x86.avx512.packsswb.512"),
    256: ("llvm.x86.avx2.packssdw", "llvm.x86.avx2.packsswb"),
}


def _amount(builder: ir.IRBuilder, amount: ir.Value, kind: ir.VectorType) -> ir.Value:
    return splat(builder, builder.trunc(amount, kind.element), kind.count)


def _bytes_of(kind: ir.VectorType) -> ir.VectorType:
    return ir.VectorType(_BYTE, 4 * kind.count)


def _shift(tile: types.Type, rounding: bool) -> tuple | None:
    if not isinstance(tile, types.UniTuple):
        return None

    def generate(context, builder, signature, arguments):
        sums, amount = cgutils.unpack_tuple(builder, arguments[0]), arguments[1]
        kind, one = context.get_value_type(tile.dtype), ir.Constant(amount.type, 1)
        if rounding:
            half = _amount(builder, builder.lshr(builder.shl(one, amount), one), kind)
            sums = [builder.add(value, half) for value in sums]
        by = _amount(builder, amount, kind)
        return context.make_tuple(builder, tile, [builder.ashr(value, by) for value in sums])

    return tile(tile, types.int64), generate


@intrinsic
def shift_right(typing, tile, amount):
    """floor(tile * 2**-amount), in int32."""
    return _shift(tile, rounding=False)


@intrinsic
def round_right(typing, tile, amount):
    """floor(tile * 2**-amount + 1/2), in int32."""
    return _shift(tile, rounding=True)


def _narrow(builder: ir.IRBuilder, rows: list[ir.Value]) -> ir.Value:
    """Four vectors of int32, saturated to int8, as one vector of words."""
    kind = rows[0].type
    width = 32 * kind.count
    if width in _NARROWINGS:
        to_int16, to_int8 = _NARROWINGS[width]
        pairs_kind = ir.VectorType(ir.IntType(16), 2 * kind.count)
        pairs = [call_intrinsic(builder, to_int16, pairs_kind, rows[place : place + 2]) for place in (0, 2)]
        quads = call_intrinsic(builder, to_int8, _bytes_of(kind), pairs)
        # Every 128 bits hold four pixels of the first row, then four of the second one, ...
        order = [
            16 * part + 4 * row + pixel for part in range(kind.count // 4) for pixel in range(4) for row in range(4)
        ]
        return builder.bitcast(shuffle(builder, quads, quads, order), kind)
    low, high, byte = (constant(kind, value) for value in (-128, 127, 255))
    word = constant(kind, 0)
    for place, row in enumerate(rows):
        row = builder.and_(limit(builder, row, low, high), byte)
        word = builder.or_(word, builder.shl(row, constant(kind, 8 * place)))
    return word


@intrinsic(prefer_literal=True)
def narrow(typing, tile, count):
    """The words of a tile of int32 with `count` vectors a row: four rows, saturated to int8, become one."""
    if not (isinstance(tile, types.UniTuple) and are_literals(count)):
        return None
    words = types.UniTuple(tile.dtype, tile.count // 4)

    def generate(context, builder, signature, arguments):
        sums, step = cgutils.unpack_tuple(builder, arguments[0]), count.literal_value
        results = [
            _narrow(builder, sums[first + place : first + 4 * step : step])
            for first in range(0, tile.count, 4 * step)
            for place in range(step)
        ]
        return context.make_tuple(builder, words, results)

    return words(tile, count), generate


@intrinsic(prefer_literal=True)
def widen(typing, words, count, amount):
    """The opposite of `narrow`: a row of int32 for each signed byte, times 2**amount, 0 <= amount <= 24."""
    if not (isinstance(words, types.UniTuple) and are_literals(count)):
        return None
    tile = types.UniTuple(words.dtype, 4 * words.count)

    def generate(context, builder, signature, arguments):
        vectors, step = cgutils.unpack_tuple(builder, arguments[0]), count.literal_value
        kind = context.get_value_type(words.dtype)
        down, by = constant(kind, 24), _amount(builder, arguments[2], kind)
        results = []
        for first in range(0, words.count, step):
            for place in range(4):  # its byte goes to the top, and comes down with its sign
                up = constant(kind, 24 - 8 * place)
                results += [
                    builder.shl(builder.ashr(builder.shl(one, up), down), by) for one in vectors[first : first + step]
                ]
        return context.make_tuple(builder, tile, results)

    return tile(words, count, types.int64), generate


def _clamp(builder: ir.IRBuilder, words: list[ir.Value], low: ir.Value, high: ir.Value) -> list[ir.Value]:
    kind = _bytes_of(words[0].type)
    low, high = (splat(builder, builder.trunc(bound, _BYTE), kind.count) for bound in (low, high))
    results = []
    for word in words:
        results.append(builder.bitcast(limit(builder, builder.bitcast(word, kind), low, high), word.type))
    return results


@intrinsic
def clamp(typing, words, low, high):
    """min(max(byte, low), high) for the signed bytes of words."""
    if not isinstance(words, types.UniTuple):
        return None

    def generate(context, builder, signature, arguments):
        vectors = cgutils.unpack_tuple(builder, arguments[0])
        return context.make_tuple(builder, words, _clamp(builder, vectors, *arguments[1:]))

    return words(words, types.int64, types.int64), generate


@intrinsic
def largest(typing, words, others):
    """The larger of two unsigned bytes, for all bytes of words."""
    if not (isinstance(words, types.UniTuple) and words == others):
        return None

    def generate(context, builder, signature, arguments):
        results = []
        for one, other in zip(*(cgutils.unpack_tuple(builder, vectors) for vectors in arguments)):
            one, other = (builder.bitcast(value, _bytes_of(value.type)) for value in (one, other))
            value = builder.select(builder.icmp_unsigned(">", one, other), one, other)
            results.append(builder.bitcast(value, context.get_value_type(words.dtype)))
        return context.make_tuple(builder, words, results)

    return words(words, others), generate


@intrinsic
def look_up(typing, words, table):
    """table[byte] for the unsigned bytes of words of 512 bits, table of 4 such vectors; needs AVX-512 VBMI."""
    if not (isinstance(words, types.UniTuple) and isinstance(table, types.UniTuple) and table.count == 4):
        return None

    def generate(context, builder, signature, arguments):
        name, kind = "llvm.x86.avx512.vpermi2var.qi.512", context.get_value_type(words.dtype)
        bytes_ = _bytes_of(kind)
        entries = [builder.bitcast(one, bytes_) for one in cgutils.unpack_tuple(builder, arguments[1])]
        results = []
        for word in cgutils.unpack_tuple(builder, arguments[0]):
            place = builder.bitcast(word, bytes_)  # each instruction takes its lower seven bits
            low, high = (
                call_intrinsic(builder, name, bytes_, [entries[first], place, entries[first + 1]]) for first in (0, 2)
            )
            is_high = builder.icmp_signed("<", place, constant(bytes_, 0))
            results.append(builder.bitcast(builder.select(is_high, high, low), kind))
        return context.make_tuple(builder, words, results)

    return words(words, table), generate


@intrinsic(prefer_literal=True)
def load_strided(typing, array, index, stride, lanes):
    """A vector, as a tuple of one: array[index], array[index + stride], array[index + 2 * stride], ..."""
    if not (is_memory(array) and are_literals(lanes)):
        return None
    vectors = types.UniTuple(Vector(array.dtype, lanes.literal_value), 1)

    def generate(context, builder, signature, arguments):
        kind, at = context.get_value_type(vectors.dtype), arguments[1]
        vector = ir.Constant(kind, ir.Undefined)
        for lane in range(kind.count):
            value = builder.load(element_address(context, builder, array, arguments[0], at), typ=kind.element)
            vector = builder.insert_element(vector, value, ir.Constant(ir.IntType(32), lane))
            at = builder.add(at, arguments[2])
        return context.make_tuple(builder, vectors, [vector])

    return vectors(array, types.intp, types.intp, lanes), generate


def _apart(array: types.Type, step: types.Type, lanes: types.Type, count: int) -> tuple | None:
    if not (is_memory(array) and are_literals(step, lanes)):
        return None
    vectors = types.UniTuple(Vector(array.dtype, lanes.literal_value), count)

    def generate(context, builder, signature, arguments):
        kind, elements = context.get_value_type(vectors.dtype), step.literal_value * lanes.literal_value
        wide = ir.VectorType(kind.element, elements)
        address = element_address(context, builder, array, arguments[0], arguments[1])
        all_ = builder.load(builder.bitcast(address, wide.as_pointer()), align=1, typ=wide)
        chosen = [
            shuffle(builder, all_, all_, list(range(first, elements, step.literal_value))) for first in range(count)
        ]
        return context.make_tuple(builder, vectors, chosen)

    return vectors(array, types.intp, step, lanes), generate


@intrinsic(prefer_literal=True)
def load_every(typing, array, index, step, lanes):
    """`load_strided` by whole vectors, for a step that the compiler knows; it reads step * lanes elements."""
    return _apart(array, step, lanes, 1)


@intrinsic(prefer_literal=True)
def load_apart(typing, array, index, step, lanes):
    """`step` vectors: every step-th element from array[index] on, from array[index + 1] on, ..."""
    return _apart(array, step, lanes, step.literal_value) if are_literals(step) else None


@intrinsic
def of_floats(typing, vectors, low, high, factor):
    """Words of which byte c is floor((clamped - low) * factor + 1/2), below 256, of the c-th vector of float32.

    `clamped` is min(max(element, low), high). Where there are less than four vectors, the other bytes are 128.
    """
    if not (isinstance(vectors, types.UniTuple) and vectors.count <= 4):
        return None
    words = types.UniTuple(Vector(types.int32, vectors.dtype.lanes), 1)

    def generate(context, builder, signature, arguments):
        kind, floats = (context.get_value_type(one.dtype) for one in (words, vectors))
        low_, high_, factor_ = (splat(builder, one, kind.count) for one in arguments[1:])
        unused = sum(128 << 8 * place for place in range(vectors.count, 4))
        word = constant(kind, unused - (unused >> 31 << 32))  # as an int32
        for place, vector in enumerate(cgutils.unpack_tuple(builder, arguments[0])):
            above = builder.fsub(clamp_floats(builder, vector, low_, high_), low_)
            rounded = builder.fadd(builder.fmul(above, factor_), ir.Constant(floats, [0.5] * kind.count))
            whole = builder.fptosi(rounded, kind)  # which cuts, and nothing is below zero
            word = builder.or_(word, builder.shl(whole, constant(kind, 8 * place)))
        return context.make_tuple(builder, words, [word])

    return words(vectors, types.float32, types.float32, types.float32), generate
