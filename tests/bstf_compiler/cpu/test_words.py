import numba
import numpy as np
import pytest

from bstf_compiler.cpu import simd, words
from bstf_compiler.cpu.kernels import functions

WIDTHS = [64, 32, 16]  # bytes of a vector; wider ones than the machine's are split by LLVM
EDGES = np.array([0, 1, -1, 127, 128, -128, -129, 255, 32767, 32768, -32769, 2**31 - 1, -(2**31)], np.int64)


def sums(shape):
    return np.random.default_rng(0).choice(EDGES, shape).astype(np.int32)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shift", [0, 1, 7])
def test_four_rows_saturate_to_the_bytes_of_words_and_come_back(width, shift):
    if width > 16 and {64: "avx512bw", 32: "avx2"}[width] not in simd.target_features():
        pytest.skip("vectors that this machine lacks")
    lanes, count = width // 4, 3

    @numba.njit
    def pack(tile, shift, packed, back):
        rows = simd.load_tile(tile, 0, lanes * count, lanes, 8, count)
        found = words.narrow(words.shift_right(rows, shift), count)
        simd.store_tile(found, count, packed, 0, lanes * count)
        simd.store_tile(words.widen(found, count, shift), count, back, 0, lanes * count)

    tile = sums((8, lanes * count))
    packed, back = np.zeros((2, lanes * count), np.int32), np.zeros_like(tile)
    pack(tile.ravel(), shift, packed.ravel(), back.ravel())
    expected = np.clip(tile >> shift, -128, 127)
    assert np.array_equal(packed.view(np.int8).reshape(2, -1, 4).swapaxes(1, 2).reshape(8, -1), expected)
    assert np.array_equal(back, expected << shift)


@pytest.mark.parametrize("width", WIDTHS)
def test_bytes_are_clamped_and_compared_one_by_one(width):
    lanes = width // 4

    @numba.njit
    def both(a, b, low, high, clamped, larger):
        one, other = simd.load(a, 0, lanes, 1), simd.load(b, 0, lanes, 1)
        simd.store(words.clamp(one, low, high), clamped, 0, 0)
        simd.store(words.largest(one, other), larger, 0, 0)

    a, b = np.random.default_rng(0).integers(0, 256, (2, width), np.uint8)
    clamped, larger = np.zeros((2, lanes), np.int32)
    both(a.view(np.int32), b.view(np.int32), -5, 100, clamped, larger)
    assert np.array_equal(clamped.view(np.int8), np.clip(a.view(np.int8), -5, 100))
    assert np.array_equal(larger.view(np.uint8), np.maximum(a, b))


@pytest.mark.parametrize("shift", [0, 1, 12])
def test_rounding_takes_halves_up(shift):
    @numba.njit
    def cut(a, shift, out):
        simd.store(words.round_right(simd.load(a, 0, 16, 1), shift), out, 0, 0)

    values = np.array([0, 1, -1, 2, -2, 3, -3, 63, 64, 65, -64, -65, 10**6, -(10**6), 2**29, -(2**29)], np.int32)
    out = np.zeros(16, np.int32)
    cut(values, shift, out)
    assert np.array_equal(out, np.floor(values * 2.0**-shift + 0.5))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_loads_with_a_stride(dtype):
    @numba.njit
    def take(a, stride, two, three, some):
        simd.store(words.load_every(a, 1, 2, 16), two, 0, 0)
        simd.store(words.load_apart(a, 1, 3, 16), three, 0, 16)
        simd.store(words.load_strided(a, 1, stride, 16), some, 0, 0)

    a = np.arange(100).astype(dtype)
    two, three, some = np.zeros(16, dtype), np.zeros(48, dtype), np.zeros(16, dtype)
    take(a, 5, two, three, some)
    assert np.array_equal(two, a[1:33:2])
    assert np.array_equal(three.reshape(3, 16), a[1:49].reshape(16, 3).T)
    assert np.array_equal(some, a[1:81:5])


@pytest.mark.parametrize("count", [1, 3, 4])
def test_floats_become_the_bytes_of_words(count):
    @numba.njit
    def cut(values, low, high, factor, out):
        simd.store(words.of_floats(simd.load(values, 0, 16, count), low, high, factor), out, 0, 0)

    values = np.random.default_rng(0).normal(size=(count, 16)).astype(np.float32)
    values[0, :3] = -9, 9, np.inf
    low, high, factor = np.float32(-1), np.float32(127 / 128), np.float32(128)
    out = np.zeros(16, np.int32)
    cut(values.ravel(), low, high, factor, out)
    expected = np.full((16, 4), 128, np.uint8)
    expected[:, :count] = np.floor((np.clip(values.T, low, high) - low) * factor + np.float32(0.5))
    assert np.array_equal(out.view(np.uint8).reshape(16, 4), expected)


@pytest.mark.parametrize("look_up", [functions.look_up_bytes, functions.look_up_vectors])
def test_bytes_are_looked_up_in_a_table(look_up):
    if look_up is functions.look_up_vectors and "avx512vbmi" not in simd.target_features():
        pytest.skip("an instruction that this machine lacks")
    rng = np.random.default_rng(0)
    table, memory = rng.permutation(256).astype(np.uint8), rng.integers(-(2**31), 2**31, 200).astype(np.int32)
    memory[:64] = np.arange(256, dtype=np.uint8).view(np.int32)
    source = memory[3:80].copy()
    look_up(memory, 3, 100, len(source), table.view(np.int32))
    assert np.array_equal(memory[100 : 100 + len(source)].view(np.uint8), table[source.view(np.uint8)])
