"""Blocks against plain NumPy loops."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from bstf.blocks import BlockShape, block_reduce, expand, grid, nonzero_blocks, plane

SIZES = st.integers(1, 21)
BLOCKS = st.tuples(st.integers(1, 9), st.integers(1, 9))


def loop(kernel, block, fn):
    """Every block, cut out by hand."""
    cin, cout = kernel.shape[-2:]
    bi, bo = block
    rows, cols = -(-cin // bi), -(-cout // bo)
    out = np.empty((rows, cols))
    for r, c in itertools.product(range(rows), range(cols)):
        out[r, c] = fn(kernel[..., r * bi : (r + 1) * bi, c * bo : (c + 1) * bo])
    return out


@pytest.mark.parametrize(
    "given_block, expected",
    [(8, (8, 8)), ((8, 4), (8, 4)), ([1, 2], (1, 2)), (np.int64(4), (4, 4)), (BlockShape(2, 3), (2, 3))],
)
def test_block_shape(given_block, expected):
    assert BlockShape.of(given_block) == expected
    assert str(BlockShape.of(given_block)) == f"{expected[0]}x{expected[1]}"


@pytest.mark.parametrize("bad", [0, -8, 8.0, True, "8", None, (8,), (8, 8, 8), (8, 0), (8, 2.5), {8, 4}])
def test_bad_block_is_a_sentence(bad):
    with pytest.raises(ValueError, match="block must be a positive integer or a pair"):
        BlockShape.of(bad)


@given(cin=SIZES, cout=SIZES, block=BLOCKS, taps=st.sampled_from([(), (1, 1), (3, 2)]))
def test_reduce_equals_loop(cin, cout, block, taps):
    kernel = np.random.default_rng(cin * 100 + cout).normal(size=(*taps, cin, cout))
    block = BlockShape(*block)
    for fn in (np.sum, np.var, np.max):
        reduced = block_reduce(kernel, block, fn)
        assert reduced.shape == grid(cin, cout, block)
        np.testing.assert_allclose(reduced, loop(kernel, block, fn), rtol=1e-12, atol=1e-12)


@given(cin=SIZES, cout=SIZES, block=BLOCKS, seed=st.integers(0, 9))
def test_expand_covers_each_block_and_nothing_else(cin, cout, block, seed):
    block = BlockShape(*block)
    gamma = np.random.default_rng(seed).integers(0, 2, grid(cin, cout, block)).astype("float32")
    mask = expand(gamma, (3, 3, cin, cout), block)
    assert mask.shape == (cin, cout)
    for i, o in itertools.product(range(cin), range(cout)):
        assert mask[i, o] == gamma[i // block.bi, o // block.bo]
    np.testing.assert_array_equal(ops.convert_to_numpy(expand(gamma, (cin, cout), block, ops)), mask)
    kernel = np.ones((2, 2, cin, cout)) * mask
    np.testing.assert_array_equal(nonzero_blocks(kernel, block), gamma.astype(bool))


def test_one_weight_makes_a_block_nonzero():
    kernel = np.zeros((3, 3, 20, 12))
    kernel[2, 0, 19, 11] = -1e-30
    expected = np.zeros((3, 2), bool)
    expected[2, 1] = True
    np.testing.assert_array_equal(nonzero_blocks(kernel, BlockShape(8, 8)), expected)


def test_plane():
    kernel = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    np.testing.assert_array_equal(plane(kernel)[4], kernel[1, 1])
    assert plane(np.ones((4, 5))).shape == (1, 4, 5)
