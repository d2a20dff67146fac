"""What Numba lacks for memory that is far away or shared: prefetches, atomic counters and a clock."""

from __future__ import annotations

import time

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bstf_compiler.cpu.simd import call_intrinsic, element_address, is_memory


def _prefetch(array: types.Type, write: int) -> tuple | None:
    if not is_memory(array):
        return None

    def generate(context, builder, signature, arguments):
        address = element_address(context, builder, array, arguments[0], arguments[1])
        pointer = builder.bitcast(address, ir.IntType(8).as_pointer())
        write_, near, data = (ir.Constant(ir.IntType(32), value) for value in (write, 3, 1))
        call_intrinsic(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, write_, near, data])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def prefetch(typing, array, index):
    """Asks for the cache line of array[index], to be read soon."""
    return _prefetch(array, 0)


@intrinsic
def prefetch_to_write(typing, array, index):
    """Asks for the cache line of array[index], to be written soon."""
    return _prefetch(array, 1)


@intrinsic
def fetch_add(typing, array, index, amount):
    """Adds to array[index] (int64) and returns what it was; atomic, for what threads share."""
    if not is_memory(array):
        return None

    def generate(context, builder, signature, arguments):
        address = element_address(context, builder, array, arguments[0], arguments[1])
        return builder.atomic_rmw("add", address, arguments[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), generate


@intrinsic
def atomic_load(typing, array, index):
    """array[index] (int64), as other threads have left it."""
    if not is_memory(array):
        return None

    def generate(context, builder, signature, arguments):
        address = element_address(context, builder, array, arguments[0], arguments[1])
        return builder.load_atomic(address, "seq_cst", align=8)

    return types.int64(array, types.intp), generate


@numba.njit(inline="always")
def on_a_line(array):
    """The part of an array from its first cache line on, at most 15 elements of four bytes later."""
    return array[-array.ctypes.data // 4 % 16 :]


if hasattr(time, "CLOCK_MONOTONIC"):
    _CLOCK = time.CLOCK_MONOTONIC

    @intrinsic
    def now(typing):
        """Nanoseconds that all threads count alike, as `nanoseconds` does."""

        def generate(context, builder, signature, arguments):
            long, number = ir.IntType(64), ir.IntType(32)
            place = cgutils.alloca_once(builder, long, size=2)  # struct timespec: seconds and nanoseconds
            kind = ir.FunctionType(number, [number, long.as_pointer()])
            function = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
            builder.call(function, [ir.Constant(number, _CLOCK), place])
            seconds, rest = (builder.load(builder.gep(place, [ir.Constant(number, part)])) for part in (0, 1))
            return builder.add(builder.mul(seconds, ir.Constant(long, 1_000_000_000)), rest)

        return types.int64(), generate

    def nanoseconds() -> int:
        """What `now` tells compiled code."""
        return time.clock_gettime_ns(_CLOCK)

else:  # other systems have their own clocks

    @numba.njit(inline="always")
    def now():
        """Nothing, as `nanoseconds` does."""
        return 0

    def nanoseconds() -> int:
        """What `now` tells compiled code."""
        return 0
