"""Functions of one value: in words by tables, in float32 by loops without branches, which LLVM makes vectors of.

Most of these are made of the exponential. With n = round(x / log 2) and r = x - n log 2, |r| <= log(2) / 2, it is
2**n * exp(r), and exp(r) - 1 is a short Taylor series, which is as good near 0 as far from it.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from bstf_compiler.cpu import simd, team, words
from bstf_compiler.cpu.kernels.planes import clear
from bstf_compiler.cpu.simd import Isa, element_address, target_features
from bstf_compiler.graph import FUNCTIONS

_LOG2E = np.float32(1.4426950408889634)
_LOG2_HIGH, _LOG2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # their sum is log 2
_LEAST, _MOST = np.float32(-104), np.float32(89)  # exp is 0 below and infinite above in float32
_ZERO, _HALF, _ONE, _TWO, _SIX = (np.float32(value) for value in (0, 0.5, 1, 2, 6))
_THIRD, _SIXTH = np.float32(1 / 3), np.float32(1 / 6)
_E3, _E4, _E5, _E6, _E7 = (np.float32(1 / value) for value in (6, 24, 120, 720, 5040))
_T5, _T7, _T9, _T11, _T13 = (np.float32(1 / value) for value in (5, 7, 9, 11, 13))
# Where 1 - tanh is less than half a unit in the last place of 1, and of erf.
_TANH_END, _ERF_END = np.float32(10), np.float32(4)
_SELU_SCALE, _SELU_ALPHA = np.float32(1.0507009873554805), np.float32(1.6732632423543772)
_GELU_SCALE, _GELU_CUBE = np.float32(np.sqrt(2 / np.pi)), np.float32(0.044715)
_SQRT_HALF = np.float32(np.sqrt(0.5))
# erf(x) = x P(x**2) / Q(x**2) on [-4, 4], as in Eigen (MathFunctionsImpl.h).
_P = tuple(
    np.float32(value)
    for value in (
        -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
        -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02,
    )
)  # fmt: skip
_Q = tuple(
    np.float32(value)
    for value in (
        -1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03,
        -1.42647390514189e-02,
    )
)  # fmt: skip


def _inline(function: Callable) -> Callable:
    return numba.njit(inline="always", error_model="numpy")(function)


@_inline
def _power_of_two(n):
    return np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)


@_inline
def _parts(x):
    """(exp(r) - 1, n), n as an integer."""
    whole = np.floor(x * _LOG2E + _HALF)
    r = (x - whole * _LOG2_HIGH) - whole * _LOG2_LOW
    series = _E3 + r * (_E4 + r * (_E5 + r * (_E6 + r * _E7)))
    return r + r * r * (_HALF + r * series), np.int32(whole)


@_inline
def _exp(x, alpha):
    rest, n = _parts(min(max(x, _LEAST), _MOST))
    half = n >> np.int32(1)  # 2**n may be no float32 though the result is one
    return (rest + _ONE) * _power_of_two(half) * _power_of_two(n - half)


@_inline
def _expm1(x):
    """exp(x) - 1, for -80 <= x <= 80."""
    rest, n = _parts(x)
    scale = _power_of_two(n)
    return rest * scale + (scale - _ONE)


@_inline
def _sigmoid(x, alpha):
    return _ONE / (_ONE + _exp(-x, alpha))


@_inline
def _tanh(x, alpha):
    above = _expm1(_TWO * min(max(x, -_TANH_END), _TANH_END))
    return above / (above + _TWO)


@_inline
def _swish(x, alpha):
    return x / (_ONE + _exp(-x, alpha))


@_inline
def _elu(x, alpha):
    return max(x, _ZERO) + _expm1(max(min(x, _ZERO), np.float32(-80)))


@_inline
def _selu(x, alpha):
    return _SELU_SCALE * (max(x, _ZERO) + _SELU_ALPHA * _expm1(max(min(x, _ZERO), np.float32(-80))))


@_inline
def _softplus(x, alpha):
    """max(x, 0) + log(1 + t), t = exp(-|x|), by log(1 + t) = 2 artanh(t / (2 + t))."""
    t = _exp(-abs(x), alpha)
    s = t / (_TWO + t)
    z = s * s
    series = _T7 + z * (_T9 + z * (_T11 + z * _T13))
    return max(x, _ZERO) + _TWO * (s + s * z * (_THIRD + z * (_T5 + z * series)))


@_inline
def _erf(x, alpha):
    x = min(max(x, -_ERF_END), _ERF_END)
    z = x * x
    p = ((((((_P[0] * z + _P[1]) * z + _P[2]) * z + _P[3]) * z + _P[4]) * z + _P[5]) * z) + _P[6]
    q = (((_Q[0] * z + _Q[1]) * z + _Q[2]) * z + _Q[3]) * z + _Q[4]
    return x * p / q


@_inline
def _gelu(x, alpha):
    return _HALF * x * (_ONE + _erf(x * _SQRT_HALF, alpha))


@_inline
def _gelu_tanh(x, alpha):
    return _HALF * x * (_ONE + _tanh(_GELU_SCALE * (x + _GELU_CUBE * x * x * x), alpha))


@_inline
def _hard_sigmoid(x, alpha):
    return min(max(x + np.float32(3), _ZERO), _SIX) * _SIXTH


@_inline
def _hard_swish(x, alpha):
    return x * (min(max(x + np.float32(3), _ZERO), _SIX) * _SIXTH)


@_inline
def _leaky_relu(x, alpha):
    return max(x, _ZERO) + alpha * min(x, _ZERO)


_CODE = dict(
    zip(
        FUNCTIONS,
        (
            _elu, _erf, _exp, _gelu, _gelu_tanh, _hard_sigmoid, _hard_swish, _leaky_relu, _selu, _sigmoid, _softplus,
            _swish, _tanh,
        ),
        strict=True,
    )
)  # fmt: skip
_SIGNATURE = types.void(types.CPointer(types.float32), types.CPointer(types.float32), types.intp, types.float32)


_COMPILED: list[object] = []  # code lives as long as its object


@team.once
def loop(name: str) -> int:
    """Compiles a function of this name as a loop, and returns its address, for the table of steps."""
    function = _CODE[name]

    def apply_to_all(source, target, length, alpha):
        x, y = numba.carray(source, length, np.float32), numba.carray(target, length, np.float32)
        for place in range(length):
            y[place] = function(x[place], alpha)

    _COMPILED.append(numba.cfunc(_SIGNATURE, error_model="numpy")(apply_to_all))
    return _COMPILED[-1].address


@intrinsic
def _call(typing, address, array, x, y, length, alpha):
    """Calls the loop at an address: from array[x] on to array[y] on."""

    def generate(context, builder, signature, arguments):
        address, array_, x_, y_, length_, alpha_ = arguments
        ends = [element_address(context, builder, array, array_, at) for at in (x_, y_)]
        kinds = [one.type for one in (*ends, length_, alpha_)]
        code = builder.inttoptr(address, ir.FunctionType(ir.VoidType(), kinds).as_pointer())
        builder.call(code, [*ends, length_, alpha_])
        return context.get_dummy_value()

    return types.void(types.int64, array, types.intp, types.intp, types.intp, types.float32), generate


@numba.njit(nogil=True)
def float_function(step, plane, memory, biases, masks):
    """One plane of a function of float32."""
    x, y = step.x + plane * step.x_plane, step.y + plane * step.y_plane
    _call(step.function, memory, x, y, step.length, np.float32(step.factor))
    _finish(step, plane, memory, masks, y)


def word_function(isa: Isa) -> Callable:
    """Compiles a plane of a function of words: its table has for each byte, a value plus 128, another plus 128."""
    of_vectors = isa.vector_bytes == 64 and "avx512vbmi" in target_features()
    look_up = look_up_vectors if of_vectors else look_up_bytes

    def kernel(step, plane, memory, biases, masks):
        x, y = step.x + plane * step.x_plane, step.y + plane * step.y_plane
        look_up(memory, x, y, step.length, biases[step.scale : step.scale + 64])
        _finish(step, plane, memory, masks, y)

    return numba.njit(nogil=True)(kernel)


@numba.njit(nogil=True)
def look_up_vectors(memory, x, y, length, table):
    """Words from memory[x] on become words from memory[y] on, whole vectors of them."""
    entries = simd.load(table, 0, 16, 4)
    for place in range(0, length, 16):
        simd.store(words.look_up(simd.load(memory, x + place, 16, 1), entries), memory, y + place, 0)


@numba.njit(nogil=True)
def look_up_bytes(memory, x, y, length, table):
    """The same for every instruction set, byte by byte."""
    source, target = memory[x : x + length].view(np.uint8), memory[y : y + length].view(np.uint8)
    entries = table.view(np.uint8)
    for place in range(4 * length):
        target[place] = entries[source[place]]


@numba.njit(nogil=True)
def _finish(step, plane, memory, masks, y):
    """Zeros around images, and in planes beyond the last channel."""
    if plane >= step.channels:
        clear(step, memory, y, 0)
    elif step.mask >= 0:
        clear(step, memory, y, step.length)
        for place in range(step.length):
            if masks[step.mask + place] == 0:
                memory[y + place] = step.zero
