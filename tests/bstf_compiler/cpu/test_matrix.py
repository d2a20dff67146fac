from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from bstf_compiler import BlockSparseMatrix, bsr
from bstf_compiler.cpu import simd
from bstf_compiler.cpu.kernels import spmm_rows

HOST = simd.host_isa().name
# A kernel takes long to compile, and is one for a type and a shape of register tiles: here columns of 8 or 4, 2 and 1,
# depths of 8, 4, 2 and 1. What tiles are made of is tested for every type and shape in test_simd.
BLOCKS = [(8, 8), (1, 1), (2, 2), (4, 4), (16, 16), (16, 4), (4, 16), (3, 5)]
CASES = [
    *[(HOST, "float32", block) for block in BLOCKS],
    *[(HOST, "float64", block) for block in ((8, 8), (1, 1), (16, 16), (3, 5))],
    *[(HOST, "int8", block) for block in ((8, 8), (1, 1), (2, 1))],
    # Narrower ones compute the other types in test_simd, where there is nothing wider.
    *[(isa, "float64", (8, 8)) for isa in ("avx2", "portable") if isa != HOST],
    *[("avx512", dtype, (8, 8)) for dtype in ("float32", "float64", "int8") if not HOST.startswith("avx512")],
]
if HOST == "avx512_vnni":  # which differs in int8 alone
    CASES.append(("avx512", "int8", (8, 8)))


def random_weights(rng, shape, block, ratio, dtype):
    """Integers, so that every sum is exact in every type."""
    grid = [-(-size // side) for size, side in zip(shape, block)]
    keep = np.kron(rng.random(grid) >= ratio, np.ones(block))[: shape[0], : shape[1]]
    return (rng.integers(-9, 10, shape) * keep).astype(dtype)


def exact(x, w):
    return x.astype(np.int64) @ w.astype(np.int64)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 999),
    st.tuples(st.integers(0, 150), st.integers(0, 70), st.integers(0, 50)),
    st.booleans(),
    st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    st.integers(1, 3),
)
def check_product(isa, dtype, block, seed, sizes, whole, ratio, threads):
    rng = np.random.default_rng(seed)
    m, k, n = sizes
    if whole:  # products of whole blocks aren't packed if rows are short
        k, n = (size - size % side for size, side in zip((k, n), block))
    w = random_weights(rng, (k, n), block, ratio, dtype)
    matrix = BlockSparseMatrix.from_dense(w, block, isa)
    assert np.array_equal(matrix.to_dense(), w)
    kind = np.uint8 if dtype == "int8" and seed % 2 else dtype
    x = rng.integers(0 if kind == np.uint8 else -9, 10, (m, k)).astype(kind)
    y = matrix.multiply(x, threads=threads)
    assert y.dtype == (np.int32 if dtype == "int8" else dtype)
    assert np.array_equal(y, exact(x, w))
    assert np.array_equal(matrix.multiply(matrix.pack(x)), y)


@pytest.mark.parametrize(("isa", "dtype", "block"), CASES)
def test_product(isa, dtype, block):
    check_product(isa, dtype, block)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_few_multiply_adds_a_row_take_x_as_it_is(dtype):
    tile = spmm_rows.tile_of((8, 8), dtype, simd.host_isa())
    rows = spmm_rows.rows_of_tile(tile)
    assert spmm_rows.pays((64, 24), 64 * 24, tile)
    assert not spmm_rows.pays((60, 24), 64 * 24, tile)  # a block ends outside of x
    assert not spmm_rows.pays((64, 20), 64 * 24, tile)  # a block ends outside of y
    assert not spmm_rows.pays((512, 512), 512 * 512, tile)
    rng = np.random.default_rng(0)
    w = random_weights(rng, (64, 24), (8, 8), 0.5, dtype)
    matrix = BlockSparseMatrix.from_dense(w)
    for count in (rows - 1, rows, rows + 1, 4 * rows - 1, 70):
        x = rng.integers(-9, 10, (count, 64)).astype(dtype)
        for threads in (1, 2, 4):
            around = np.full((count + 2, 24), 7, dtype)
            matrix.multiply(x, threads=threads, out=around[1:-1])
            assert np.array_equal(around[1:-1], exact(x, w)) and (around[[0, -1]] == 7).all()


