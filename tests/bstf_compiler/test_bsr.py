import numpy as np
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from bstf_compiler import bsr


def random_kernel(seed, shape, block, ratio):
    rng = np.random.default_rng(seed)
    grid = [-(-size // side) for size, side in zip(shape[2:], block)]
    keep = np.kron(rng.random(grid) >= ratio, np.ones(block))[: shape[2], : shape[3]]
    return (rng.integers(1, 128, shape) * keep).astype(np.int8)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 999),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from([(8, 8), (4, 16), (1, 1), (3, 5)]),
    st.floats(0, 1),
)
def test_pack_and_unpack(seed, shape, block, ratio):
    kernel = random_kernel(seed, shape, block, ratio)
    packed = bsr.pack(kernel, block)
    assert np.array_equal(bsr.unpack(packed), kernel)
    kept = bsr.nonzero_blocks(kernel, block)
    assert len(packed.rows) == kept.sum() == packed.starts[-1]
    for row, column in np.ndindex(kept.shape):
        part = kernel[:, :, row * block[0] :, column * block[1] :][:, :, : block[0], : block[1]]
        assert kept[row, column] == part.any()


def test_columns_are_those_of_scipy():
    kernel = random_kernel(0, (1, 1, 40, 24), (8, 8), 0.5)
    packed = bsr.pack(kernel)
    reference = scipy.sparse.bsr_matrix(kernel[0, 0].T, blocksize=(8, 8))
    reference.sort_indices()
    assert np.array_equal(packed.starts, reference.indptr)
    assert np.array_equal(packed.rows, reference.indices)
    assert np.array_equal(packed.blocks[:, 0, 0].transpose(0, 2, 1), reference.data)
