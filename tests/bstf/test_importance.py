"""Scores against their formulas, block by block."""

import numpy as np
import pytest

from bstf.blocks import BlockShape
from bstf.importance import block_scores, get

BLOCK = BlockShape(8, 8)
FORMULAS = {
    "l1": lambda w: np.abs(w).sum(),
    "l2": np.linalg.norm,
    "variance": lambda w: ((w - w.mean()) ** 2).mean(),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("shape", [(3, 3, 16, 24), (12, 20), (1, 1, 9, 8)])
def test_formula(name, shape):
    kernel = np.random.default_rng(0).normal(0.3, 1, shape).astype("float32")
    scores = block_scores(kernel, BLOCK, name)
    assert scores.shape == (-(-shape[-2] // 8), -(-shape[-1] // 8))
    for r, c in np.ndindex(scores.shape):
        volume = kernel[..., 8 * r : 8 * r + 8, 8 * c : 8 * c + 8].astype("float64")
        assert scores[r, c] == pytest.approx(FORMULAS[name](volume.ravel()), rel=1e-9)


def test_criteria_order_differently():
    kernel = np.zeros((8, 24))
    kernel[:, :8] = 1.0  # large sum, no variance
    kernel[0, 8:16] = 5.0  # large norm
    l1, l2, variance = (block_scores(kernel, BLOCK, name)[0] for name in ("l1", "l2", "variance"))
    assert l1[0] > l1[1] and l2[0] < l2[1] and variance[0] == variance[2] == 0 < variance[1]


def test_callable_gets_kernel_and_block():
    seen = []

    def outer_sum(kernel, block):
        seen.append((kernel.shape, block))
        return [[1, 2]]

    scores = block_scores(np.ones((8, 16)), BLOCK, outer_sum)
    assert seen == [((8, 16), BLOCK)] and scores.dtype == np.float64
    np.testing.assert_array_equal(scores, [[1, 2]])


def test_errors_are_sentences():
    with pytest.raises(ValueError, match=r"one of l1, l2, variance, or a callable.*got 'L7'"):
        get("L7")
    with pytest.raises(ValueError, match="importance must be"):
        get(None)
    with pytest.raises(ValueError, match=r"layer 'c1' must be one score a block, shape \(1, 2\)"):
        block_scores(np.ones((8, 16)), BLOCK, lambda kernel, block: kernel, "c1")
    with pytest.raises(ValueError, match="layer 'c1' has a score that is NaN"):
        block_scores(np.ones((8, 16)), BLOCK, lambda kernel, block: [[1, np.nan]], "c1")