@pytest.mark.parametrize(("dtype", "block", "depth"), [("float32", (8, 8), 6000), ("float64", (1, 1), 3000)])
def test_long_sums_in_several_panels(dtype, block, depth):
    rng = np.random.default_rng(0)
    w = random_weights(rng, (depth, 20), block, 0.5, dtype)
    x = rng.integers(-9, 10, (200, depth)).astype(dtype)
    matrix = BlockSparseMatrix.from_dense(w, block)
    for threads in (1, 2):
        assert np.array_equal(matrix.multiply(x, threads=threads), exact(x, w))
        assert np.array_equal(matrix.multiply(matrix.pack(x), threads=threads), exact(x, w))


def test_views_of_x_and_read_only_x():
    rng = np.random.default_rng(0)
    w = random_weights(rng, (40, 24), (8, 8), 0.5, np.float32)
    matrix = BlockSparseMatrix.from_dense(w)
    wide = rng.integers(-9, 10, (120, 90)).astype(np.float32)
    frozen = wide[:, :40].copy()
    frozen.flags.writeable = False
    raw = np.zeros(120 * 40 * 4 + 1, np.uint8)
    raw[1:] = wide[:, :40].copy().view(np.uint8).ravel()
    odd = raw[1:].view(np.float32).reshape(120, 40)
    for x in (wide[:, 3:43], wide[1::2, ::2][:, :40], wide.T[5:45].T, wide[:, 39::-1], frozen, odd):
        assert np.array_equal(x @ matrix, exact(x, w))
    for first in range(5):
        assert np.array_equal(frozen[first:] @ matrix, exact(frozen[first:], w))


def test_threads_give_the_same_bits():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 640)).astype(np.float32)
    w = rng.normal(size=(640, 320)).astype(np.float32) * np.kron(rng.random((80, 40)) < 0.5, np.ones((8, 8)))
    matrix = BlockSparseMatrix.from_dense(w.astype(np.float32))
    one = matrix.multiply(x, threads=1)
    assert np.allclose(one, x @ w, atol=1e-3)
    for threads in (None, 2, 4):
        for _ in range(3):
            assert np.array_equal(matrix.multiply(x, threads=threads), one)


def test_four_python_threads_at_once():
    rng = np.random.default_rng(0)
    matrix = BlockSparseMatrix.from_dense(random_weights(rng, (256, 128), (8, 8), 0.5, np.float32))
    inputs = [rng.integers(-9, 10, (200 + part, 256)).astype(np.float32) for part in range(4)]
    expected = [exact(x, matrix.to_dense()) for x in inputs]
    wrong = []

    def work(place):
        for _ in range(50):
            if not np.array_equal(matrix.multiply(inputs[place], threads=2), expected[place]):
                wrong.append(place)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))  # raises what a thread does
    assert not wrong


@pytest.mark.parametrize("isa", [isa for isa in simd.ISAS if isa in (HOST, "avx2")])
def test_requantised_int8(isa):
    rng = np.random.default_rng(0)
    w = rng.integers(-128, 128, (70, 30)).astype(np.int8)
    matrix = BlockSparseMatrix.from_dense(w, 8, isa)
    bias = rng.integers(-(2**15), 2**15, 30)
    for kind, low, high in ((np.int8, -128, 128), (np.uint8, 0, 256)):
        x = rng.integers(low, high, (100, 70)).astype(kind)
        sums = exact(x, w) + bias
        assert np.array_equal(matrix.multiply(x, bias=bias), sums)
        for shift in (0, 9, 12):
            y = matrix.multiply(x, bias=bias, shift=shift)
            assert y.dtype == np.int8
            assert np.array_equal(y, np.clip(np.floor(sums * 2.0**-shift + 0.5), -128, 127))
    nothing = BlockSparseMatrix.from_dense(np.zeros((0, 30), np.int8), 8, isa)
    y = nothing.multiply(np.zeros((2, 0), np.int8), bias=bias, shift=9)
    assert np.array_equal(y, np.tile(np.clip(np.floor(bias / 512 + 0.5), -128, 127), (2, 1)))


