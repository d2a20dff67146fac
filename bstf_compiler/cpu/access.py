"""What Numba lacks for memory that is far away or shared: prefetches and atomic counters."""

from __future__ import annotations

from llvmlite import ir
from numba import types
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
