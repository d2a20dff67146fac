"""Dot products of bytes in int32, for tiles as in `bstf_compiler.cpu.simd`."""

from __future__ import annotations

from functools import cache

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bstf_compiler.cpu.simd import (
    call_intrinsic,
    constant,
    element_address,
    load_value,
    shuffle,
    splat,
    target_features,
)

_INT32 = ir.IntType(32)
# `pmaddwd` by vector width. LLVM finds it in plain products, too, but when it knows something of the operands it first
# takes them apart: then it multiplies twice, by zeros for half of the pairs.
_PAIR_PRODUCTS = {512: ("avx512bw", "llvm.x86.avx512.pmaddw.d.512"), 256: ("avx2", "llvm.x86.avx2.pmadd.wd")}


@cache
def _pair_product(bits: int) -> str | None:
    """The intrinsic for vectors of so many bits, None if the target has none: LLVM can't take it apart."""
    feature, name = _PAIR_PRODUCTS.get(bits, (None, None))
    return name if feature in target_features() else None


def _dot_bytes(builder: ir.IRBuilder, sums: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    """`vpdpbusd`: each int32 gains the sum of the products of its four unsigned and four signed bytes."""
    bits = 32 * sums.type.count
    return call_intrinsic(builder, f"llvm.x86.avx512.vpdpbusd.{bits}", sums.type, [sums, unsigned, signed])


def _dot_pairs(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Each int32: the sum of the products of two int16 and two int16."""
    lanes = a.type.count
    pairs = ir.VectorType(ir.IntType(16), 2 * lanes)
    halves = [builder.bitcast(value, pairs) for value in (a, b)]
    if name := _pair_product(32 * lanes):
        return call_intrinsic(builder, name, a.type, halves)
    products = []
    for first in (0, 1):
        order = list(range(first, 2 * lanes, 2))
        wide = [builder.sext(shuffle(builder, half, half, order), a.type) for half in halves]
        products.append(builder.mul(*wide))
    return builder.add(*products)


@intrinsic
def dot_outer(typing, tile, vectors, weights, index):
    """An int32 tile plus, for each row r and int32 of four unsigned bytes, their product with weights[index + r].

    A weight is an int32 of four signed bytes. Needs an instruction set with `dot`.
    """
    if not isinstance(tile, types.UniTuple):
        return None

    def generate(context, builder, signature, arguments):
        sums = cgutils.unpack_tuple(builder, arguments[0])
        parts = cgutils.unpack_tuple(builder, arguments[1])
        for row in range(tile.count // vectors.count):
            at = builder.add(arguments[3], ir.Constant(arguments[3].type, row))
            word = load_value(builder, element_address(context, builder, weights, arguments[2], at), _INT32)
            weight = splat(builder, word, tile.dtype.lanes)
            for place, part in enumerate(parts, row * len(parts)):
                sums[place] = _dot_bytes(builder, sums[place], part, weight)
        return context.make_tuple(builder, tile, sums)

    return tile(tile, vectors, weights, types.intp), generate


@intrinsic
def widened_outer(typing, tile, vectors, weights, index):
    """`dot_outer` for every instruction set: bytes 0 and 2, then 1 and 3, are widened to int16 and multiplied.

    A weight is two int32: int16 of bytes 0 and 2, int16 of bytes 1 and 3.
    """
    if not isinstance(tile, types.UniTuple):
        return None

    def generate(context, builder, signature, arguments):
        sums = cgutils.unpack_tuple(builder, arguments[0])
        parts = cgutils.unpack_tuple(builder, arguments[1])
        mask, byte = (constant(parts[0].type, value) for value in (0x00FF00FF, 8))
        even = [builder.and_(part, mask) for part in parts]
        odd = [builder.and_(builder.lshr(part, byte), mask) for part in parts]
        for row in range(tile.count // vectors.count):
            for which, halves in enumerate((even, odd)):
                at = builder.add(arguments[3], ir.Constant(arguments[3].type, 2 * row + which))
                word = load_value(builder, element_address(context, builder, weights, arguments[2], at), _INT32)
                weight = splat(builder, word, tile.dtype.lanes)
                for place, half in enumerate(halves, row * len(parts)):
                    sums[place] = builder.add(sums[place], _dot_pairs(builder, half, weight))
        return context.make_tuple(builder, tile, sums)

    return tile(tile, vectors, weights, types.intp), generate
