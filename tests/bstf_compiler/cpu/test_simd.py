import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from bstf_compiler.cpu import access, dots, simd

DTYPES = [np.float32, np.float64, np.int32]
WIDTHS = [64, 32, 16]  # bytes of a vector; wider ones than the machine's are split by LLVM


def compiled(function):
    return numba.njit(function)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_load_and_store_at_any_alignment(dtype, width):
    lanes = width // np.dtype(dtype).itemsize

    @compiled
    def copy(a, i, b, j):
        simd.store(simd.load(a, i, lanes, 3), b, j, lanes)

    source = np.arange(200).astype(dtype)
    for i, j in ((0, 0), (1, 0), (0, 3), (5, 7)):
        target = np.zeros(200, dtype)
        copy(source, i, target[1:], j)
        expected = np.zeros(200, dtype)
        expected[1 + j : 1 + j + 3 * lanes] = source[i : i + 3 * lanes]
        assert np.array_equal(target, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_transpose_of_rows(dtype, width):
    lanes = width // np.dtype(dtype).itemsize

    @compiled
    def turn(a, stride, rows, b):
        simd.store(simd.transpose(simd.load_rows(b, a, 1, stride, rows, lanes)), b, 0, lanes)

    a = np.arange(lanes * 20).astype(dtype)
    for rows in (lanes, 1, lanes // 2):
        b = np.zeros(lanes * lanes, dtype)
        turn(a, 20, rows, b)
        taken = a.reshape(lanes, 20)[np.minimum(np.arange(lanes), rows - 1), 1 : 1 + lanes]
        assert np.array_equal(b.reshape(lanes, lanes), taken.T)


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("width", WIDTHS)
def test_outer_product_of_a_tile(dtype, width, rows):
    lanes, count = width // np.dtype(dtype).itemsize, 3

    @compiled
    def outer(panel, weights, out):
        tile = simd.zeros(panel, lanes, rows, count)
        for k in range(5):
            tile = simd.fma_outer(tile, simd.load(panel, k * lanes * count, lanes, count), weights, k, 5)
        simd.store_transposed(tile, count, out, 2, rows + 1)

    rng = np.random.default_rng(0)
    panel, weights = (rng.integers(-9, 9, (5, size)).astype(dtype) for size in (lanes * count, rows))
    out = np.zeros((lanes * count + 2, rows + 1), dtype)
    outer(panel, np.ascontiguousarray(weights.T), out)
    result = out.ravel()[2:][: lanes * count * (rows + 1)].reshape(-1, rows + 1)
    assert np.array_equal(result[:, :rows], panel.T @ weights)
    assert not result[:, rows].any()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dot", [False, True])
def test_dot_products_of_bytes_do_not_saturate(width, dot):
    if dot and "avx512vnni" not in simd.target_features():
        pytest.skip("no vpdpbusd here")
    lanes, rows, count = width // 4, 4, 2
    outer = dots.dot_outer if dot else dots.widened_outer

    @compiled
    def product(panel, weights, bias, out):
        tile = outer(simd.zeros(panel, lanes, rows, count), simd.load(panel, 0, lanes, count), weights, 0)
        simd.store_transposed(simd.add_rows(tile, count, bias, 1), count, out, 0, rows)

    rng = np.random.default_rng(0)
    x = rng.choice(np.array([0, 1, 128, 255], np.uint8), (lanes * count, 4))
    w = rng.choice(np.array([-128, -1, 0, 127], np.int8), (rows, 4))
    weights = w if dot else np.ascontiguousarray(w[:, [0, 2, 1, 3]].astype(np.int16))
    bias = np.array([0, 1000, -1000, 5, 7], np.int32)
    out = np.zeros((lanes * count, rows), np.int32)
    product(x.view(np.int32).ravel(), weights.view(np.int32).ravel(), bias, out)
    assert np.array_equal(out, x.astype(np.int64) @ w.T.astype(np.int64) + bias[1:])


@pytest.mark.parametrize("shift", [0, 1, 7, 30])
def test_requantisation_rounds_halves_up(shift):
    @compiled
    def cut(a, shift, out):
        simd.store_transposed(simd.requantise(simd.load(a, 0, 16, 1), shift), 1, out, 0, 1)

    values = np.array([0, 1, -1, 2, -2, 3, -3, 63, 64, 65, -64, -65, 10**6, -(10**6), 2**29, -(2**29)], np.int32)
    out = np.zeros(16, np.int8)
    cut(values, shift, out)
    assert np.array_equal(out, np.clip(np.floor(values * 2.0**-shift + 0.5), -128, 127))


def test_exclusive_or_and_counter():
    @compiled
    def both(a, out, counter):
        simd.store(simd.xor(simd.load(a, 0, 4, 1), 0x80808080), out, 0, 4)
        return access.fetch_add(counter, 1, 2) + 10 * access.fetch_add(counter, 1, 1)

    a, out, counter = np.arange(4, dtype=np.int32), np.zeros(4, np.int32), np.zeros(2, np.int64)
    assert both(a, out, counter) == 20
    assert np.array_equal(out.view(np.uint8), a.view(np.uint8) ^ 0x80)
    assert counter.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("features", "name"),
    [
        (set(), "portable"),
        ({"neon"}, "portable"),
        ({"avx2"}, "portable"),
        ({"avx2", "fma"}, "avx2"),
        ({"avx2", "fma", "avx512f", "avx512bw", "avx512vl"}, "avx512"),
        ({"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512vnni"}, "avx512_vnni"),
    ],
)
def test_widest_instruction_set(features, name):
    assert simd.choose(features) == name
    assert simd.ISAS[name].name == name


PROGRAM = """
import sys
import numpy as np
from bstf_compiler import BlockSparseMatrix
from bstf_compiler.cpu.simd import host_isa
from tests.bstf_compiler.cpu.test_matrix import check_product
assert host_isa().name == sys.argv[1], host_isa()
rng = np.random.default_rng(0)
for dtype in (np.float32, np.int8):
    w = rng.integers(-9, 9, (200, 88)).astype(dtype) * np.kron(rng.random((25, 11)) < 0.5, np.ones((8, 8), dtype))
    x = rng.integers(-9, 9, (150, 200)).astype(dtype)
    m = BlockSparseMatrix.from_dense(w.astype(dtype))
    for threads in (1, 2, 4):
        assert np.array_equal(m.multiply(x, threads=threads), x.astype(np.int64) @ w.astype(np.int64))
    check_product(None, np.dtype(dtype).name, (8, 8))
"""
NARROWER = [
    (name, features)
    for name, features in (("avx2", "+avx,+avx2,+fma,+sse4.2"), ("portable", "+sse2"))
    if name != simd.host_isa().name
]


@pytest.mark.parametrize(("name", "features"), NARROWER)
def test_on_a_narrower_machine_with_four_threads(name, features):
    if "avx2" not in simd.target_features():
        pytest.skip("an x86 with AVX2 is needed to stand in for narrower ones")
    settings = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features, "NUMBA_NUM_THREADS": "4"}
    command = [sys.executable, "-c", PROGRAM, name]
    subprocess.run(command, env=os.environ | settings, cwd=Path(__file__).parents[3], check=True)