@pytest.mark.parametrize("kind", ["bsr", "csr", "csc", "coo"])
def test_from_scipy(kind):
    w = random_weights(np.random.default_rng(0), (48, 32), (8, 4), 0.5, np.float64)
    sparse = scipy.sparse.bsr_array(w, blocksize=(8, 4)) if kind == "bsr" else scipy.sparse.coo_array(w).asformat(kind)
    matrix = BlockSparseMatrix.from_scipy(sparse)
    assert matrix.block == ((8, 4) if kind == "bsr" else (8, 8))
    assert np.array_equal(matrix.to_dense(), w)
    assert np.array_equal(matrix.gamma, bsr.nonzero_blocks(w[None, None], matrix.block))
    assert matrix.density == matrix.gamma.mean()
    ragged = BlockSparseMatrix.from_scipy(scipy.sparse.csr_array(w[:45, :31]), block=(16, 8))
    assert np.array_equal(ragged.to_dense(), w[:45, :31])


def test_result_is_written_where_it_should_be():
    w = np.eye(16, dtype=np.float32)
    matrix = BlockSparseMatrix.from_dense(w)
    x = np.arange(160, dtype=np.float32).reshape(10, 16)
    out = np.full((10, 16), 7, np.float32)
    assert matrix.multiply(x, out=out) is out
    assert np.array_equal(out, x)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m, x: x.astype(np.float64) @ m, TypeError, "float64; .* takes float32"),
        (lambda m, x: x[:, :3] @ m, ValueError, r"\(5, 3\).*\(M, 16\)"),
        (lambda m, x: x[0] @ m, ValueError, r"\(16,\)"),
        (lambda m, x: m.multiply(x, threads=0), ValueError, "threads is 0"),
        (lambda m, x: m.multiply(x, shift=1), TypeError, "int8"),
        (lambda m, x: m.multiply(x, out=np.zeros((5, 8))), TypeError, "out is float64"),
        (lambda m, x: m.multiply(x, out=np.zeros((8, 5), np.float32).T), ValueError, "C-contiguous"),
        (lambda m, x: m.multiply(BlockSparseMatrix.from_dense(np.eye(8, dtype=np.float32)).pack(x[:, :8])),
         ValueError, "another kind"),
        (lambda m, x: BlockSparseMatrix.from_dense(x, 0), ValueError, "0 x 0"),
        (lambda m, x: BlockSparseMatrix.from_dense(x[0]), ValueError, "1"),
        (lambda m, x: BlockSparseMatrix.from_dense(x.astype(int)), TypeError, "int64"),
        (lambda m, x: BlockSparseMatrix.from_dense(x, isa="mmx"), ValueError, "'mmx': use one of avx512_vnni"),
        (
            lambda m, x: BlockSparseMatrix.from_dense(np.ones((8, 1), np.int8)).multiply(
                np.ones((1, 8), np.int8), bias=np.array([2**31 - 1])
            ),
            ValueError,
            "smaller bias",
        ),
        (lambda m, x: BlockSparseMatrix.from_dense(np.zeros((2**16, 1), np.int8)), ValueError, "overflow"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_a_sentence(call, error, words):
    matrix = BlockSparseMatrix.from_dense(np.ones((16, 8), np.float32))
    with pytest.raises(error, match=words):
        call(matrix, np.ones((5, 16), np.float32))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": np.array([0, 3])}, "row 3 of 2"),
        ({"rows": np.array([1, 0])}, "sorted"),
        ({"rows": np.array([1, 1])}, "sorted"),
        ({"rows": np.array([0])}, "1 row numbers"),
        ({"starts": np.array([0, 3])}, "rise from 0 to 2"),
        ({"starts": np.array([0, 1, 2])}, "rise from 0 to 2 in 2 values"),
        ({"blocks": np.ones((2, 1, 1, 8, 8), np.float32)}, "outside"),
    ],
)
def test_contradictory_blocks_are_refused(change, words):
    good = bsr.pack(np.ones((1, 1, 15, 7), np.float32))
    BlockSparseMatrix(good)
    with pytest.raises(ValueError, match=words):
        BlockSparseMatrix(bsr.BlockColumns(**(vars(good) | change)))
