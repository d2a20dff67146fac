from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from bstf_compiler import BlockSparseMatrix
from bstf_compiler.cpu import simd
from bstf_compiler.cpu.kernels import spgemm
from bstf_compiler.cpu.kernels.sort import sort

HOST = simd.host_isa().name
# A kernel takes long to compile, and is one for a type and three sides of blocks.
SHAPES = [(8, 8, 8), (1, 1, 1), (4, 4, 4), (16, 16, 16), (16, 4, 8), (4, 16, 2), (3, 5, 7)]
ISAS = ["avx2", "portable", *([] if HOST.startswith("avx512") else ["avx512"])]  # VNNI is about bytes
CASES = [
    *[(HOST, "float32", shape) for shape in SHAPES],
    *[(HOST, "float64", shape) for shape in ((8, 8, 8), (1, 1, 1), (16, 16, 16))],
    *[(isa, dtype, (8, 8, 8)) for isa in ISAS for dtype in ("float32", "float64") if isa != HOST],
]


def random_matrix(rng, shape, block, ratio, dtype, isa=None):
    grid = [-(-size // side) for size, side in zip(shape, block)]
    keep = np.kron(rng.random(grid) >= ratio, np.ones(block))[: shape[0], : shape[1]]
    return BlockSparseMatrix.from_dense((rng.integers(1, 9, shape) * keep).astype(dtype), block, isa)


@pytest.mark.parametrize(("isa", "dtype", "block"), CASES)
def test_product_of_sparse_matrices(isa, dtype, block):
    bi, bk, bo = block

    @settings(max_examples=25, deadline=None)
    @given(
        st.integers(0, 999),
        st.tuples(st.integers(0, 90), st.integers(0, 90), st.integers(0, 90)),
        st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        st.integers(1, 3),
    )
    def check(seed, sizes, ratio, threads):
        rng = np.random.default_rng(seed)
        a = random_matrix(rng, sizes[:2], (bi, bk), ratio, dtype, isa)
        b = random_matrix(rng, sizes[1:], (bk, bo), ratio, dtype, isa)
        expected = a.to_dense() @ b.to_dense()
        # Values are positive, so where blocks meet, the block of the product isn't zero.
        gamma = a.gamma.astype(int) @ b.gamma.astype(int) > 0
        for algorithm in ("gustavson", "coo_merge"):
            c = a.product(b, threads, algorithm)
            assert c.block == (bi, bo)
            assert np.array_equal(c.to_dense(), expected)
            assert np.array_equal(c.gamma, gamma)

    check()


def test_as_scipy():
    rng = np.random.default_rng(0)
    a = scipy.sparse.random_array((400, 320), density=0.02, rng=rng, format="bsr")
    b = scipy.sparse.random_array((320, 240), density=0.02, rng=rng, format="bsr")
    c = BlockSparseMatrix.from_scipy(a, 8) @ BlockSparseMatrix.from_scipy(b, 8)
    assert np.allclose(c.to_dense(), (a @ b).toarray(), rtol=1e-13)


def test_memory_of_a_former_product():
    rng = np.random.default_rng(0)
    a, b = (random_matrix(rng, (64, 64), (8, 8), 0.5, "float32") for _ in range(2))
    first = a @ b
    storage = first._columns.blocks
    again = a.product(b, out=first)
    assert np.array_equal(again.to_dense(), a.to_dense() @ b.to_dense())
    assert np.shares_memory(again._columns.blocks, storage)
    small = random_matrix(rng, (8, 8), (8, 8), 0.0, "float32")
    assert np.array_equal(a.product(b, out=small).to_dense(), a.to_dense() @ b.to_dense())


def test_same_bits_for_any_number_of_threads_and_for_callers_at_once():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(2, 320, 320)) * np.kron(rng.random((2, 40, 40)) < 0.3, np.ones((1, 8, 8)))
    a, b = (BlockSparseMatrix.from_dense(one) for one in w)
    one = a.product(b, threads=1).to_dense()
    assert np.allclose(one, w[0] @ w[1])
    different = []

    def work(_):
        for threads in (None, 2, 4):
            for algorithm in ("gustavson", "coo_merge"):
                if not np.allclose(a.product(b, threads, algorithm).to_dense(), one, rtol=1e-12, atol=1e-12):
                    different.append((threads, algorithm))
            if not np.array_equal(a.product(b, threads).to_dense(), one):
                different.append(threads)

    with ThreadPoolExecutor(4) as callers:
        list(callers.map(work, range(4)))  # raises what a caller does
    assert not different


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sort(threads):
    rng = np.random.default_rng(0)
    for count in (0, 1, 2, 31, 32, 33, 64, 65, 1000, 4097):
        for most in (1, 3, 2**40):
            keys = rng.integers(0, most, count)
            for case in (keys, np.sort(keys), np.sort(keys)[::-1]):
                assert np.array_equal(sort(case, threads), np.argsort(case, kind="stable"))


def test_lists_in_any_order_with_blocks_twice():
    rng = np.random.default_rng(0)
    rows, columns = rng.integers(0, 6, 40), rng.integers(0, 5, 40)
    blocks = rng.integers(-4, 5, (40, 2, 3)).astype(np.float32)
    a = spgemm.Coordinates((6, 5), rows, columns, blocks)
    b = spgemm.Coordinates((5, 6), columns, rows, np.ascontiguousarray(blocks.transpose(0, 2, 1)))

    def dense(one):
        full = np.zeros((one.shape[0], one.blocks.shape[1], one.shape[1], one.blocks.shape[2]))
        np.add.at(full, (one.rows, slice(None), one.columns), one.blocks)
        return full.reshape(one.shape[0] * one.blocks.shape[1], -1)

    c = spgemm.coo_merge(a.sorted_by("row"), b.sorted_by("column"), simd.host_isa())
    assert np.array_equal(dense(c), dense(a) @ dense(b))
    assert np.array_equal(np.sort(c.rows * 6 + c.columns), np.unique(c.rows * 6 + c.columns))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m @ m.to_dense(), TypeError, "from the right"),
        (lambda m: m.product(BlockSparseMatrix.from_dense(np.ones((8, 8)))), TypeError, "float32 and float64"),
        (lambda m: m @ BlockSparseMatrix.from_dense(np.ones((8, 8), np.float32)), ValueError, r"\(16, 16\).*\(8, 8\)"),
        (lambda m: m @ BlockSparseMatrix.from_dense(m.to_dense(), 4), ValueError, r"\(4, 4\)"),
        (lambda m: m.product(m, algorithm="magic"), ValueError, "use gustavson or coo_merge"),
        (lambda m: m.product(m, threads=0), ValueError, "threads is 0"),
        (lambda m: BlockSparseMatrix.from_dense(np.ones((8, 8), np.int8)) @ m, TypeError, "int8"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, error, words):
    with pytest.raises(error, match=words):
        call(BlockSparseMatrix.from_dense(np.ones((16, 16), np.float32)))
